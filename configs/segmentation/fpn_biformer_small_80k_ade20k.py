_base_ = [
    "../_base_/models/semantic_fpn.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/biformer_80k_ade20k.py",
    "../_base_/runtime_segmentation.py",
]

model = dict(
    backbone=dict(
        model_name="biformer_small",
        drop_path_rate=0.15,
        out_norms=True,
        model_kwargs=dict(num_regions=8),
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/biformer_small.pth"),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)

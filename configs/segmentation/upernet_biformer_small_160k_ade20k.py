_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k_keep_ratio.py",
    "../_base_/schedules/biformer_160k_ade20k.py",
    "../_base_/runtime_segmentation.py",
]

model = dict(
    backbone=dict(
        model_name="biformer_small",
        drop_path_rate=0.3,
        out_norms=True,
        model_kwargs=dict(num_regions=8),
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/biformer_small.pth"),
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)

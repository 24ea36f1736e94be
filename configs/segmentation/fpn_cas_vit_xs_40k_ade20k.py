_base_ = [
    "../_base_/models/semantic_fpn.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/cas_vit_40k_ade20k.py",
    "../_base_/runtime_segmentation.py",
]

model = dict(
    backbone=dict(
        model_name="cas_vit_xs",
        drop_path_rate=0.0,
        norm_eval=True,
        out_norms=True,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/cas_vit_xs.pth"),
    ),
    neck=dict(in_channels=[48, 56, 112, 220]),
)

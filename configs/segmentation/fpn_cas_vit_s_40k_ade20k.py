_base_ = "fpn_cas_vit_xs_40k_ade20k.py"

model = dict(
    backbone=dict(
        model_name="cas_vit_s",
        drop_path_rate=0.0,
        init_cfg=dict(checkpoint="checkpoints/cas_vit_s.pth"),
    ),
    neck=dict(in_channels=[48, 64, 128, 256]),
)

_base_ = "fpn_cas_vit_xs_40k_ade20k.py"

model = dict(
    backbone=dict(
        model_name="cas_vit_m",
        drop_path_rate=0.1,
        init_cfg=dict(checkpoint="checkpoints/cas_vit_m.pth"),
    ),
    neck=dict(in_channels=[64, 96, 192, 384]),
)

"""MaxViT-B with UPerNet: not published; here the recipe of PPMA."""

_base_ = "upernet_maxvit_tiny_160k_ade20k.py"

model = dict(
    backbone=dict(
        model_name="maxvit_base",
        drop_path_rate=0.4,
        init_cfg=dict(checkpoint="checkpoints/maxvit_base.pth"),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)

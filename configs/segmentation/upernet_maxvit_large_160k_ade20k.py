"""MaxViT-L with UPerNet: not published; here the recipe of PPMA."""

_base_ = "upernet_maxvit_tiny_160k_ade20k.py"

model = dict(
    backbone=dict(
        model_name="maxvit_large",
        drop_path_rate=0.6,
        init_cfg=dict(checkpoint="checkpoints/maxvit_large.pth"),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)

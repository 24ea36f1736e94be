"""FasterViT-1 with UPerNet: not published; here the recipe of PPMA."""

_base_ = "upernet_faster_vit_0_160k_ade20k.py"

model = dict(
    backbone=dict(
        model_name="faster_vit_1",
        drop_path_rate=0.2,
        init_cfg=dict(checkpoint="checkpoints/faster_vit_1.pth"),
    ),
    decode_head=dict(in_channels=[80, 160, 320, 640]),
    auxiliary_head=dict(in_channels=320),
)

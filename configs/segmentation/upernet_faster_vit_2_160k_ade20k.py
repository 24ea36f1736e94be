"""FasterViT-2 with UPerNet: not published; here the recipe of PPMA."""

_base_ = "upernet_faster_vit_0_160k_ade20k.py"

model = dict(
    backbone=dict(
        model_name="faster_vit_2",
        drop_path_rate=0.2,
        init_cfg=dict(checkpoint="checkpoints/faster_vit_2.pth"),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)

"""FasterViT-4 with UPerNet: not published; here the recipe of PPMA."""

_base_ = "upernet_faster_vit_0_160k_ade20k.py"

model = dict(
    backbone=dict(
        model_name="faster_vit_4",
        drop_path_rate=0.3,
        init_cfg=dict(checkpoint="checkpoints/faster_vit_4.pth"),
    ),
    decode_head=dict(in_channels=[196, 392, 784, 1568]),
    auxiliary_head=dict(in_channels=784),
)

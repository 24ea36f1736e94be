"""GC ViT-small2 with UPerNet: not published; here the recipe of PPMA."""

_base_ = "upernet_gc_vit_xxtiny_160k_ade20k.py"

model = dict(
    backbone=dict(
        model_name="gc_vit_small2",
        drop_path_rate=0.35,
        init_cfg=dict(checkpoint="checkpoints/gc_vit_small2.pth"),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)

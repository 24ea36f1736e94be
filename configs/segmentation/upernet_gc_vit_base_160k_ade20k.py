"""GC ViT-base with UPerNet: not published; here the recipe of PPMA."""

_base_ = "upernet_gc_vit_xxtiny_160k_ade20k.py"

model = dict(
    backbone=dict(
        model_name="gc_vit_base",
        drop_path_rate=0.5,
        init_cfg=dict(checkpoint="checkpoints/gc_vit_base.pth"),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)

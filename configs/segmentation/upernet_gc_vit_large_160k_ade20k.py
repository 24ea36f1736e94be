"""GC ViT-large with UPerNet: not published; here the recipe of PPMA."""

_base_ = "upernet_gc_vit_xxtiny_160k_ade20k.py"

model = dict(
    backbone=dict(
        model_name="gc_vit_large",
        drop_path_rate=0.5,
        init_cfg=dict(checkpoint="checkpoints/gc_vit_large.pth"),
    ),
    decode_head=dict(in_channels=[192, 384, 768, 1536]),
    auxiliary_head=dict(in_channels=768),
)

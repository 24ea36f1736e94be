"""GC ViT-xtiny with UPerNet: not published; here the recipe of PPMA."""

_base_ = "upernet_gc_vit_xxtiny_160k_ade20k.py"

model = dict(
    backbone=dict(
        model_name="gc_vit_xtiny",
        drop_path_rate=0.2,
        init_cfg=dict(checkpoint="checkpoints/gc_vit_xtiny.pth"),
    ),
)

"""GC ViT-xtiny: not published; here the recipe of GC ViT-T."""

_base_ = "cascade_mask_rcnn_gc_vit_tiny_fpn_3x_coco.py"

model = dict(
    backbone=dict(
        model_name="gc_vit_xtiny",
        drop_path_rate=0.2,
        init_cfg=dict(checkpoint="checkpoints/gc_vit_xtiny.pth"),
    ),
)

"""GC ViT-S: its configuration is not published; here that of GC ViT-T."""

_base_ = "cascade_mask_rcnn_gc_vit_tiny_fpn_3x_coco.py"

model = dict(
    backbone=dict(
        model_name="gc_vit_small",
        drop_path_rate=0.3,
        init_cfg=dict(checkpoint="checkpoints/gc_vit_small.pth"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)

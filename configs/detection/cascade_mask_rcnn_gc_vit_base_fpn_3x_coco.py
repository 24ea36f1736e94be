"""GC ViT-B: its configuration is not published; here that of GC ViT-T."""

_base_ = "cascade_mask_rcnn_gc_vit_tiny_fpn_3x_coco.py"

model = dict(
    backbone=dict(
        model_name="gc_vit_base",
        drop_path_rate=0.5,
        init_cfg=dict(checkpoint="checkpoints/gc_vit_base.pth"),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)

_base_ = "mask_rcnn_ppma_tiny_fpn_1x_coco.py"

model = dict(
    backbone=dict(
        model_name="ppma_base",
        drop_path_rate=0.4,
        init_cfg=dict(checkpoint="checkpoints/ppma_base.pth"),
    ),
    neck=dict(in_channels=[80, 160, 320, 512]),
)

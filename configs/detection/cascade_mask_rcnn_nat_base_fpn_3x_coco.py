_base_ = "cascade_mask_rcnn_nat_mini_fpn_3x_coco.py"

model = dict(
    backbone=dict(
        model_name="nat_base",
        drop_path_rate=0.5,
        init_cfg=dict(checkpoint="checkpoints/nat_base.pth"),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)

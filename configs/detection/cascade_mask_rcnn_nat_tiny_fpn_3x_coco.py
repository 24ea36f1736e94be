_base_ = "cascade_mask_rcnn_nat_mini_fpn_3x_coco.py"

model = dict(
    backbone=dict(
        model_name="nat_tiny",
        drop_path_rate=0.3,
        init_cfg=dict(checkpoint="checkpoints/nat_tiny.pth"),
    ),
)

_base_ = "cascade_mask_rcnn_maxvit_tiny_fpn_896_200e_coco.py"

optim_wrapper = dict(optimizer=dict(lr=3e-3))
model = dict(
    backbone=dict(
        model_name="maxvit_base",
        drop_path_rate=0.7,
        init_cfg=dict(checkpoint="checkpoints/maxvit_base.pth"),
    ),
    neck=dict(in_channels=[192, 384, 768]),
)

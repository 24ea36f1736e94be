_base_ = "cascade_mask_rcnn_nat_mini_fpn_3x_coco.py"

optim_wrapper = dict(optimizer=dict(lr=7.5e-5))
model = dict(
    backbone=dict(
        model_name="dinat_s_base",
        drop_path_rate=0.6,
        model_kwargs=dict(dilations="coco"),
        init_cfg=dict(checkpoint="checkpoints/dinat_s_base.pth"),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)

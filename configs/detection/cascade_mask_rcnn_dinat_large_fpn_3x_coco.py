_base_ = "cascade_mask_rcnn_nat_mini_fpn_3x_coco.py"

# No mixed precision, as published.
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(lr=7.5e-5))
model = dict(
    backbone=dict(
        model_name="dinat_large",
        drop_path_rate=0.6,
        model_kwargs=dict(dilations="coco"),
        init_cfg=dict(checkpoint="checkpoints/dinat_large.pth"),
    ),
    neck=dict(in_channels=[192, 384, 768, 1536]),
)

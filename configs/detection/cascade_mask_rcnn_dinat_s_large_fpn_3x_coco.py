_base_ = "cascade_mask_rcnn_nat_mini_fpn_3x_coco.py"

optim_wrapper = dict(optimizer=dict(lr=5e-5))
model = dict(
    backbone=dict(
        model_name="dinat_s_large",
        drop_path_rate=0.6,
        model_kwargs=dict(dilations="coco"),
        init_cfg=dict(checkpoint="checkpoints/dinat_s_large.pth"),
    ),
    neck=dict(in_channels=[192, 384, 768, 1536]),
)

_base_ = "mask_rcnn_nat_mini_fpn_3x_coco.py"

model = dict(
    backbone=dict(
        model_name="dinat_small",
        drop_path_rate=0.35,
        model_kwargs=dict(dilations="coco"),
        init_cfg=dict(checkpoint="checkpoints/dinat_small.pth"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)

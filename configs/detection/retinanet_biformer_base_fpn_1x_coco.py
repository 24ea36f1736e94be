_base_ = "retinanet_biformer_small_fpn_1x_coco.py"

model = dict(
    backbone=dict(
        model_name="biformer_base",
        drop_path_rate=0.3,
        init_cfg=dict(checkpoint="checkpoints/biformer_base.pth"),
    ),
    neck=dict(in_channels=[192, 384, 768]),
)

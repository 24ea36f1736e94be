_base_ = "dino_faster_vit_0_4scale_1x_coco.py"

model = dict(
    backbone=dict(
        model_name="faster_vit_2",
        init_cfg=dict(checkpoint="checkpoints/faster_vit_2.pth"),
    ),
    neck=dict(in_channels=[192, 384, 768]),
)

_base_ = "dino_faster_vit_0_4scale_1x_coco.py"

model = dict(
    backbone=dict(
        model_name="faster_vit_3",
        init_cfg=dict(checkpoint="checkpoints/faster_vit_3.pth"),
    ),
    neck=dict(in_channels=[256, 512, 1024]),
)

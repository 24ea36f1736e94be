_base_ = "dino_faster_vit_0_4scale_1x_coco.py"

model = dict(
    backbone=dict(
        model_name="faster_vit_1",
        init_cfg=dict(checkpoint="checkpoints/faster_vit_1.pth"),
    ),
    neck=dict(in_channels=[160, 320, 640]),
)

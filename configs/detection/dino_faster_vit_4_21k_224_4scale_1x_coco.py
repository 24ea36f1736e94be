_base_ = "dino_faster_vit_0_4scale_1x_coco.py"

# The published detector was trained with the position terms and the padding of its own copy of the
# backbone; for training anew without: model.backbone.model_kwargs.official_quirks=False.
model = dict(
    backbone=dict(
        model_name="faster_vit_4_21k_224",
        model_kwargs=dict(official_quirks=True),
        init_cfg=dict(checkpoint="checkpoints/faster_vit_4_21k_224.pth"),
    ),
    neck=dict(in_channels=[392, 784, 1568]),
)

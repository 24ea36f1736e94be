"""COCO boxes at several sizes, as DETR and DINO train: 2 images on each GPU.

Half of the images get a short side of 480 to 800 pixels (the long one 1333 at most); the others
are first resized to a short side of 400, 500 or 600 and cropped to sides of 384 to 600 pixels.
Images without objects are trained on too.
"""

_base_ = "coco_detection.py"

train_sizes = [(1333, short) for short in range(480, 801, 32)]
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="RandomFlip", prob=0.5),
    dict(
        type="RandomChoice",
        transforms=[
            [dict(type="RandomChoiceResize", scales=train_sizes, keep_ratio=True)],
            [
                # The long side is free: no image of COCO is seven times as long as wide.
                dict(
                    type="RandomChoiceResize",
                    scales=[(4200, 400), (4200, 500), (4200, 600)],
                    keep_ratio=True,
                ),
                dict(
                    type="RandomCrop",
                    crop_type="absolute_range",
                    crop_size=(384, 600),
                    allow_negative_crop=True,
                ),
                dict(type="RandomChoiceResize", scales=train_sizes, keep_ratio=True),
            ],
        ],
    ),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(
    batch_size=2, dataset=dict(filter_cfg=dict(filter_empty_gt=False), pipeline=train_pipeline)
)

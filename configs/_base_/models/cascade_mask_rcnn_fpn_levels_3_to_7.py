"""Cascade Mask R-CNN as ``cascade_mask_rcnn_fpn.py``, on a pyramid of strides 8 to 128.

The pyramid starts at stride 8, so the backbone gives no stride 4; anchors are of 32 to 512 pixels,
as on strides 4 to 64. The leaf names the backbone and the neck's in_channels.
"""

_base_ = "cascade_mask_rcnn_fpn.py"

model = dict(
    backbone=dict(out_indices=(1, 2, 3)),
    rpn_head=dict(anchor_generator=dict(scales=[4], strides=[8, 16, 32, 64, 128])),
    roi_head=dict(
        bbox_roi_extractor=dict(featmap_strides=[8, 16, 32, 64]),
        mask_roi_extractor=dict(featmap_strides=[8, 16, 32, 64]),
    ),
)

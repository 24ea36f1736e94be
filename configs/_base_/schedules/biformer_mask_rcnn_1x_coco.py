"""BiFormer with Mask R-CNN: ``biformer_1x_coco.py`` with another weight decay.

Those of BatchNorm decay: the published rule fits names of LayerNorm alone.
"""

_base_ = "biformer_1x_coco.py"

optim_wrapper = dict(
    optimizer=dict(weight_decay=0.05),
    paramwise_cfg=dict(
        custom_keys={
            "norm": dict(decay_mult=0.0),
            "downsample.norm": dict(decay_mult=1.0),
            "model.stem": dict(decay_mult=1.0),
        }
    ),
)

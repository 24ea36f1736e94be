"""BiFormer with UPerNet on ADE20K: 160k iterations of AdamW (semantic_segmentation/configs).

Paper: arXiv 2303.08810.
"""

_base_ = "nat_160k_ade20k.py"

# Those of BatchNorm decay: the published rule fits names of LayerNorm alone.
optim_wrapper = dict(
    loss_scale=512.0,
    paramwise_cfg=dict(
        custom_keys={
            "_delete_": True,
            "norm": dict(decay_mult=0.0),
            "downsample.norm": dict(decay_mult=1.0),
            "model.stem": dict(decay_mult=1.0),
        }
    ),
)

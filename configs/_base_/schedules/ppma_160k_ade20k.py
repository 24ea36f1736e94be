"""PPMA on ADE20K: 160k iterations of AdamW (arXiv 2506.15940; its segmentation configs).

As in mmseg 0.x, the rate falls from the first iteration on, and the warm-up is a factor on it.
"""

_base_ = "nat_160k_ade20k.py"

# Tables of positions, which PPMA has none of, do not decay.
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(weight_decay=0.05),
    paramwise_cfg=dict(
        custom_keys={
            "_delete_": True,
            "rel_pos_bias.table": dict(decay_mult=0.0),
            "norm": dict(decay_mult=0.0),
        }
    ),
)

"""PPMA on Cityscapes: ``ppma_160k_ade20k.py`` for one crop on each of 8 GPUs."""

_base_ = "ppma_160k_ade20k.py"

# The norms of the stem decay, whose names have no "norm" in the official code.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"model.stem": dict(decay_mult=1.0)}))
auto_scale_lr = dict(base_batch_size=8 * 1)

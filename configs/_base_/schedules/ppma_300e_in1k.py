"""PPMA and RMT on ImageNet-1k: 300 epochs (arXiv 2506.15940; classification/main.py and README).

The rates are those of BiFormer, and the figures those of an average of the weights.
"""

_base_ = "biformer_300e_in1k.py"

# Layer scales decay, which have four dimensions in the official code.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"gamma": dict(decay_mult=1.0)}))
custom_hooks = [
    # 1 - momentum is the decay of the average at every update: 0.99996 ** (1024 / 512).
    dict(
        type="EMAHook",
        ema_type="ExponentialMovingAverage",
        momentum=1 - 0.99996**2,
        update_buffers=True,
    ),
]

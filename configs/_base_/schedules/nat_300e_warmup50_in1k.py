"""Isotropic base models: ``nat_300e_in1k.py`` with 50 warm-up epochs and an average of weights."""

_base_ = "nat_300e_in1k.py"

param_scheduler = [
    dict(
        type="LinearLR",
        start_factor=1e-3,
        begin=0,
        end=50,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
    dict(
        type="CosineAnnealingLR",
        T_max=300,
        eta_min=5e-6,
        begin=0,
        end=300,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
custom_hooks = [
    # 1 - momentum is the decay of the average, 0.9998, at every batch.
    dict(type="EMAHook", ema_type="ExponentialMovingAverage", momentum=2e-4, update_buffers=True),
]

"""FasterViT-3: ``faster_vit_310e_in1k.py`` with 35 warm-up epochs and MESA from epoch 94 on."""

_base_ = "faster_vit_310e_in1k.py"

optim_wrapper = dict(optimizer=dict(weight_decay=0.075))
param_scheduler = [
    dict(
        type="LinearLR",
        start_factor=2e-4,
        begin=0,
        end=35,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
    dict(
        type="CosineAnnealingLR",
        T_max=310,
        eta_min=5e-6,
        begin=0,
        end=310,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
custom_hooks = [
    dict(
        type="EMAHook",
        ema_type="ExponentialMovingAverage",
        momentum=2e-4,
        interval=4,
        update_buffers=True,
    ),
    dict(type="SelfDistillationHook", weight=1.0, begin_epoch=94),
]

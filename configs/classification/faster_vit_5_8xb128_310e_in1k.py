_base_ = "faster_vit_4_8xb128_310e_in1k.py"

custom_hooks = [
    dict(
        type="EMAHook",
        ema_type="ExponentialMovingAverage",
        momentum=2e-4,
        interval=4,
        update_buffers=True,
    ),
    dict(type="SelfDistillationHook", weight=5.0, begin_epoch=78),
]
randomness = dict(seed=30)
model = dict(model_name="faster_vit_5")

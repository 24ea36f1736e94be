_base_ = "faster_vit_1_8xb128_310e_in1k.py"

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="TimmOptimizer", opt="lamb", lr=5e-3, weight_decay=0.12)
)
custom_hooks = [
    dict(
        type="EMAHook",
        ema_type="ExponentialMovingAverage",
        momentum=2e-4,
        interval=4,
        update_buffers=True,
    ),
    dict(type="SelfDistillationHook", weight=4.0, begin_epoch=78),
]
model = dict(model_name="faster_vit_4", drop_path_rate=0.3)

_base_ = "faster_vit_0_8xb128_310e_in1k.py"

val_dataloader = dict(dataset=dict(transform=dict(crop_pct=1.0)))
test_dataloader = val_dataloader
custom_hooks = [
    dict(
        type="EMAHook",
        ema_type="ExponentialMovingAverage",
        momentum=2e-4,
        interval=4,
        update_buffers=True,
    ),
    dict(type="SelfDistillationHook", weight=0.5, begin_epoch=78),
]
model = dict(model_name="faster_vit_1")

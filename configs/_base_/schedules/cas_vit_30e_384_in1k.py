"""CAS-ViT, fine-tuning at 384 pixels: 30 epochs at a constant learning rate (its README)."""

train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=30, val_interval=1)

optim_wrapper = dict(
    type="AmpOptimWrapper",
    constructor="LayerDecayOptimWrapperConstructor",
    paramwise_cfg=dict(layer_decay=1.0),
    optimizer=dict(type="AdamW", lr=5e-5, eps=1e-8, weight_decay=0.05),
)
auto_scale_lr = dict(enable=False, base_batch_size=8 * 64)
custom_hooks = [
    dict(type="EMAHook", ema_type="ExponentialMovingAverage", momentum=5e-4, update_buffers=True),
]

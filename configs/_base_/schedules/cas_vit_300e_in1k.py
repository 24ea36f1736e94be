"""CAS-ViT on ImageNet-1k: 300 epochs (arXiv 2408.03703; classification/main.py and its README)."""

max_epochs = 300
warmup_epochs = 20
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=max_epochs, val_interval=1)

# lr is for 8 GPUs x 128 images x 2 accumulated batches; weights of one dimension do not decay.
optim_wrapper = dict(
    type="AmpOptimWrapper",
    accumulative_counts=2,
    constructor="LayerDecayOptimWrapperConstructor",
    paramwise_cfg=dict(layer_decay=1.0),
    optimizer=dict(type="AdamW", lr=6e-3, eps=1e-8, weight_decay=0.05),
)
# Accumulation stays as it is, so only the images of one step count.
auto_scale_lr = dict(enable=False, base_batch_size=8 * 128)

param_scheduler = [
    dict(
        type="LinearLR",
        start_factor=1e-6,
        begin=0,
        end=warmup_epochs,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
    dict(
        type="CosineAnnealingLR",
        T_max=max_epochs - warmup_epochs,
        eta_min=1e-6,
        begin=warmup_epochs,
        end=max_epochs,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
custom_hooks = [
    # 1 - momentum is the decay of the average, 0.9995, at every second batch: every update.
    dict(
        type="EMAHook",
        ema_type="ExponentialMovingAverage",
        momentum=5e-4,
        interval=2,
        update_buffers=True,
    ),
]

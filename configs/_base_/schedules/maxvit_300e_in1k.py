"""MaxViT on ImageNet-1k: 300 epochs (arXiv 2204.01697, table 12; vision_i1k.py)."""

max_epochs = 300
# 10 000 steps of 4096 images.
warmup_epochs = 32
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=max_epochs, val_interval=1)

# lr is for 4096 images: 8 GPUs x 64 x 8 accumulated batches. Weights of one dimension and tables
# of positions do not decay.
optim_wrapper = dict(
    type="AmpOptimWrapper",
    accumulative_counts=8,
    constructor="LayerDecayOptimWrapperConstructor",
    paramwise_cfg=dict(layer_decay=1.0),
    optimizer=dict(type="AdamW", lr=3e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=1.0),
)
# Accumulation stays as it is, so only the images of one step count.
auto_scale_lr = dict(enable=False, base_batch_size=8 * 64)

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
        eta_min=1e-5,
        begin=warmup_epochs,
        end=max_epochs,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
custom_hooks = [
    # 1 - momentum is the decay of the average, 0.9999, at every eighth batch: every update.
    dict(
        type="EMAHook",
        ema_type="ExponentialMovingAverage",
        momentum=1e-4,
        interval=8,
        update_buffers=True,
    ),
]

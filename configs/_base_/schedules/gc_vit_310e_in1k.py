"""GC ViT on ImageNet-1k: 310 epochs and 10 of cool-down (arXiv 2206.09959; configs/*.yml).

As timm counts, the cosine runs from epoch 0 to 310, and the warm-up is a factor on it.
"""

max_epochs = 310
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=max_epochs + 10, val_interval=1)

# lr is for 4096 images: 8 GPUs x 128 x 4 accumulated batches. The number of GPUs is not published
# with the recipe; this is that of FasterViT, of the same rate and authors. Weights of one dimension
# do not decay, tables of positions do.
optim_wrapper = dict(
    type="AmpOptimWrapper",
    accumulative_counts=4,
    constructor="LayerDecayOptimWrapperConstructor",
    paramwise_cfg=dict(layer_decay=1.0, custom_keys={"rel_pos_bias.table": dict(decay_mult=1.0)}),
    optimizer=dict(type="AdamW", lr=5e-3, eps=1e-8, betas=(0.9, 0.999), weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
)
# Accumulation stays as it is, so only the images of one step count.
auto_scale_lr = dict(enable=False, base_batch_size=8 * 128)

param_scheduler = [
    dict(
        type="LinearLR",
        start_factor=2e-4,
        begin=0,
        end=20,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
    dict(
        type="CosineAnnealingLR",
        T_max=max_epochs,
        eta_min=5e-6,
        begin=0,
        end=max_epochs,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
custom_hooks = [
    # 1 - momentum is the decay of the average, 0.9998, at every fourth batch: every update.
    dict(
        type="EMAHook",
        ema_type="ExponentialMovingAverage",
        momentum=2e-4,
        interval=4,
        update_buffers=True,
    ),
]

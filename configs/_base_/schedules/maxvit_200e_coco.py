"""MaxViT on COCO: 200 epochs (arXiv 2204.01697, appendix B.2; tensorflow/models, maxvit).

The number of epochs, the decays, the warm-up and the average are those of the authors' Model
Garden: the paper has the batch and the rates.
"""

max_epochs = 200
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=max_epochs, val_interval=5)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")

# lr is for 256 images: 8 GPUs x 4 x 8 accumulated batches.
optim_wrapper = dict(
    type="AmpOptimWrapper",
    accumulative_counts=8,
    constructor="LayerDecayOptimWrapperConstructor",
    paramwise_cfg=dict(layer_decay=1.0),
    optimizer=dict(type="AdamW", lr=3e-3, weight_decay=0.05),
)
# Accumulation stays as it is, so only the images of one step count.
auto_scale_lr = dict(enable=False, base_batch_size=8 * 4)

param_scheduler = [
    # 6000 steps of 256 images.
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=6000 * 8),
    dict(
        type="CosineAnnealingLR",
        T_max=max_epochs,
        eta_min=0.0,
        begin=0,
        end=max_epochs,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
custom_hooks = [
    # 1 - momentum is the decay of the average, 0.9998, at every eighth batch: every update.
    dict(
        type="EMAHook",
        ema_type="ExponentialMovingAverage",
        momentum=2e-4,
        interval=8,
        update_buffers=True,
    ),
]

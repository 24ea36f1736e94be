"""BiFormer on ImageNet-1k: 300 epochs (arXiv 2303.08810; main.py and configs/train_args.yaml).

As timm counts, the cosine runs from epoch 0 to 300, and the warm-up is a factor on it.
"""

max_epochs = 300
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=max_epochs, val_interval=1)

# lr is 5e-4 for 512 images, here for 8 GPUs x 128; the published script names 16 GPUs for the small
# model, the README 8. Weights of one dimension do not decay.
optim_wrapper = dict(
    type="AmpOptimWrapper",
    constructor="LayerDecayOptimWrapperConstructor",
    paramwise_cfg=dict(layer_decay=1.0),
    optimizer=dict(type="AdamW", lr=1e-3, eps=1e-8, betas=(0.9, 0.999), weight_decay=0.05),
)
auto_scale_lr = dict(enable=False, base_batch_size=8 * 128)

# 1e-6 and 1e-5, which do not scale with the number of images.
param_scheduler = [
    dict(
        type="LinearLR",
        start_factor=1e-3,
        begin=0,
        end=5,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
    dict(
        type="CosineAnnealingLR",
        T_max=max_epochs,
        eta_min=1e-5,
        begin=0,
        end=max_epochs,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]

"""NAT, DiNAT and DiNAT_s on ImageNet-1k: 300 epochs and 10 of cool-down (classification/train.py).

Papers: arXiv 2204.07143 and 2209.15001. As timm counts, the cosine runs from epoch 0 to 300, and
the warm-up is a factor on it.
"""

max_epochs = 300
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=max_epochs + 10, val_interval=1)

# lr is for 128 images on each of 8 GPUs: the number of processes is not published with the
# recipe, 8 is the papers'. Weights of one dimension do not decay, tables of positions do.
optim_wrapper = dict(
    type="AmpOptimWrapper",
    constructor="LayerDecayOptimWrapperConstructor",
    paramwise_cfg=dict(layer_decay=1.0),
    optimizer=dict(type="AdamW", lr=1e-3, eps=1e-8, betas=(0.9, 0.999), weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
)
auto_scale_lr = dict(enable=False, base_batch_size=8 * 128)

param_scheduler = [
    dict(
        type="LinearLR",
        start_factor=1e-3,
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
randomness = dict(seed=42)

"""Large DiNAT and DiNAT_s, 22k to 1k: 30 epochs, a rate that falls linearly (their yml files).

arXiv 2209.15001. Where the rate ends is not published: here at the 5e-6 of the other recipe.
"""

max_epochs = 30
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=max_epochs, val_interval=1)

# lr is for 64 images on each of 8 GPUs: the number of processes is not published. Weights of one
# dimension do not decay, tables of positions do.
optim_wrapper = dict(
    type="OptimWrapper",
    constructor="LayerDecayOptimWrapperConstructor",
    paramwise_cfg=dict(layer_decay=1.0),
    optimizer=dict(type="AdamW", lr=5e-5, eps=1e-8, betas=(0.9, 0.999), weight_decay=1e-4),
    clip_grad=dict(max_norm=5.0),
)
auto_scale_lr = dict(enable=False, base_batch_size=8 * 64)

param_scheduler = [
    dict(
        type="PolyLR",
        power=1.0,
        eta_min=5e-6,
        begin=0,
        end=max_epochs,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
randomness = dict(seed=42)

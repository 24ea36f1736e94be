"""PPMA on COCO: 12 epochs of AdamW (arXiv 2506.15940; its detection configs)."""

train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=12, val_interval=1)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")

# lr is for 8 GPUs x 2 images; no gradient clipping, no layer decay. Norms do not decay, but for
# those of the stem, whose names have no "norm" in the official code.
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(
        custom_keys={"norm": dict(decay_mult=0.0), "model.stem": dict(decay_mult=1.0)}
    ),
)
auto_scale_lr = dict(enable=False, base_batch_size=8 * 2)

param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=12, milestones=[8, 11], gamma=0.1),
]

"""FasterViT on COCO with DINO: 12 epochs (arXiv 2306.06189; dino/config/DINO, main.py)."""

train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=12, val_interval=1)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")

# lr is for 2 images on each of 8 GPUs: the number of GPUs is not published, 8 is DINO's. Every
# parameter decays.
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, weight_decay=1e-4),
    paramwise_cfg=dict(custom_keys={"backbone": dict(lr_mult=0.1)}),
    clip_grad=dict(max_norm=0.1),
)
auto_scale_lr = dict(enable=False, base_batch_size=8 * 2)

param_scheduler = [
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=12, milestones=[11], gamma=0.1),
]

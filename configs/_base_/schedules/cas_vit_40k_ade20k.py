"""CAS-ViT on ADE20K: 40k iterations of AdamW (arXiv 2408.03703; its segmentation configs)."""

train_cfg = dict(type="IterBasedTrainLoop", max_iters=40000, val_interval=4000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")

# lr is for 8 GPUs x 4 images; no layer decay.
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=2e-4, weight_decay=1e-4))
auto_scale_lr = dict(enable=False, base_batch_size=8 * 4)

param_scheduler = [
    dict(type="PolyLR", power=0.9, eta_min=0.0, begin=0, end=40000, by_epoch=False),
]

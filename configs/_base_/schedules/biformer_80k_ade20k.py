"""BiFormer with Semantic FPN on ADE20K: 80k iterations of AdamW (semantic_segmentation/configs).

Paper: arXiv 2303.08810. As in mmseg 0.x, the rate falls from the first iteration on, and the
warm-up is a factor on it.
"""

train_cfg = dict(type="IterBasedTrainLoop", max_iters=80000, val_interval=8000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")

# lr is for 8 GPUs x 4 crops; no layer decay.
optim_wrapper = dict(
    type="AmpOptimWrapper",
    loss_scale=512.0,
    optimizer=dict(type="AdamW", lr=2e-4, betas=(0.9, 0.999), weight_decay=1e-4),
)
auto_scale_lr = dict(enable=False, base_batch_size=8 * 4)

param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=1000),
    dict(
        type="CosineAnnealingLR",
        T_max=80000,
        eta_min_ratio=1e-8,
        by_epoch=False,
        begin=0,
        end=80000,
    ),
]

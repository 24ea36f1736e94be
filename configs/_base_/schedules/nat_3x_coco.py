"""NAT, DiNAT and DiNAT_s on COCO: 36 epochs of AdamW in mixed precision (detection/configs).

Papers: arXiv 2204.07143 and 2209.15001.
"""

train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=36, val_interval=1)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")

# lr is for 16 images, here 8 GPUs x 2; no gradient clipping, no layer decay.
optim_wrapper = dict(
    type="AmpOptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(
        custom_keys={"rel_pos_bias": dict(decay_mult=0.0), "norm": dict(decay_mult=0.0)}
    ),
)
auto_scale_lr = dict(enable=False, base_batch_size=8 * 2)

param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=36, milestones=[27, 33], gamma=0.1),
]

"""NAT, DiNAT and DiNAT_s on ADE20K: 160k iterations of AdamW (segmentation/configs).

Papers: arXiv 2204.07143 and 2209.15001. As in mmseg 0.x, the rate falls from the first iteration
on, and the warm-up is a factor on it.
"""

train_cfg = dict(type="IterBasedTrainLoop", max_iters=160000, val_interval=16000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")

# lr is for 16 crops, here 8 GPUs x 2; no layer decay.
optim_wrapper = dict(
    type="AmpOptimWrapper",
    optimizer=dict(type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    paramwise_cfg=dict(
        custom_keys={"rel_pos_bias": dict(decay_mult=0.0), "norm": dict(decay_mult=0.0)}
    ),
)
auto_scale_lr = dict(enable=False, base_batch_size=8 * 2)

param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=160000),
]

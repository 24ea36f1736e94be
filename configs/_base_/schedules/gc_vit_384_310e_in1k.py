"""GC ViT at 384 pixels: ``gc_vit_8xb32_310e_in1k.py`` at a fifth of the rate (its yml file)."""

_base_ = "gc_vit_8xb32_310e_in1k.py"

optim_wrapper = dict(optimizer=dict(lr=1e-3))
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
        T_max=310,
        eta_min=5e-6,
        begin=0,
        end=310,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]

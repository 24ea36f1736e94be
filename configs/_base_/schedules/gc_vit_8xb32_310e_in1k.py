"""Large GC ViT: ``gc_vit_310e_in1k.py`` with 32 images on each GPU and 16 accumulated batches."""

_base_ = "gc_vit_310e_in1k.py"

optim_wrapper = dict(accumulative_counts=16)
auto_scale_lr = dict(base_batch_size=8 * 32)
custom_hooks = [
    dict(
        type="EMAHook",
        ema_type="ExponentialMovingAverage",
        momentum=2e-4,
        interval=16,
        update_buffers=True,
    ),
]

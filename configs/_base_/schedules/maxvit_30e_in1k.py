"""MaxViT, fine-tuning at 384 and 512 pixels: 30 epochs at a constant rate (arXiv 2204.01697)."""

_base_ = "maxvit_300e_in1k.py"

train_cfg = dict(max_epochs=30)
# lr is for 512 images: 8 GPUs x 16 x 4 accumulated batches.
optim_wrapper = dict(accumulative_counts=4, optimizer=dict(lr=5e-5, weight_decay=1e-8))
auto_scale_lr = dict(base_batch_size=8 * 16)
param_scheduler = []
custom_hooks = [
    dict(
        type="EMAHook",
        ema_type="ExponentialMovingAverage",
        momentum=1e-4,
        interval=4,
        update_buffers=True,
    ),
]

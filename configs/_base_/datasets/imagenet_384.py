"""ImageNet-1k at 384 pixels; evaluation resizes the whole image to the square."""

_base_ = "imagenet.py"

train_dataloader = dict(batch_size=64, dataset=dict(input_size=384))
val_dataloader = dict(
    batch_size=64,
    dataset=dict(input_size=384, transform=dict(crop_pct=1.0, crop_mode="squash")),
)
test_dataloader = val_dataloader

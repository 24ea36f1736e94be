"""ImageNet-1k at 384 pixels; evaluation resizes the short side to 384 and takes the middle."""

_base_ = "imagenet.py"

train_dataloader = dict(batch_size=64, dataset=dict(input_size=384))
val_dataloader = dict(batch_size=64, dataset=dict(input_size=384, transform=dict(crop_pct=1.0)))
test_dataloader = val_dataloader

"""ImageNet-1k at 512 pixels; evaluation resizes the whole image to the square."""

_base_ = "imagenet_384.py"

train_dataloader = dict(batch_size=32, dataset=dict(input_size=512))
val_dataloader = dict(batch_size=32, dataset=dict(input_size=512))
test_dataloader = val_dataloader

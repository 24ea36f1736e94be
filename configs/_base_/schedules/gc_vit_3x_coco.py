"""GC ViT on COCO with Cascade Mask R-CNN: 36 epochs (arXiv 2206.09959; detection/configs)."""

_base_ = "nat_3x_coco.py"

optim_wrapper = dict(type="OptimWrapper")
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=False, begin=0, end=2500),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=36, milestones=[27, 33], gamma=0.1),
]

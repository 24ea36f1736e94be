"""The runtime of classifiers on timm's models."""

_base_ = "runtime.py"

default_scope = "mmengine"
default_hooks = dict(checkpoint=dict(save_best="accuracy/top1"))

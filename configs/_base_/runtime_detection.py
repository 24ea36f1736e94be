"""The runtime of mmdet's models."""

_base_ = "runtime.py"

default_scope = "mmdet"
default_hooks = dict(visualization=dict(type="DetVisualizationHook"))
visualizer = dict(type="DetLocalVisualizer")
# Image sizes change from batch to batch.
env_cfg = dict(cudnn_benchmark=False)

"""The runtime of mmdet's models."""

_base_ = "runtime.py"

default_scope = "mmdet"
default_hooks = dict(visualization=dict(type="DetVisualizationHook"))
visualizer = dict(type="DetLocalVisualizer")
# Image sizes change from batch to batch.
env_cfg = dict(cudnn_benchmark=False)
# What merges the views of tta_pipeline; the limits are those of the heads.
tta_model = dict(
    type="DetTTAModel",
    tta_cfg=dict(nms=dict(type="nms", iou_threshold=0.5), max_per_img=100),
)

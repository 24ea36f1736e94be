"""The runtime of mmseg's models, which count iterations, not epochs."""

_base_ = "runtime.py"

default_scope = "mmseg"
default_hooks = dict(
    logger=dict(log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=4000),
    visualization=dict(type="SegVisualizationHook"),
)
log_processor = dict(by_epoch=False)
visualizer = dict(type="SegLocalVisualizer")
# What merges the views of tta_pipeline: it averages their probabilities.
tta_model = dict(type="SegTTAModel")

"""What every run shares: the models of densezoo, hooks, logs, TensorBoard where it is installed."""

custom_imports = dict(imports=["densezoo"])
runner_type = "DurableRunner"

default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50),
    param_scheduler=dict(type="ParamSchedulerHook"),
    bad_loss=dict(type="StopOnBadLossHook"),
    checkpoint=dict(type="DurableCheckpointHook", interval=1, max_keep_ckpts=3),
    sampler_seed=dict(type="ReseedHook"),
)
log_processor = dict(type="LogProcessor", window_size=50, by_epoch=True)
log_level = "INFO"

vis_backends = [dict(type="LocalVisBackend")]
if __import__("importlib.util").util.find_spec("tensorboard"):
    vis_backends.append(dict(type="TensorboardVisBackend"))
visualizer = dict(type="Visualizer", vis_backends=vis_backends)

# With several GPUs, BatchNorm in training mode takes the statistics of all their images.
sync_bn = "torch"
env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),
)
load_from = None
resume = False

"""Train a config with fully sharded parameters, by mmengine's strategy."""

import sys

import torch
from mmengine.runner import FlexibleRunner

from densezoo.tools.engine.config_files import load_config

cfg = load_config(sys.argv[1])
torch.distributed.init_process_group("gloo")
wrapper = dict(type="MMFullyShardedDataParallel", device_id="cpu")
cfg.strategy = dict(type="FSDPStrategy", model_wrapper=wrapper, state_dict_cfg="full")
cfg.default_hooks.checkpoint.type = "CheckpointHook"
cfg.train_cfg = dict(by_epoch=False, max_iters=cfg.train_cfg.max_iters)
cfg.train_dataloader.pin_memory = False
FlexibleRunner.from_cfg(cfg).train()
torch.distributed.destroy_process_group()

"""Training without a GPU: mixed precision and several processes, which mmengine ties to GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn

from ...backbones.registry import register_in_mmengine
from ..ranks import launched_rank
from .config_files import walk_dicts

# What norm_cfg calls layers of mmcv that average over processes.
SYNCHRONISED = ("SyncBN", "MMSyncBN")


@register_in_mmengine(OPTIM_WRAPPERS)
class CpuAmpOptimWrapper(OptimWrapper):
    """Train with bfloat16 autocast on the CPU, for which mmengine's AmpOptimWrapper refuses.

    bfloat16 has the range of float32, so the loss is not scaled.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Run the forward pass of `model` under autocast."""
        with super().optim_context(model), torch.autocast("cpu", dtype=torch.bfloat16):
            yield


def adapt_to_cpu(cfg: dict) -> None:
    """Change what a config asks of a GPU into what a CPU can do, in place.

    Mixed precision becomes bfloat16, and no memory is pinned. The processes of a launcher hold
    their models on the CPU, where PyTorch has no BatchNorm with statistics over all of them, so
    that each takes those of its own images. Does nothing on a machine with a GPU.
    """
    if torch.cuda.is_available():
        return
    optim_wrapper = cfg.get("optim_wrapper")
    if optim_wrapper and optim_wrapper.get("type") == "AmpOptimWrapper":
        optim_wrapper["type"] = "CpuAmpOptimWrapper"
        optim_wrapper.pop("loss_scale", None)
        optim_wrapper.pop("dtype", None)
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        if cfg.get(loader):
            cfg[loader]["pin_memory"] = False
    if cfg.get("launcher", "none") != "none":
        _use_local_batch_norm(cfg)
        cfg["model_wrapper_cfg"] = {
            "type": "MMDistributedDataParallel",
            "device_ids": None,
            "broadcast_buffers": False,
            "find_unused_parameters": cfg.get("find_unused_parameters", False),
            **(cfg.get("model_wrapper_cfg") or {}),
        }


def _use_local_batch_norm(cfg: dict) -> None:
    """Replace BatchNorm that is synchronised over processes by the ordinary one, in place."""
    norms = [norm for _, norm in walk_dicts(cfg["model"]) if norm.get("type") in SYNCHRONISED]
    for norm in norms:
        norm["type"] = "BN"
    if (norms or cfg.get("sync_bn")) and not launched_rank():
        print_log(
            "SyncBatchNorm works on GPUs only: on the CPU each process trains its BatchNorm with "
            "the statistics of its own images"
        )
    cfg["sync_bn"] = None

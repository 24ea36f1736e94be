"""Training without a GPU: mixed precision and several processes, which mmengine ties to GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn

from ...backbones.registry import register_in_mmengine


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

    Mixed precision becomes bfloat16, no memory is pinned, and with a launcher the processes talk
    through gloo. Does nothing on a machine with a GPU.
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
    if cfg.get("launcher", "none") == "pytorch":
        # mmengine's own set-up selects a GPU; it is skipped when the processes are connected.
        torch.distributed.init_process_group("gloo")
        cfg["model_wrapper_cfg"] = {
            "type": "MMDistributedDataParallel",
            "device_ids": None,
            "broadcast_buffers": False,
        }

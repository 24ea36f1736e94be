"""The memory of a step of PyTorch: its peak, and what attention keeps of it for backward."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class OperatorStandIn(nn.Module):
    """Plain PyTorch that stands for one of the zoo's operators in a transcription."""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drop what libraries write to the process's stderr: the profiler's has notes of its own."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def measure_peak(step: Callable[[], Any], device: torch.device) -> float:
    """Measure how far a step takes PyTorch's allocator above where it stood, MiB."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    gc.collect()  # what is freed in the step should be the step's
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _quiet(), torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]"]
    changes.sort(key=lambda event: event["ts"])
    totals = np.cumsum([event["args"]["Bytes"] for event in changes])
    return max(0, *totals.tolist()) / 2**20 if changes else 0.0


class _SavedBytes(TorchFunctionMode):
    """Adds up what attention operators save for backward while it is on.

    Operators are the zoo's own and what stands for them in transcriptions. A storage counts once,
    whole, and that of a parameter not at all.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.storages: dict[int, int] = {}
        self.is_found = False
        self._parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if getattr(func, "namespace", "") != "densezoo":
            return func(*args, **(kwargs or {}))
        return self.watch(func, *args, **(kwargs or {}))

    def watch(self, func: Callable, *args: Any, **kwargs: Any) -> Any:
        """Call an operator and count what it saves."""
        self.is_found = True
        with torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor):
            return func(*args, **kwargs)

    def _note(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._parameters:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor


def measure_saved(model: nn.Module, images: torch.Tensor) -> float | None:
    """Measure what the attention operators of a model save for backward in a step, MiB.

    None for a model without any; what plain PyTorch saves in their place is not found either.
    """
    saved = _SavedBytes(model)
    modules = [m for m in model.modules() if isinstance(m, OperatorStandIn)]
    for module in modules:
        module.forward = functools.partial(saved.watch, module.forward)
    try:
        with saved:
            outputs = model(images)  # kept until all is counted: freed memory is used anew
    finally:
        for module in modules:
            del module.forward
    del outputs
    return sum(saved.storages.values()) / 2**20 if saved.is_found else None

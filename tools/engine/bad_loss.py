"""The end of a run whose loss is no number any more."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from mmengine.hooks import Hook
from mmengine.runner import IterBasedTrainLoop, Runner

from .checks import find_last_checkpoint
from .errors import RunStopped

_NUM_FILES = 8


class StopOnBadLossHook(Hook):
    """Stop training at a loss, or a part of it, that is NaN or infinite; save no such weights.

    The message names the iteration, the parts, the image files of the batch and the last
    checkpoint. It reads the figures that mmengine's RuntimeInfoHook, which every Runner has, copied
    from the device before, and so adds no wait for the device. What counts are the losses, not
    gradients: those may overflow under mixed precision, where the scaler skips the step.

    A step can also ruin the weights while its loss is a number still: a checkpoint whose weights
    are not finite is not written, and the run stops there.
    """

    # After RuntimeInfoHook, before weights are averaged (EMAHook), logged and saved.
    priority = "HIGH"

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: object = None,
        outputs: Mapping | None = None,
    ) -> None:
        """Look at the losses of an iteration.

        Raises:
            RunStopped: one of them is NaN or infinite.
        """
        losses = {
            name: _last_value(runner, name, value)
            for name, value in (outputs or {}).items()
            # What mmengine's parse_losses adds up; the rest are figures such as the accuracy of
            # a crop without annotated pixels.
            if "loss" in name
        }
        if all(math.isfinite(value) for value in losses.values()):
            return
        parts = {name: value for name, value in losses.items() if name != "loss"} or losses
        bad = [f"{name} is {value}" for name, value in parts.items() if not math.isfinite(value)]
        fine = [f"{name} {value:.4g}" for name, value in parts.items() if math.isfinite(value)]
        found = ", ".join(bad or [f"loss is {losses['loss']}"])
        raise RunStopped(
            f"{found} at {_position(runner)}"
            + (f" (beside {', '.join(fine)})" if fine else "")
            + f"; images of the batch: {_name_files(data_batch)}; {_advise(runner)}"
        )

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Look at the weights that are to be saved.

        Raises:
            RunStopped: a parameter is NaN or infinite, or a buffer NaN.
        """
        model = getattr(runner.model, "module", runner.model)
        parameters = {name for name, _ in model.named_parameters()}
        for name, value in checkpoint["state_dict"].items():
            if not torch.is_tensor(value) or not value.is_floating_point():
                continue
            # Buffers may be infinite for a reason, such as masks of attention.
            bad = ~value.isfinite() if name in parameters else value.isnan()
            if bad.any():
                raise RunStopped(
                    f"{int(bad.sum())} of {value.numel()} values of {name} are not finite at "
                    f"{_position(runner)}, and were not saved; {_advise(runner)}"
                )


def _last_value(runner: Runner, name: str, value: torch.Tensor | float) -> float:
    """Give a figure of this iteration as mmengine logged it, or as the model returned it."""
    history = runner.message_hub.log_scalars.get(f"train/{name}")
    return float(value if history is None else history.current())


def _position(runner: Runner) -> str:
    if isinstance(runner.train_loop, IterBasedTrainLoop):
        return f"iteration {runner.iter + 1}"
    return f"iteration {runner.iter + 1} (epoch {runner.epoch + 1})"


def _advise(runner: Runner) -> str:
    last = find_last_checkpoint(Path(runner.work_dir))
    known = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
    return (
        f"{known}; lower optim_wrapper.optimizer.lr, clip gradients "
        "(optim_wrapper.clip_grad.max_norm=1), train without --amp or look into the images and "
        "their annotations, then " + ("continue with --resume" if last else "start again")
    )


def _name_files(batch: object) -> str:
    """Name the image files of a batch: the first ones, then how many more."""
    files = list(dict.fromkeys(_walk_files(batch)))
    if not files:
        return "not named by the data set"
    rest = len(files) - _NUM_FILES
    return ", ".join(files[:_NUM_FILES]) + (f" and {rest} more" if rest > 0 else "")


def _walk_files(batch: object) -> Iterator[str]:
    """Yield the image files of a batch, as it came from the loader.

    Samples of mmdet and mmseg have an attribute `img_path`; batches of the classifier a key.
    """
    path = batch.get("img_path") if hasattr(batch, "get") else None
    if path is not None:
        yield from [path] if isinstance(path, str) else map(str, path)
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _walk_files(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from _walk_files(value)

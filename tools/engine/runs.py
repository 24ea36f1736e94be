"""Set up mmengine's Runner for the sub-commands `train` and `test`."""

from __future__ import annotations

import errno
from collections.abc import Callable

from mmengine.config import Config

from .checks import check_classes
from .cpu import adapt_to_cpu
from .errors import RunStopped
from .image_data import fit_stream_loaders
from .process_group import check_equal_lengths
from .runner import DurableRunner
from .seeding import unwrapped
from .self_distillation import SelfDistillationHook

# A disk or a quota that is full, a limit on the size of files, a disk that became read-only.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def build_runner(cfg: Config, task: str) -> DurableRunner:
    """Build the Runner of a config with its data, so that mistakes show before any work is done.

    Args:
        cfg: a config with `work_dir` and `launcher` set; it is changed to fit the machine.
        task: "train" (with validation) or "test".

    Raises:
        ValueError: if a part of the config can't be built, the data has no image, processes
            would run through different numbers of batches, or a hook lacks what it needs.
    """
    adapt_to_cpu(cfg)
    if task == "train" and cfg.optim_wrapper.get("type") == "OptimWrapper":
        # An option turned mixed precision off; what else the config says of it is left out.
        cfg.optim_wrapper.pop("loss_scale", None)
    fit_stream_loaders(cfg)
    try:
        runner = DurableRunner.from_cfg(cfg)
        loops = [runner.train_loop, runner.val_loop] if task == "train" else [runner.test_loop]
    except (KeyError, TypeError, AssertionError, AttributeError) as error:
        # What mmengine's registries raise for names and arguments that a config got wrong.
        reason = error.args[0] if error.args else type(error).__name__
        raise ValueError(f"the config can't be built: {reason}") from error
    for loop in filter(None, loops):
        if not len(loop.dataloader.dataset):
            raise ValueError(
                "no image is left in the data for "
                f"{type(loop).__name__}: check its folders, and that metainfo.classes names the "
                "classes of the annotation file"
            )
        if not len(loop.dataloader):
            raise ValueError(
                f"{type(loop).__name__} has no batch: its data has {len(loop.dataloader.dataset)} "
                "images, which drop_last leaves out as less than a batch; lower batch_size"
            )
    check_equal_lengths(list(filter(None, loops)))
    datasets = [unwrapped(loop.dataloader.dataset) for loop in filter(None, loops)]
    check_classes(datasets, runner.model)
    for hook in runner.hooks if task == "train" else ():
        if isinstance(hook, SelfDistillationHook):
            hook.check(runner)
    return runner


def run_loop(loop: Callable[[], object]) -> object:
    """Run ``runner.train`` or ``runner.test``.

    Raises:
        RunStopped: for what ends a run on purpose, and for a disk that is full.
        RuntimeError: for what the command takes for mistakes in its arguments. Those were checked
            before, so this one is of the run, and its traceback is wanted.
    """
    try:
        return loop()
    except RunStopped:
        raise
    except (ValueError, OSError, ImportError) as error:
        if getattr(error, "errno", None) in _NO_ROOM:
            where = f"{error.filename!r}" if error.filename else "a file of the work dir"
            raise RunStopped(
                f"the run stopped, since {where} can't be written ({error.strerror}): make room, "
                "then run the command again, `train` with --resume"
            ) from error
        raise RuntimeError(f"the run stopped: {error}") from error

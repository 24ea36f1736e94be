"""Set up mmengine's Runner for the sub-commands `train` and `test`."""

from __future__ import annotations

from collections.abc import Callable

from mmengine.config import Config
from mmengine.runner import Runner

from .checks import check_classes
from .cpu import adapt_to_cpu
from .image_data import fit_stream_loaders


def build_runner(cfg: Config, task: str) -> Runner:
    """Build the Runner of a config with its data, so that mistakes show before any work is done.

    Args:
        cfg: a config with `work_dir` and `launcher` set; it is changed to fit the machine.
        task: "train" (with validation) or "test".

    Raises:
        ValueError: if a part of the config can't be built, or the data has no image.
    """
    adapt_to_cpu(cfg)
    fit_stream_loaders(cfg)
    try:
        runner = Runner.from_cfg(cfg)
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
    check_classes([loop.dataloader.dataset for loop in filter(None, loops)], runner.model)
    return runner


def run_loop(loop: Callable[[], object]) -> object:
    """Run ``runner.train`` or ``runner.test``.

    Raises:
        RuntimeError: for what the command takes for mistakes in its arguments. Those were checked
            before, so this one is of the run, and its traceback is wanted.
    """
    try:
        return loop()
    except (ValueError, OSError, ImportError) as error:
        raise RuntimeError(f"the run stopped: {error}") from error

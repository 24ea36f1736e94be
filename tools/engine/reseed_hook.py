"""The hook that makes a resumed run equal one that was not interrupted."""

from __future__ import annotations

from mmengine.hooks import CheckpointHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import BaseLoop, Runner

from .seeding import EPOCH, ITERATION, ReplayedLoader, seed_process

# The key of this hook's part of a checkpoint.
PROGRESS = "densezoo_progress"


class ReseedHook(Hook):
    """Reseed the process at every iteration, and go on from the middle of things on resuming.

    - Before each training iteration the generators of Python, NumPy and torch are seeded from
      (seed, iteration, rank), so that nothing drawn before (by validation, by data loading in the
      main process) changes what the model draws; before each epoch from (seed, epoch, rank).
    - The sampler, or a data set that can only be iterated, is told the epoch.
    - A checkpoint from within an epoch of an epoch-based loop resumes there.
    - A checkpoint from before the validation of its epoch or iteration resumes with it, so that
      the best checkpoint, and schedulers that look at figures, are those of the whole run.
    - Gradients accumulated when a checkpoint is written are part of it. Of several processes they
      are averaged for that, which changes them by rounding.

    With another Runner than ``DurableRunner`` it reseeds and tells the epoch only.
    """

    # After the hooks that may draw random numbers, and after the checkpoint's own before_train.
    priority = "LOWEST"

    def __init__(self) -> None:
        self._loaded: dict = {}
        self._epoch_begin = (0, 0)
        self._is_validated = False

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Take this hook's part out of a checkpoint."""
        self._loaded = checkpoint.pop(PROGRESS, {})

    def before_train(self, runner: Runner) -> None:
        """Take up a resumed run where its checkpoint was written."""
        if not getattr(runner, "is_resumed", False):
            self._loaded = {}
            return
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        parameters = dict(model.named_parameters())
        for name, gradient in self._loaded.pop("gradients", {}).items():
            parameters[name].grad = gradient.to(parameters[name])
        for hook in runner.hooks:
            if isinstance(hook, CheckpointHook):
                # After a best figure it saves the last checkpoint anew, if it knows of one.
                hook.last_ckpt = runner.message_hub.runtime_info.get("last_ckpt")
        if self._is_validation_due(runner):
            runner.logger.info("The checkpoint was not validated yet, so the run starts with that")
            runner.val_loop.run()

    def _is_validation_due(self, runner: Runner) -> bool:
        """Tell whether the run was to validate after the checkpoint, and had not."""
        loop = runner.train_loop
        done, end = (loop.epoch, loop.max_epochs)
        if _is_endless(loop):
            done, end = (loop.iter, loop.max_iters)
        if (
            runner.val_loop is None
            or self._loaded.get("is_validated", True)
            or self._loaded.get("iters_of_epoch")
            or done < loop.val_begin
        ):
            return False
        loop._decide_current_val_interval()
        return done % loop.val_interval == 0 or done == end

    def before_train_epoch(self, runner: Runner) -> None:
        """Tell the epoch to what orders the samples, and seed for what the epoch starts with."""
        loader = runner.train_loop.dataloader
        self._epoch_begin = (runner.epoch, runner.iter)
        if isinstance(loader, ReplayedLoader):
            # An iteration-based loop counts the epochs of its data itself.
            if not _is_endless(runner.train_loop):
                loader.set_epoch(runner.epoch)
                num_done = self._loaded.pop("iters_of_epoch", 0)
                loader.skip(num_done, is_within_epoch=True)
                self._epoch_begin = (runner.epoch, runner.iter - num_done)
        else:
            for sampler in (loader.sampler, getattr(loader.batch_sampler, "sampler", None)):
                if hasattr(sampler, "set_epoch"):
                    sampler.set_epoch(runner.epoch)
        seed_process(EPOCH, runner.seed, runner.epoch, runner.rank)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        """Seed for one iteration, whose batch is loaded already."""
        self._is_validated = False
        seed_process(ITERATION, runner.seed, runner.iter, runner.rank)

    def before_val(self, runner: Runner) -> None:
        """Note that checkpoints from here to the next iteration need no validation."""
        self._is_validated = True

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add to a checkpoint what a resumed run needs and mmengine does not keep."""
        epoch, begin = self._epoch_begin
        meta = checkpoint["meta"]
        is_within = meta["epoch"] == epoch and not _is_endless(runner.train_loop)
        checkpoint[PROGRESS] = {
            "is_validated": self._is_validated,
            "iters_of_epoch": meta["iter"] - begin if is_within else 0,
            "gradients": getattr(runner, "accumulated_gradients", {}),
        }


def _is_endless(loop: BaseLoop) -> bool:
    """Tell whether a loop counts iterations, and takes its data as one long epoch."""
    return hasattr(loop, "dataloader_iterator")

"""The Runner of every densezoo run: mmengine's, with training that can be replayed exactly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_reduce
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.runner import BaseLoop, IterBasedTrainLoop, Runner, find_latest_checkpoint
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from ...backbones.checkpoints import read_checkpoint
from ...backbones.mmlab import read_mmengine_checkpoints_safely
from .errors import RunStopped
from .seeding import EndlessBatches, ReplayedLoader, rebuilt, replayed
from .unreadable_images import (
    UnreadableImages,
    UnreadableImagesHook,
    count_images,
    with_readable_samples,
)

read_mmengine_checkpoints_safely()  # whatever a Runner of this process loads


@contextmanager
def _config_mistakes(key: str) -> Iterator[None]:
    """Turn what mmengine's registries raise for a wrong config into a message about it."""
    try:
        yield
    except (KeyError, TypeError, AssertionError, AttributeError, ValueError) as error:
        reason = error.args[0] if error.args else type(error).__name__
        raise RunStopped(f"the config's {key} can't be built: {reason}") from error


class DurableRunner(Runner):
    """mmengine's Runner, whose training is a function of its seed.

    - Training samples are loaded with random numbers of their own, see :mod:`.seeding`; with
      ``ReseedHook`` a run that is killed and resumed ends with the weights of one that is not.
    - Unreadable training images are replaced, counted and listed, and stop the run when they are
      more than 1 %; an unreadable image of validation or test data stops it at once.
    - ``sync_bn="torch"`` of a config keeps the activations of timm's BatchNormAct2d, which
      mmengine's own conversion drops.

    A loader that is given built, not as a config, is used as it is.
    """

    is_resumed = False
    accumulated_gradients: dict[str, Tensor] = {}

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Move a model to its device; of several processes synchronise its norms and gradients.

        Raises:
            ValueError: for sharded parameters, of which this Runner's checkpoints hold a part.
        """
        if (model_wrapper_cfg or {}).get("type") == "MMFullyShardedDataParallel":
            raise ValueError(
                "model_wrapper_cfg.type=MMFullyShardedDataParallel is not supported: checkpoints "
                "would hold one process's part of the weights; leave it out (see README)"
            )
        sync_bn = self.cfg.get("sync_bn")
        if sync_bn != "torch" or not self.distributed:
            return super().wrap_model(model_wrapper_cfg, model)
        try:
            self.cfg.sync_bn = None
            return super().wrap_model(model_wrapper_cfg, convert_sync_batchnorm(model))
        finally:
            self.cfg.sync_bn = sync_bn

    def build_optim_wrapper(self, optim_wrapper: OptimWrapper | dict) -> OptimWrapper:
        """Build the optimizer, for which mmengine waits until training starts.

        Raises:
            RunStopped: its config is wrong.
        """
        with _config_mistakes("optim_wrapper"):
            return super().build_optim_wrapper(optim_wrapper)

    def build_param_scheduler(self, scheduler: Any) -> Any:
        """Build the schedulers, for which mmengine waits until training starts.

        Raises:
            RunStopped: their config is wrong.
        """
        with _config_mistakes("param_scheduler"):
            return super().build_param_scheduler(scheduler)

    def register_default_hooks(self, hooks: dict | None = None) -> None:
        """Register the default hooks, with ours in the place of mmengine's own.

        So configs that know nothing of densezoo are replayed and saved as the shipped ones are.
        """
        hooks = dict(hooks or {})
        for name, own in (("sampler_seed", "ReseedHook"), ("checkpoint", "DurableCheckpointHook")):
            options = hooks.get(name, {})
            kind = options.get("type", "") if isinstance(options, dict) else None
            if kind in ("", "DistSamplerSeedHook", "CheckpointHook"):
                hooks[name] = {**options, "type": own}
        hooks.setdefault("bad_loss", {"type": "StopOnBadLossHook"})
        super().register_default_hooks(hooks)

    def build_train_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """Build the training loop, on a loader that can be replayed."""
        options = self._train_dataloader
        if isinstance(loop, BaseLoop) or not isinstance(options, dict):
            return super().build_train_loop(loop)
        self._take_seed_of_checkpoint()
        # What mmengine adds to the seed of each rank; samplers need the same on all.
        has_rank = self._randomness_cfg.get("diff_rank_seed", False)
        seed = self.seed - self.rank if has_rank else self.seed
        built = self.build_dataloader(options, seed=seed)
        unreadable = UnreadableImages(
            Path(self._log_dir, "unreadable_images.txt"), count_images(built.dataset)
        )
        dataset = with_readable_samples(built.dataset, unreadable)
        loader = replayed(built, options, dataset, seed, self.rank)
        self.register_hook(UnreadableImagesHook(unreadable))
        try:
            # mmengine's scaling of the learning rate reads the config.
            self._train_dataloader = loader
            loop = super().build_train_loop(loop)
        finally:
            self._train_dataloader = options
        if isinstance(loop, IterBasedTrainLoop) and isinstance(loader, ReplayedLoader):
            loop.dataloader_iterator = EndlessBatches(loader)
        return loop

    def build_val_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """Build the validation loop, on data whose unreadable images stop the run."""
        with self._strict_loader("_val_dataloader", loop):
            return super().build_val_loop(loop)

    def build_test_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """Build the test loop, on data whose unreadable images stop the run."""
        with self._strict_loader("_test_dataloader", loop):
            return super().build_test_loop(loop)

    @contextmanager
    def _strict_loader(self, name: str, loop: BaseLoop | dict) -> Iterator[None]:
        """Put a built loader in the place of its config while the loop is built."""
        options = getattr(self, name)
        if not isinstance(loop, BaseLoop) and isinstance(options, dict):
            loader = self.build_dataloader(options, seed=self.seed)
            dataset = with_readable_samples(loader.dataset, None)
            setattr(self, name, rebuilt(loader, options, dataset))
        try:
            yield
        finally:
            setattr(self, name, options)

    def _take_seed_of_checkpoint(self) -> None:
        """Use the seed that the run to be resumed began with, before any loader is built."""
        if not self._resume:
            return
        path = self._load_from or find_latest_checkpoint(self.work_dir)
        if not path or not Path(path).is_file():
            return  # mmengine resumes from its remote stores, with a seed that comes too late
        seed = read_checkpoint(path)["meta"].get("seed")
        given = self._randomness_cfg.get("seed")
        if seed is None or seed == given:
            return
        if given is not None:
            self.logger.warning(f"The run began with seed {seed}, so seed {given} is not used")
        self._randomness_cfg.update(seed=seed)
        self.set_randomness(**self._randomness_cfg)

    def resume(self, *args, **options) -> None:
        """Resume from a checkpoint."""
        super().resume(*args, **options)
        self.is_resumed = True

    def save_checkpoint(self, *args, save_optimizer: bool = True, **options) -> None:
        """Save a checkpoint, with what was accumulated of gradients if it is to be resumed from.

        All processes call it, and the first one writes.
        """
        if save_optimizer:
            self.accumulated_gradients = self._collect_gradients()
        try:
            super().save_checkpoint(*args, save_optimizer=save_optimizer, **options)
        finally:
            self.accumulated_gradients = {}

    def _collect_gradients(self) -> dict[str, Tensor]:
        """Return the gradients of an update that is not complete, averaged over processes."""
        if not isinstance(self.optim_wrapper, OptimWrapper) or self.optim_wrapper.should_update():
            return {}
        gradients = {}
        model = self.model.module if is_model_wrapper(self.model) else self.model
        for name, parameter in model.named_parameters():
            if self.world_size > 1 and parameter.requires_grad:
                gradient = parameter.grad
                gradient = torch.zeros_like(parameter) if gradient is None else gradient.clone()
                all_reduce(gradient, "mean")
                gradients[name] = gradient.cpu()
            elif parameter.grad is not None:
                gradients[name] = parameter.grad.cpu()
        return gradients

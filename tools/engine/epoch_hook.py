"""The hook that tells data sets and samplers the epoch, apart for what it imports."""

from mmengine.hooks import DistSamplerSeedHook
from mmengine.runner import Runner

from .image_data import TimmStream


class EpochSeedHook(DistSamplerSeedHook):
    """Tell the epoch to the sampler, as mmengine's hook does, or to a data set that iterates."""

    def before_train_epoch(self, runner: Runner) -> None:
        """Set the epoch of the training loader's data set or sampler."""
        dataset = runner.train_loop.dataloader.dataset
        if isinstance(dataset, TimmStream):
            dataset.set_epoch(runner.epoch)
        else:
            super().before_train_epoch(runner)

"""Repeated augmentation: several versions of an image in an epoch, on different processes."""

from __future__ import annotations

from collections.abc import Sized

from mmengine.dist import get_dist_info, sync_random_seed
from mmengine.registry import DATA_SAMPLERS
from timm.data.distributed_sampler import RepeatAugSampler

from ...backbones.registry import register_in_mmengine
from ...layers.arguments import check_whole_number


@register_in_mmengine(DATA_SAMPLERS)
class RepeatedAugmentationSampler(RepeatAugSampler):
    """Give each drawn image several times in a row, in turn to the processes.

    An epoch is as long as without: of the shuffled images, each repeated, it has as many as the
    data set. A third of the images is drawn with three repeats, anew in every epoch. Which ones
    follows from the seed and the epoch, as in mmengine's ``DefaultSampler``.

    Source: Hoffer et al., arXiv 1901.09335; timm's sampler, which is DeiT's.

    Args:
        dataset: what is sampled.
        num_repeats: versions of an image in an epoch.
        seed: of the run; one that the processes agree on when None.

    Raises:
        ValueError: `num_repeats` is no whole number of at least 1.
    """

    def __init__(self, dataset: Sized, num_repeats: int = 3, seed: int | None = None) -> None:
        check_whole_number("num_repeats of RepeatedAugmentationSampler", num_repeats, 1)
        rank, num_replicas = get_dist_info()
        super().__init__(
            dataset,
            num_replicas=num_replicas,
            rank=rank,
            num_repeats=num_repeats,
            selected_round=0,  # no image is left out but by the loader's drop_last
        )
        self._seed = sync_random_seed() if seed is None else seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the next iteration is of."""
        super().set_epoch(self._seed + epoch)

"""The sampler of repeated augmentation: which images an epoch has, and on which process."""

from collections import Counter

import pytest
import torch.distributed
from mmengine.registry import DATA_SAMPLERS
from torch.testing._internal.distributed.fake_pg import FakeStore

import densezoo  # noqa: F401


def draw(length, epoch=0, **options):
    """The indices of an epoch, of a sampler built as mmengine builds it."""
    cfg = dict(type="RepeatedAugmentationSampler", **options)
    sampler = DATA_SAMPLERS.build(cfg, default_args=dict(dataset=range(length), seed=0))
    sampler.set_epoch(epoch)
    indices = list(sampler)
    assert len(indices) == len(sampler)
    return indices


def draw_as(rank, num_processes, length):
    """What a process of several draws; a group without communication has its rank and size."""
    torch.distributed.init_process_group(
        "fake", store=FakeStore(), rank=rank, world_size=num_processes
    )
    try:
        return draw(length)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("num_repeats", [1, 3])
def test_an_epoch_is_as_long_as_without_and_has_each_of_its_images_in_a_row(num_repeats):
    indices = draw(300, num_repeats=num_repeats)
    assert len(indices) == 300
    assert indices[::num_repeats] == list(dict.fromkeys(indices))
    assert set(Counter(indices).values()) == {num_repeats}


def test_images_follow_from_seed_and_epoch():
    first = draw(300)
    assert first == draw(300)
    assert len({tuple(first), tuple(draw(300, epoch=1)), tuple(draw(300, seed=7))}) == 3
    assert set(first) != set(draw(300, epoch=1))


def test_the_versions_of_an_image_go_to_different_processes():
    ranks = [draw_as(rank, 4, 300) for rank in range(4)]
    assert [len(indices) for indices in ranks] == [75] * 4
    # Read in turn they are what one process has.
    assert [index for step in zip(*ranks, strict=True) for index in step] == draw(300)
    for index in {index for indices in ranks for index in indices}:
        assert sum(index in indices for indices in ranks) == 3


@pytest.mark.parametrize("num_repeats", [0, -3, 1.5, True, "3"], ids=str)
def test_a_wrong_number_of_repeats_is_named(num_repeats):
    with pytest.raises(ValueError, match="num_repeats of RepeatedAugmentationSampler is"):
        draw(300, num_repeats=num_repeats)

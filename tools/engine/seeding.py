"""Random numbers of a training run as a function of where the run is, so that it can be replayed.

Every sample is loaded with generators of its own, seeded from (seed, epoch, rank, batch, place in
the batch): neither the number of workers, nor how long they live, nor what the main process draws
changes it. Generators that a transform makes for itself, and what it keeps between samples (the
caches of mmdet's CachedMosaic), are outside this.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler

# The first word of a key keeps apart what the same place of a run draws for different purposes.
# None is 0, which numpy's SeedSequence does not tell from a missing word.
SAMPLE, STREAM, SHUFFLE, ITERATION, EPOCH = range(1, 6)

# Options of mmengine's loaders that make its parts rather than go to PyTorch's DataLoader.
PART_OPTIONS = {
    "batch_sampler",
    "batch_size",
    "collate_fn",
    "dataset",
    "disable_subprocess_warning",
    "drop_last",
    "num_batch_per_epoch",
    "sampler",
    "shuffle",
    "worker_init_fn",
}


def mix(*key: int) -> int:
    """Mix non-negative integers, a purpose first, into one of 64 bits."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def seed_process(*key: int) -> None:
    """Seed the generators of Python, NumPy and torch (of every device) of this process."""
    _seed_host(*key)
    torch.manual_seed(mix(*key))


def _seed_host(*key: int) -> None:
    words = np.random.SeedSequence(key).generate_state(8)
    random.seed(words[:4].tobytes())
    np.random.seed(words[4:])
    torch.default_generator.manual_seed(mix(*key))


@contextmanager
def generators_of(*key: int) -> Iterator[None]:
    """Seed the CPU's generators of Python, NumPy and torch inside, and restore them after."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    _seed_host(*key)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class SeededIndex(NamedTuple):
    """An index of a data set, and the key of the random numbers that load its sample."""

    index: Any
    key: tuple[int, ...]


class DelegatingDataset(Dataset):
    """A data set that stands for another one: attributes are read from and set on that one."""

    def __init__(self, dataset: Dataset) -> None:
        self.__dict__["_wrapped"] = dataset

    def __len__(self) -> int:
        return len(self._wrapped)

    def __getattr__(self, name: str) -> Any:
        if name == "_wrapped":  # while it is unpickled, before it has one
            raise AttributeError(name)
        return getattr(self._wrapped, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._wrapped, name, value)

    def __getitem__(self, index: Any) -> Any:
        raise NotImplementedError

    def __getitems__(self, indices: list[Any]) -> list[Any]:
        """Load the samples of a batch; PyTorch would take the wrapped data set's own way."""
        return [self[index] for index in indices]


def unwrapped(dataset: Dataset) -> Dataset:
    """Return the data set that :class:`DelegatingDataset` stands for, or the one given."""
    while isinstance(dataset, DelegatingDataset):
        dataset = dataset._wrapped
    return dataset


class SeededSamples(DelegatingDataset):
    """Load each sample with random numbers of its own."""

    def __getitem__(self, index: SeededIndex | Any) -> Any:
        if not isinstance(index, SeededIndex):
            return self._wrapped[index]
        with generators_of(*index.key):
            return self._wrapped[index.index]


class SeededBatches(Sampler):
    """The batches of a batch sampler, each index with the key of its sample's random numbers.

    Args:
        batches: yields lists of indices; its order is its own matter.
        seed: of the run.
        rank: of the process.
    """

    def __init__(self, batches: Sampler, seed: int, rank: int) -> None:
        self.batches = batches
        self.seed = seed
        self.rank = rank
        self.epoch = 0
        self._advanced: Iterator[tuple[int, list]] | None = None

    @property
    def sampler(self) -> Sampler | None:
        """The sampler of indices under the batches, which mmengine's parts look for."""
        return getattr(self.batches, "sampler", None)

    @property
    def batch_size(self) -> int | None:
        """Images in a batch."""
        return getattr(self.batches, "batch_size", None)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[SeededIndex]]:
        numbered, self._advanced = self._advanced or enumerate(self.batches), None
        for number, batch in numbered:
            key = (SAMPLE, self.seed, self.epoch, self.rank, number)
            yield [SeededIndex(index, (*key, place)) for place, index in enumerate(batch)]

    def set_epoch(self, epoch: int) -> None:
        """Tell the epoch to the samplers that take one, and drop what `skip` prepared."""
        self.epoch = epoch
        self._advanced = None
        for sampler in (self.batches, self.sampler):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)

    def skip(self, num_batches: int) -> None:
        """Let the next iteration start after `num_batches` batches, of as many epochs as needed."""
        numbered = enumerate(self.batches)
        while num_batches:
            if next(numbered, None) is not None:
                num_batches -= 1
            elif len(self.batches):
                self.set_epoch(self.epoch + 1)
                numbered = enumerate(self.batches)
            else:
                raise ValueError("the training data has no batch to skip")
        self._advanced = numbered


class ReplayedLoader(DataLoader):
    """A loader of training data that can start anywhere in it.

    Nothing is loaded before the first batch is asked for.
    """

    num_discarded = 0

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration is of."""
        return self._told().epoch

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the next iteration is of."""
        self._told().set_epoch(epoch)

    def skip(self, num_batches: int, *, is_within_epoch: bool = False) -> None:
        """Let the next iteration start after `num_batches` batches, counted from now.

        Samples with an index are not loaded for that. A data set that can only be iterated is
        read up to the place, an epoch of it at most; with `is_within_epoch` that epoch is the one
        set, also where all of it is skipped.
        """
        if isinstance(self.batch_sampler, SeededBatches):
            self.batch_sampler.skip(num_batches)
        elif is_within_epoch:
            self.num_discarded = num_batches
        else:
            num_epochs, self.num_discarded = divmod(num_batches, len(self))
            self.set_epoch(self.epoch + num_epochs)

    def _told(self) -> SeededBatches | IterableDataset:
        """Return what knows the epoch."""
        if isinstance(self.batch_sampler, SeededBatches):
            return self.batch_sampler
        return self.dataset

    def __iter__(self) -> Iterator[Any]:
        # A generator, so that workers start after a position was set.
        batches = super().__iter__()
        num_discarded, self.num_discarded = self.num_discarded, 0
        for _ in range(num_discarded):
            next(batches)
        yield from batches


class EndlessBatches:
    """The batches of a loader, epoch after epoch, for mmengine's iteration-based loop.

    It takes the place of mmengine's own iterator, which skips what was trained before by loading
    it whenever the batch sampler is not the plain one.
    """

    def __init__(self, loader: ReplayedLoader) -> None:
        self.loader = loader
        self._batches: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._batches is None:
            self._batches = iter(self.loader)
        batch = next(self._batches, self)
        if batch is self:
            self.loader.set_epoch(self.loader.epoch + 1)
            self._batches = iter(self.loader)
            batch = next(self._batches)
        return batch

    def skip_iter(self, num_iters: int) -> None:
        """Skip the batches of `num_iters` iterations; called before the first batch."""
        self.loader.skip(num_iters)


def rebuilt(loader: DataLoader, options: dict, dataset: Dataset) -> DataLoader:
    """Build a loader again with another data set.

    Args:
        loader: what mmengine built.
        options: the config that it was built from.
        dataset: the data set.
    """
    parts: dict[str, Any] = {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
    if loader.batch_size is None:
        parts = {"batch_sampler": loader.batch_sampler}
    if not isinstance(dataset, IterableDataset) and "batch_sampler" not in parts:
        parts["sampler"] = loader.sampler
    return DataLoader(dataset, **parts, **_shared(loader, options))


def replayed(loader: DataLoader, options: dict, dataset: Sized, seed: int, rank: int) -> DataLoader:
    """Build a loader of training data again, so that it can be replayed.

    A loader without batches (``batch_size=None``), or of a data set that can only be iterated and
    can't be told the epoch, stays as it is but for the data set.

    Args:
        loader: what mmengine built.
        options: the config that it was built from.
        dataset: its data set, or one that stands for it.
        seed: of the run, the same on all ranks.
        rank: of the process.
    """
    shared = _shared(loader, options)
    if isinstance(dataset, IterableDataset):
        if not hasattr(dataset, "seed_stream"):
            return rebuilt(loader, options, dataset)
        dataset.seed_stream(seed, rank)
        size = {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
        return ReplayedLoader(dataset, **size, **shared)
    if loader.batch_sampler is None:
        return rebuilt(loader, options, dataset)
    batches: BatchSampler = SeededBatches(loader.batch_sampler, seed, rank)
    return ReplayedLoader(SeededSamples(dataset), batch_sampler=batches, **shared)


def _shared(loader: DataLoader, options: dict) -> dict[str, Any]:
    """Return the options of PyTorch's DataLoader that do not choose samples."""
    passed = {key: value for key, value in options.items() if key not in PART_OPTIONS}
    return {
        **passed,
        "collate_fn": loader.collate_fn,
        "worker_init_fn": loader.worker_init_fn,
    }

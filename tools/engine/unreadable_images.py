"""Image files that can't be read: skipped and counted in training, an error elsewhere."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from mmengine import fileio
from mmengine.dataset import BaseDataset
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch.utils.data import Dataset

from .errors import RunStopped
from .image_data import TimmImages, TimmStream
from .image_files import decoding_problem, quick_problem, unreadable_message
from .seeding import DelegatingDataset

# The share of a data set's images that a run goes on without.
MAX_SHARE = 0.01
# What mmengine's data sets call the files of a sample.
PATH_KEYS = ("img_path", "seg_map_path")
NUM_LISTED = 20
MAX_REPLACEMENTS = 100


class UnreadableImages:
    """The record of a run's unreadable training images, shared by its processes through a file.

    Args:
        path: the list, one line for each image: its name, a tab, what is wrong.
        num_images: of the data set.
    """

    def __init__(self, path: Path, num_images: int) -> None:
        self.path = path
        self.num_images = num_images
        self.names: set[str] = set()
        self._num_read = 0

    def record(self, name: str, problem: str) -> None:
        """Add an image to the list, once for each process.

        Raises:
            RunStopped: if this process has met more than the run goes on without.
        """
        if name not in self.names:
            self.names.add(name)
            line = f"{name}\t{problem}\n".encode(errors="surrogateescape")
            # One write to a file opened for appending is not mixed with another process's.
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                os.write(descriptor, line)
            finally:
                os.close(descriptor)
        self.check()

    def read_new(self) -> list[tuple[str, str]]:
        """Return the (name, problem) pairs that were listed since the last call."""
        try:
            if self.path.stat().st_size == self._num_read:
                return []
            with open(self.path, "rb") as file:
                file.seek(self._num_read)
                content = file.read()
        except FileNotFoundError:
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self._num_read += len(whole)
        lines = whole.decode(errors="surrogateescape").splitlines()
        pairs = [tuple(line.split("\t", 1)) for line in lines]
        self.names.update(name for name, _ in pairs)
        return pairs

    def check(self) -> None:
        """Raise RunStopped if more images are unreadable than the run goes on without."""
        count = len(self.names)
        if count > MAX_SHARE * self.num_images:
            raise RunStopped(
                f"{count} of {self.num_images} training images ({count / self.num_images:.1%}) "
                f"can't be read so far, such as {min(self.names)}; a run skips {MAX_SHARE:.0%} at "
                f"most. {self.path} lists them with the reasons: repair or remove them, then start "
                "again, with --resume where checkpoints were written"
            )


class ReadableSamples(DelegatingDataset):
    """A data set whose samples with unreadable image files are replaced, or stop the run.

    A sample that fails to load has its files decoded anew, by Pillow. If they are fine the error
    goes through unchanged. Otherwise the file is recorded
    and another sample taken, drawn from Python's generator, which is seeded for the sample.

    JPEG and PNG files of mmengine's data sets that lack their end are found before loading, since
    OpenCV decodes them without an error; so is what a pipeline turns into None.

    Args:
        dataset: the data set, of samples of its own (not one that combines others).
        record: where unreadable images are recorded; None raises at the first one.
    """

    def __init__(self, dataset: Dataset, record: UnreadableImages | None) -> None:
        super().__init__(dataset)
        self.__dict__["_record"] = record

    def __getitem__(self, index: int) -> Any:
        for _ in range(MAX_REPLACEMENTS):
            problem = self._quick_problem(index)
            if problem is None:
                sample, problem = self._load(index)
                if problem is None:
                    return sample
            name, reason = problem
            if self._record is None:
                raise RunStopped(unreadable_message(name, reason))
            self._record.record(name, reason)
            index = random.randrange(len(self._wrapped))
        raise RunStopped(
            f"{MAX_REPLACEMENTS} training images in a row can't be read, such as {name}; "
            f"{self._record.path} lists them: check the folders of the data set"
        )

    def _load(self, index: int) -> tuple[Any, tuple[str, str] | None]:
        """Return the sample, or None with (name, problem) of its unreadable file."""
        dataset = self._wrapped
        try:
            sample = self._load_once(index)
        except Exception:
            problem = self._find_problem(index)
            if problem is None:
                raise
            return None, problem
        if sample is not None:
            return sample, None
        problem = self._find_problem(index)
        # An augmentation found nothing to keep, for which the data set has its own rule.
        return (None, problem) if problem else (dataset[index], None)

    def _load_once(self, index: int) -> Any:
        """Load a sample; None for what a data set of mmengine would replace without a word."""
        dataset = self._wrapped
        if (
            isinstance(dataset, BaseDataset)
            and type(dataset).__getitem__ is BaseDataset.__getitem__
        ):
            return dataset.prepare_data(index)
        return dataset[index]

    def _paths(self, index: int) -> Iterator[str]:
        # Indices of videos are pairs, of which the data set makes its own.
        if hasattr(self._wrapped, "get_data_info") and isinstance(index, (int, np.integer)):
            info = self._wrapped.get_data_info(index)
            for key in PATH_KEYS:
                if isinstance(info.get(key), str):
                    yield info[key]

    def _quick_problem(self, index: int) -> tuple[str, str] | None:
        for path in self._paths(index):
            problem = quick_problem(path)
            if problem:
                return path, problem
        return None

    def _find_problem(self, index: int) -> tuple[str, str] | None:
        """Decode the files of a sample, and return (name, problem) of the first unreadable one."""
        dataset = self._wrapped
        if isinstance(dataset, TimmImages):
            problem = _read_and_decode(lambda: dataset.read_bytes(index))
            return (dataset.name_of(index), problem) if problem else None
        backend = getattr(dataset, "backend_args", None)
        for path in self._paths(index):
            problem = _read_and_decode(lambda path=path: fileio.get(path, backend_args=backend))
            if problem:
                return path, problem
        return None


def _read_and_decode(read: Callable[[], bytes]) -> str | None:
    try:
        content = read()
    except OSError as error:
        return error.strerror or str(error)
    return decoding_problem(content)


def with_readable_samples(dataset: Dataset, record: UnreadableImages | None) -> Dataset:
    """Make the data sets that `dataset` combines, or itself, :class:`ReadableSamples`.

    Those that combine others (mmengine's ConcatDataset, RepeatDataset, mmdet's
    MultiImageMixDataset, ...) are changed in place. A :class:`TimmStream` is told the record.
    """
    if isinstance(dataset, TimmStream):
        dataset.on_unreadable = record.record if record else None
        return dataset
    parts = getattr(dataset, "__dict__", {})
    for name in ("dataset", "_dataset"):
        if _is_combined(parts.get(name)):
            parts[name] = with_readable_samples(parts[name], record)
            return dataset
    if _are_combined(parts.get("datasets")):
        parts["datasets"] = [with_readable_samples(part, record) for part in parts["datasets"]]
        return dataset
    has_samples = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    return ReadableSamples(dataset, record) if has_samples else dataset


def _is_combined(value: object) -> bool:
    """Tell a data set that another one stands on from what else an attribute may hold."""
    return isinstance(value, Dataset) or hasattr(value, "full_init")


def _are_combined(value: object) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(map(_is_combined, value))


def count_images(dataset: Dataset) -> int:
    """Count the images of a data set, each once however often others repeat it."""
    parts = getattr(dataset, "__dict__", {})
    for name in ("dataset", "_dataset"):
        if _is_combined(parts.get(name)):
            return count_images(parts[name])
    if _are_combined(parts.get("datasets")):
        return sum(map(count_images, parts["datasets"]))
    return dataset.images.reader.num_samples if isinstance(dataset, TimmStream) else len(dataset)


class UnreadableImagesHook(Hook):
    """Tell the user of unreadable training images: at the first one, at too many, at the end."""

    priority = "LOWEST"

    def __init__(self, record: UnreadableImages) -> None:
        self.record = record
        self._earlier: set[str] = set()
        self._has_warned = False

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Take over what the run had skipped before it was resumed."""
        if runner._resume:  # not what another run had, whose weights this one starts from
            self._earlier = set(checkpoint.get("densezoo_unreadable", ()))

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keep the names for a resumed run's list."""
        checkpoint["densezoo_unreadable"] = sorted(self._all())

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        """Look for new ones."""
        self._look(runner)

    def after_train(self, runner: Runner) -> None:
        """Print how many images were skipped, and which."""
        self._look(runner)
        names = sorted(self._all())
        if names:
            listed = ", ".join(names[:NUM_LISTED])
            if len(names) > NUM_LISTED:
                listed += f" and {len(names) - NUM_LISTED} more"
            runner.logger.warning(
                f"{len(names)} of {self.record.num_images} training images could not be read and "
                f"were skipped: {listed}; {self.record.path} has the reasons"
            )

    def _all(self) -> set[str]:
        return self._earlier | self.record.names

    def _look(self, runner: Runner) -> None:
        new = self.record.read_new()
        if new and not self._has_warned:
            self._has_warned = True
            name, problem = new[0]
            runner.logger.warning(
                f"training image {name} can't be read ({problem}); another one takes its place. "
                f"All that follow are listed in {self.record.path}"
            )
        self.record.check()

"""timm's image data sets and transforms for mmengine's Runner."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from mmengine.registry import DATASETS, HOOKS
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from ...backbones.registry import register_in_mmengine

if TYPE_CHECKING:
    from mmengine.hooks import Hook

# Readers of timm that can only be iterated, so that no sampler may shuffle them.
STREAMS = ("wds", "tfds", "hfids")
READER_PACKAGES = {
    "wds": "webdataset",
    "hfds": "datasets",
    "hfids": "datasets",
    "tfds": "tensorflow_datasets",
}


def reader_kind(name: str) -> str:
    """Return the reader that a data set name of timm asks for: "wds" of "wds/", "" of a folder."""
    return name.partition("/")[0].lower() if "/" in name else ""


def is_stream(dataset: object) -> bool:
    """Tell whether a data set's config is a :func:`timm_dataset` that can only be iterated."""
    return (
        isinstance(dataset, dict)
        and dataset.get("type") == "TimmDataset"
        and reader_kind(dataset.get("name", "")) in STREAMS
    )


class TimmImages(Dataset):
    """Images of a timm data set with random access; see :func:`timm_dataset`."""

    def __init__(self, images: Dataset, class_names: tuple[str, ...]) -> None:
        self.images = images
        self.metainfo = {"classes": class_names}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        image, label = self.images[index][:2]
        return {"inputs": torch.as_tensor(image), "labels": int(label)}


class TimmStream(IterableDataset):
    """Images of a timm data set that can only be iterated; see :func:`timm_dataset`."""

    def __init__(self, images: IterableDataset, class_names: tuple[str, ...]) -> None:
        self.images = images
        self.metainfo = {"classes": class_names}

    def __len__(self) -> int:
        # In training a reader gives each worker the same number of whole batches, which its own
        # length says; in evaluation that length rounds down, while every image comes.
        reader = self.images.reader
        if reader.is_training:
            return len(reader)
        return reader.num_samples

    def __iter__(self) -> Iterator[dict[str, Tensor | int]]:
        for image, label in self.images:
            yield {"inputs": torch.as_tensor(image), "labels": int(label)}

    def set_epoch(self, epoch: int) -> None:
        """Tell the reader the epoch, from which it derives the order of shards and images."""
        self.images.set_epoch(epoch)


def _class_names(reader: object) -> tuple[str, ...]:
    """Return the names of a reader's classes in the order of their indices; () if it has none."""
    # The attribute's name depends on timm's reader.
    for attribute in ("class_to_idx", "class_name_to_idx"):
        indices = getattr(reader, attribute, None)
        if indices:
            return tuple(sorted(indices, key=indices.get))
    return ()


@register_in_mmengine(DATASETS, "TimmDataset")
def timm_dataset(
    root: str,
    name: str = "",
    split: str = "train",
    *,
    is_training: bool = False,
    input_size: int | tuple[int, int] = 224,
    transform: dict | None = None,
    batch_size: int = 1,
    num_workers: int = 0,
    **options,
) -> TimmImages | TimmStream:
    """Create a data set with ``timm.data.create_dataset`` and ``timm.data.create_transform``.

    Samples are ``dict(inputs=(C, H, W) uint8, labels=int)``: normalising is left to the model's
    preprocessor, random erasing to the classifier, which do both on the device.

    Args:
        root: the folder of class folders (or of one folder for each split), the tar file of class
            folders, or the folder of the shards; for "hfds/" the cache folder.
        name: "" for folders and tar files, "wds/" for WebDataset shards, "hfds/NAME" for Hugging
            Face, and the other prefixes of timm.
        split: a folder under `root`, or what the reader calls a split, for example
            ``"train-{000..127}.tar|1281167"`` of WebDataset shards (with the number of samples).
        is_training: training transforms, and shuffling by readers that only iterate.
        input_size: size of the images in pixels, (height, width) or both at once.
        transform: further arguments of ``timm.data.create_transform``: `scale`, `auto_augment`,
            `interpolation` in training; `crop_pct`, `crop_mode`, `interpolation` in evaluation.
        batch_size: of the loader; only readers that iterate use it, to make whole batches.
        num_workers: of the loader; only readers that iterate use it, to know their length.
            ``densezoo train`` and ``densezoo test`` fill both in.
        options: further arguments of ``timm.data.create_dataset``: `class_map`, `num_samples`,
            `input_key`, `target_key`, `input_img_mode`, ...

    Raises:
        FileNotFoundError: if `root` is not there.
        ImportError: if the reader needs a package that is not installed.
        ValueError: if `root` holds no image, or a reader does not know its number of samples.
    """
    from timm.data import create_dataset, create_transform

    kind = reader_kind(name)
    package = READER_PACKAGES.get(kind)
    if package and importlib.util.find_spec(package) is None:
        raise ImportError(
            f'data sets named "{kind}/" need the package {package}: '
            "pip install 'densezoo[data]' (for tfds: pip install tensorflow-datasets)"
        )
    if kind in ("", "wds") and not os.path.exists(root):
        raise FileNotFoundError(f"the data set's root={root!r} does not exist")
    loads_as_stream = kind in STREAMS
    if loads_as_stream:
        options = {**options, "batch_size": batch_size}
    try:
        images = create_dataset(name, root, split=split, is_training=is_training, **options)
    except RuntimeError as error:
        raise ValueError(f"the data set in root={root!r} (split={split!r}): {error}") from error

    images.transform = create_transform(
        input_size=input_size,
        is_training=is_training,
        normalize=False,
        **(transform or {}),
    )
    class_names = _class_names(getattr(images, "reader", None))
    if not loads_as_stream:
        return TimmImages(images, class_names)
    if not images.reader.num_samples:
        raise ValueError(
            f"the number of samples of root={root!r}, split={split!r} is not known: add it as "
            '"SPLIT|NUMBER", as num_samples=NUMBER, or write an _info.json beside the shards'
        )
    # Without workers the loading process is the one worker that there is.
    images.set_loader_cfg(num_workers=max(1, num_workers))
    return TimmStream(images, class_names)


def fit_stream_loaders(cfg: dict) -> None:
    """Make the loaders of `cfg` fit data sets that only iterate, in place.

    They take no sampler (mmengine's configs must name one), and need to know the loader's batch
    size and number of workers.
    """
    for key in ("train_dataloader", "val_dataloader", "test_dataloader"):
        loader = cfg.get(key)
        if loader and is_stream(loader.get("dataset")):
            loader["sampler"] = None
            loader["dataset"]["batch_size"] = loader["batch_size"]
            loader["dataset"]["num_workers"] = loader.get("num_workers", 0)


@register_in_mmengine(HOOKS, "EpochSeedHook")
def epoch_seed_hook(**options) -> Hook:
    """Build mmengine's DistSamplerSeedHook, made to tell data sets that iterate the epoch too."""
    # mmengine.hooks imports OpenCV, which `import densezoo` is not to pay for.
    from .epoch_hook import EpochSeedHook

    return EpochSeedHook(**options)

"""timm's image data sets and transforms for mmengine's Runner."""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from mmengine.registry import DATASETS
from PIL import Image
from timm.data import auto_augment
from timm.data.readers.shared_count import SharedCount
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from torchvision.transforms import Compose

from ...backbones.registry import register_in_mmengine
from .seeding import SHUFFLE, STREAM, generators_of, mix

if TYPE_CHECKING:
    from .shards import NamedShards
from ...layers.arguments import check_flag, check_mapping, check_whole_number

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

    def __getitem__(self, index: int) -> dict[str, Tensor | int | str]:
        if not hasattr(self.images, "reader"):  # torchvision's data sets
            image, label = self.images[index][:2]
            return {"inputs": torch.as_tensor(image), "labels": int(label)}
        # timm's own way would put the next image in the place of one that can't be read.
        file, label = self.images.reader[index][:2]
        with file, Image.open(file) as image:
            image = image.convert(self.images.input_img_mode or image.mode)
        image = torch.as_tensor(self.images.transform(image))
        label = -1 if label is None else int(label)
        return {"inputs": image, "labels": label, "img_path": self.name_of(index)}

    def name_of(self, index: int) -> str:
        """Name an image: its path, or that in the archive, or its row where it has none."""
        reader = self.images.reader
        if not hasattr(reader, "samples"):
            return f"row {index} of {reader.split}"
        name = reader.filename(index, absolute=True)
        return name if os.path.isabs(name) or os.path.exists(name) else f"{reader.root}: {name}"

    def read_bytes(self, index: int) -> bytes:
        """Read the file of an image, undecoded."""
        with self.images.reader[index][0] as file:
            return file.read()


class TimmStream(IterableDataset):
    """Images of a timm data set that can only be iterated; see :func:`timm_dataset`.

    Attributes:
        epoch: counted by the training loop, known to the workers too.
        on_unreadable: called with the name of an image of a shard that can't be decoded and the
            reason, before it is left out; None raises. A shard that can't be read always does.
    """

    def __init__(
        self, images: IterableDataset, class_names: tuple[str, ...], *, is_sharded: bool = False
    ) -> None:
        self.images = images
        self.metainfo = {"classes": class_names}
        self.on_unreadable: Callable[[str, str], None] | None = None
        self._is_sharded = is_sharded
        self._shards: NamedShards | None = None
        self._epoch = SharedCount()
        self._seed: tuple[int, int] | None = None

    def __len__(self) -> int:
        # In training a reader gives each worker the same number of whole batches, which its own
        # length says; in evaluation that length rounds down, while every image comes.
        reader = self.images.reader
        if reader.is_training:
            return len(reader)
        return reader.num_samples

    def __iter__(self) -> Iterator[dict[str, Tensor | int | str]]:
        info = get_worker_info()
        place = (self.epoch, *(self._seed or (0, 0)), info.id if info else 0)
        images = self._start_reader(place)
        for number in itertools.count():
            with generators_of(STREAM, *place, number) if self._seed else nullcontext():
                image, label = next(images, (None, None))
            if image is None:
                return
            sample = {"inputs": torch.as_tensor(image), "labels": int(label)}
            yield {**sample, "img_path": self._shards.name} if self._shards else sample

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration is of, in whatever process."""
        return self._epoch.value

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, from which the order of shards and images is derived."""
        self._epoch.value = epoch
        self.images.set_epoch(epoch)

    def seed_stream(self, seed: int, rank: int) -> None:
        """Make order and transforms of images a function of (seed, epoch, rank, worker).

        Of the readers of timm this holds for WebDataset shards; of the others it does where they
        draw from the generators of Python, NumPy and torch, or are told the epoch.
        """
        self._seed = (seed, rank)

    def _start_reader(self, place: tuple[int, ...]) -> Iterator[tuple]:
        """Begin an iteration of timm's reader."""
        reader = self.images.reader
        if self._is_sharded:
            from .shards import NamedShards

            seed = mix(SHUFFLE, *place) if self._seed else None
            self._shards = NamedShards(reader, self.on_unreadable, seed)
        return iter(self.images)


def _class_names(reader: object) -> tuple[str, ...]:
    """Return the names of a reader's classes in the order of their indices; () if it has none."""
    # The attribute's name depends on timm's reader.
    for attribute in ("class_to_idx", "class_name_to_idx"):
        indices = getattr(reader, attribute, None)
        if indices:
            return tuple(sorted(indices, key=indices.get))
    return ()


def _posterize(image: Image.Image, bits_to_keep: int, **options) -> Image.Image:
    """Posterize as timm does, with a black image where no bit is kept."""
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits_to_keep, **options)


def _accept_no_bits(transform: Compose) -> None:
    """Let timm's augmentations keep no bit of an image, which Pillow refuses from version 13 on."""
    for step in transform.transforms:
        policies = getattr(step, "policy", None) or [getattr(step, "ops", ())]
        for operation in itertools.chain.from_iterable(policies):
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = _posterize


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

    Samples are ``dict(inputs=(C, H, W) uint8, labels=int, img_path=str)``, the last where the
    reader knows files: normalising is left to the model's preprocessor, random erasing to the
    classifier, which do both on the device.

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

    for key, value in (("name", name), ("split", split), ("root", root)):
        if not isinstance(value, (str, os.PathLike) if key == "root" else str):
            raise ValueError(f"{key} of the data set is {value!r}: text is taken")
    check_flag("is_training of the data set", is_training)
    if isinstance(input_size, (list, tuple)) and len(input_size) != 2:
        raise ValueError(
            f"input_size of the data set is {input_size}: one number of pixels, or two, is taken"
        )
    for number in input_size if isinstance(input_size, (list, tuple)) else [input_size]:
        check_whole_number("input_size of the data set", number, 1)
    check_mapping("transform of the data set", transform or {}, ("input_size", "is_training"))
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
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"the data set in root={root!r} (split={split!r}): {error}") from error

    try:
        images.transform = create_transform(
            input_size=input_size,
            is_training=is_training,
            normalize=False,
            **(transform or {}),
        )
    except (KeyError, TypeError, AssertionError, ValueError) as error:
        raise ValueError(
            f"the transform of the data set in root={root!r} can't be made of {transform}: "
            f"{type(error).__name__}: {error}"
        ) from error
    _accept_no_bits(images.transform)
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
    return TimmStream(images, class_names, is_sharded=kind == "wds")


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

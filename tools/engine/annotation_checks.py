"""Checks of annotations, made once before a run: mmdet and mmseg drop or misread what is wrong.

COCO files (``CocoDataset`` and what derives from it, but not panoptic ones) are read whole, as
plain JSON. These stop the run, because it would crash, or train or measure something else:

- a file that is no JSON, or lacks images, annotations or categories; one without objects;
- an id that two images, annotations or categories share; a category name that two share;
- annotations of images or categories that the file does not have (mmdet drops them);
- classes of the data set that the file has no category for, or has in another order (mmdet numbers
  the classes in the order of the file's categories and names them in that of ``classes``);
- images without a file name, or whose width and height are no positive numbers, or are not those
  of the file, turned as its EXIF data says (of at most 200 files, evenly over the images);
- boxes that are not four finite numbers, or have a negative size, or lie wholly outside the image
  (mmdet drops them); boxes of which more than 10 % reach out of it by more than a pixel, which
  are likely x, y, x, y rather than COCO's x, y, width, height;
- where masks are used: run-length masks of another size than the image;
- for evaluation, image files that are not there (of the same 200).

These are counted in a line of the log, since published data has them and mmdet copes: objects of
less than a pixel in width, height or area (dropped); boxes that reach out of the image by more
than a pixel; where masks are used, objects without a polygon of three points (ignored); for
training, image files that are not there, unless all of the 200 are missing.

Label maps (mmseg's ``BaseSegDataset`` and what derives from it): every image needs its label map.
Of at most 200 pairs, evenly over the images, the sizes are compared; of 50 of them, for at most 10
seconds, the labels are read: each must be a class or the ignored label.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.registry import DATASETS, DefaultScope
from PIL import Image

from .config_files import walk_dicts

MAX_FILES = 200  # whose headers are read
MAX_LABEL_MAPS = 50  # whose labels are read
MAX_SECONDS = 10.0  # of reading labels
MAX_SHARE_OUTSIDE = 0.1  # of boxes that reach out of their image

_LOADERS = {"train": ("train_dataloader", "val_dataloader"), "test": ("test_dataloader",)}
_EXIF_ORIENTATION = 0x0112
_SINGLE_BAND_MODES = ("1", "L", "P", "I", "I;16")


class _Findings:
    """What is wrong with a file: for each kind how often, and the first case of it."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.examples: dict[str, str] = {}

    def add(self, kind: str, example: str) -> None:
        """Count a case of a kind."""
        if kind not in self.counts:
            self.counts[kind], self.examples[kind] = 0, example
        self.counts[kind] += 1

    def describe(self, kind: str) -> str:
        """Say how often and where first."""
        return f"{self.counts[kind]} {kind}, the first: {self.examples[kind]}"


def check_annotations(cfg: dict, task: str) -> list[str]:
    """Check the annotations that a run uses; see this module.

    Args:
        cfg: the config.
        task: "train" (training and validation data) or "test".

    Returns:
        What the log should say: a line for each kind of thing that the run copes with.

    Raises:
        ValueError: naming the file, how much is wrong in it, the first case and what to do.
        FileNotFoundError: images or label maps are not there.
    """
    notes = []
    seen = set()
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope", "mmengine")):
        for loader in _LOADERS[task]:
            if not cfg.get(loader):
                continue
            for _, settings in walk_dicts(cfg[loader]["dataset"]):
                dataset = _build_unread(settings)
                kinds = {cls.__name__ for cls in type(dataset).__mro__}
                has_objects = "CocoDataset" in kinds and "CocoPanopticDataset" not in kinds
                if not has_objects and "BaseSegDataset" not in kinds:
                    continue
                if (getattr(dataset, "backend_args", None) or {}).get(
                    "backend", "local"
                ) != "local":
                    continue  # on a remote store
                is_training = loader == "train_dataloader"
                place = (str(dataset.ann_file), str(dataset.data_prefix), is_training)
                if place in seen or "://" in place[0] + place[1]:
                    continue  # the same once more, or on a remote store
                seen.add(place)
                if has_objects:
                    evaluator = cfg.get(loader.replace("dataloader", "evaluator"))
                    is_measured = not any(
                        metric.get("format_only") for _, metric in walk_dicts(evaluator)
                    )
                    notes += check_coco(dataset, is_training=is_training, is_measured=is_measured)
                else:
                    check_label_maps(dataset)
    return notes


def _build_unread(settings: dict) -> Any:
    """Build a data set without reading its data; None where `settings` are not those of one."""
    if "type" not in settings or not ("ann_file" in settings or "data_prefix" in settings):
        return None
    try:
        return DATASETS.build({**settings, "lazy_init": True})
    except (KeyError, TypeError, AssertionError, AttributeError, ValueError, OSError):
        return None  # building the run says what is wrong with them


def spread(items: Sequence, count: int) -> list:
    """Pick at most `count` items, evenly over all."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def read_size(path: Path) -> tuple[int, int]:
    """Read width and height of an image from its header, turned as its EXIF data says."""
    with Image.open(path) as image:
        # Only where the header has EXIF data: Pillow would read a whole PNG to find some.
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1) if "exif" in image.info else 1
        is_turned = orientation in (5, 6, 7, 8)
        return image.size[::-1] if is_turned else image.size


def check_coco(dataset: Any, *, is_training: bool, is_measured: bool = True) -> list[str]:
    """Check the annotation file of a ``CocoDataset`` whose data was not read.

    Args:
        dataset: built with ``lazy_init=True``.
        is_training: whether images that are not there are left out later on.
        is_measured: whether objects are needed: results may be written without any.

    Returns, Raises:
        as :func:`check_annotations`.
    """
    path = dataset.ann_file
    content = _read_coco(path, needs_objects=is_training or is_measured)
    found = _Findings()
    images = _by_id(content["images"], "images", found)
    categories = _by_id(content["categories"], "categories", found)
    names = [str(category.get("name")) for category in categories.values()]
    for name in names:
        if names.count(name) > 1:
            found.add("categories whose name another one has", f"{name!r}")
    _raise_first(path, found, "give each its own")
    _check_classes(path, names, dataset.metainfo.get("classes") or ())
    sizes = _image_sizes(images, found)
    _raise_first(path, found, "write what is in the image files")
    uses_masks = any(getattr(step, "with_mask", False) for step in dataset.pipeline.transforms)
    notes = _check_objects(content["annotations"], sizes, categories, uses_masks, found)
    if found.counts.get(_REACHING_OUT, 0) > MAX_SHARE_OUTSIDE * len(content["annotations"]):
        raise ValueError(
            f"annotation file {path}: {found.describe(_REACHING_OUT)}; are they x, y, x, y? "
            "COCO's boxes are x, y, width, height"
        )
    for kind, advice in _OBJECT_ERRORS.items():
        if kind in found.counts:
            raise ValueError(f"annotation file {path}: {found.describe(kind)}; {advice}")
    folder = Path(dataset.data_prefix.get("img", ""))
    files = [(folder / i["file_name"], sizes[k]) for k, i in images.items() if "file_name" in i]
    _check_image_files(path, files, is_training, found)
    notes += [kind for kind in (_MISSING_FILES,) if kind in found.counts]
    return [f"annotation file {path}: {found.describe(kind)}" for kind in notes]


_UNKNOWN_IMAGE = "annotations are of images that the file does not have"
_UNKNOWN_CATEGORY = "annotations are of categories that the file does not have"
_DOUBLE_ID = "annotations have the id of another one"
_NO_BOX = "annotations have no box of four finite numbers, or no area"
_NEGATIVE = "boxes have a negative width or height"
_OUTSIDE = "boxes lie outside their image"
_MASK_SIZE = "masks have another size than their image"
_REACHING_OUT = "boxes reach out of their image by more than a pixel"
_TINY = "objects of less than a pixel are not used"
_NO_POLYGON = "objects have no polygon of three points and are ignored"
_MISSING_FILES = f"of at most {MAX_FILES} image files that were looked for are not there"

# What stops a run, and what to do about it.
_OBJECT_ERRORS = {
    _UNKNOWN_IMAGE: "remove them, or write the images' ids as they are in images",
    _UNKNOWN_CATEGORY: "remove them, or add the categories",
    _DOUBLE_ID: "number the annotations anew",
    _NO_BOX: "write x, y, width, height in pixels, and area",
    _NEGATIVE: "write x, y, width, height in pixels",
    _OUTSIDE: "remove them, or correct the boxes or the image's width and height",
    _MASK_SIZE: "write size as [height, width] of the image",
}


def _read_coco(path: str, *, needs_objects: bool) -> dict:
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(
            f"annotation file {path} is not JSON ({error}); give a COCO file, or load it anew"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"annotation file {path} holds a {type(content).__name__}; give a COCO file, which "
            "holds images, annotations and categories"
        )
    if not needs_objects:
        content.setdefault("annotations", [])
    for key in ("images", "annotations", "categories"):
        part = content.get(key)
        if not isinstance(part, list) or not all(isinstance(entry, dict) for entry in part):
            raise ValueError(
                f"annotation file {path} has no list of {key}; give a COCO file, which holds "
                "images, annotations and categories"
            )
        if not part and (needs_objects or key != "annotations"):
            raise ValueError(f"annotation file {path} has no {key}; give one that has some")
    return content


def _by_id(entries: Iterable[dict], what: str, found: _Findings) -> dict:
    """Index entries by id, noting what has none, or one of another."""
    indexed: dict = {}
    for position, entry in enumerate(entries):
        identity = entry.get("id")
        if not isinstance(identity, (int, str)):
            found.add(f"{what} have no id", f"number {position}")
        elif identity in indexed:
            found.add(f"{what} have the id of another one", f"id {identity}")
        indexed[identity if isinstance(identity, (int, str)) else None] = entry
    return indexed


def _raise_first(path: str, found: _Findings, advice: str) -> None:
    for kind in found.counts:
        raise ValueError(f"annotation file {path}: {found.describe(kind)}; {advice}")


def _check_classes(path: str, names: Sequence[str], classes: Sequence[str]) -> None:
    """Check that the file has the data set's classes, in their order."""
    if len(set(classes)) < len(classes):
        raise ValueError(f"metainfo.classes has a name twice: {', '.join(classes)}")
    missing = [name for name in classes if name not in names]
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    if missing:
        raise ValueError(
            f"annotation file {path} lacks {len(missing)} of {len(classes)} classes of the data "
            f"set, such as {missing[0]!r}; set metainfo.classes to those that the file has: {shown}"
        )
    in_file = [name for name in names if name in classes]
    if in_file != list(classes):
        k = next(i for i, pair in enumerate(zip(in_file, classes, strict=True)) if len({*pair}) > 1)
        raise ValueError(
            f"annotation file {path} has its categories in another order than metainfo.classes "
            f"(number {k} is {in_file[k]!r} there and {classes[k]!r} here), so that labels would "
            f"get wrong names; set metainfo.classes in the order of the file: {shown}"
        )


def _image_sizes(images: dict, found: _Findings) -> dict:
    """Give width and height by image id, noting images that say neither or have no file name."""
    sizes = {}
    for identity, image in images.items():
        width, height = image.get("width"), image.get("height")
        if not all(type(n) in (int, float) and 0 < n < float("inf") for n in (width, height)):
            found.add(
                "images have no width and height of at least a pixel",
                f"id {identity} with {width} x {height}",
            )
        elif not isinstance(image.get("file_name", image.get("coco_url")), str):
            found.add("images have no file_name", f"id {identity}")
        sizes[identity] = (width, height)
    return sizes


def _check_objects(
    annotations: Iterable[dict], sizes: dict, categories: dict, uses_masks: bool, found: _Findings
) -> list[str]:
    """Count what is wrong with the objects; return the kinds that the run copes with."""
    identities = set()
    for annotation in annotations:
        identity, image = annotation.get("id"), annotation.get("image_id")
        if identity in identities:
            found.add(_DOUBLE_ID, f"id {identity}")
        identities.add(identity)
        size = sizes.get(image)
        if size is None:
            found.add(_UNKNOWN_IMAGE, f"id {identity} of image_id {image!r}")
            continue
        if annotation.get("category_id") not in categories:
            found.add(
                _UNKNOWN_CATEGORY,
                f"id {identity} of image_id {image!r}, category_id "
                f"{annotation.get('category_id')!r}",
            )
        try:
            x, y, width, height = annotation["bbox"]
            is_finite = isfinite(x + y + width + height) and isfinite(annotation["area"])
        except (KeyError, TypeError, ValueError):
            is_finite = False
        if not is_finite:
            found.add(_NO_BOX, f"id {identity} with bbox {annotation.get('bbox')}")
            continue
        kind = _classify_box(x, y, width, height, size, annotation["area"])
        if kind and not annotation.get("ignore"):
            found.add(
                kind,
                f"id {identity} with bbox {annotation['bbox']} of image_id {image!r}, which has "
                f"{size[0]} x {size[1]} pixels",
            )
        if uses_masks:
            _check_mask(annotation.get("segmentation"), size, identity, found)
    return [kind for kind in (_TINY, _REACHING_OUT, _NO_POLYGON) if kind in found.counts]


def _classify_box(
    x: float, y: float, width: float, height: float, size: tuple[int, int], area: float
) -> str | None:
    """Say what is wrong with a box, in pixels, of an image of `size` (width, height)."""
    if width < 0 or height < 0:
        return _NEGATIVE
    if width < 1 or height < 1 or area <= 0:
        return _TINY
    if x >= size[0] or y >= size[1] or x + width <= 0 or y + height <= 0:
        return _OUTSIDE
    if x < -1 or y < -1 or x + width > size[0] + 1 or y + height > size[1] + 1:
        return _REACHING_OUT
    return None


def _check_mask(mask: Any, size: tuple[int, int], identity: Any, found: _Findings) -> None:
    if isinstance(mask, dict):
        if mask.get("size") != [size[1], size[0]]:
            found.add(
                _MASK_SIZE,
                f"id {identity} with size {mask.get('size')}, where the image has "
                f"[{size[1]}, {size[0]}]",
            )
    elif not isinstance(mask, list) or not any(
        isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0
        for polygon in mask
    ):
        found.add(_NO_POLYGON, f"id {identity}")


def _check_image_files(
    path: str, files: Sequence[tuple[Path, tuple]], is_training: bool, found: _Findings
) -> None:
    """Compare the sizes that a file says with those of some of its images."""
    sample = spread(files, MAX_FILES)
    for file, size in sample:
        try:
            actual = read_size(file)
        except FileNotFoundError:
            found.add(_MISSING_FILES, str(file))
            continue
        except (OSError, Image.DecompressionBombError):
            continue  # damaged: the run counts and names those
        if actual != tuple(size):
            raise ValueError(
                f"annotation file {path} gives {size[0]} x {size[1]} pixels to {file}, which has "
                f"{actual[0]} x {actual[1]}, turned as its EXIF data says; correct the file, "
                "its boxes may be wrong too"
            )
    missing = found.counts.get(_MISSING_FILES, 0)
    if missing and (missing == len(sample) or not is_training):
        raise FileNotFoundError(
            f"annotation file {path}: {missing} of {len(sample)} of its images that were looked "
            f"for are not there, the first: {found.examples[_MISSING_FILES]}; check "
            "data_prefix.img, or remove them from the file"
        )


def check_label_maps(dataset: Any) -> None:
    """Check the label maps of a ``BaseSegDataset`` built with ``lazy_init=True``, if it has any.

    Raises:
        as :func:`check_annotations`.
    """
    folder = dataset.data_prefix.get("seg_map_path")
    if not folder:
        return
    pairs = [(Path(i["img_path"]), Path(i["seg_map_path"])) for i in dataset.load_data_list()]
    present = {Path(root, name) for root, name in _walk_files(Path(folder))}
    missing = [pair for pair in pairs if pair[1] not in present and not pair[1].is_file()]
    if missing:
        image, label_map = missing[0]
        raise FileNotFoundError(
            f"{len(missing)} of {len(pairs)} images in {dataset.data_prefix.get('img_path')} have "
            f"no label map, the first: {image} needs {label_map}; check "
            "data_prefix.seg_map_path and seg_map_suffix, or remove the images"
        )
    sample = spread(pairs, MAX_FILES)
    for image, label_map in sample:
        _check_pair(image, label_map)
    classes = dataset.metainfo.get("classes")
    if classes and dataset.label_map is None:
        label_maps = [pair[1] for pair in spread(sample, MAX_LABEL_MAPS)]
        _check_labels(label_maps, len(classes), dataset)


def _walk_files(folder: Path) -> Iterable[tuple[str, str]]:
    for root, _, names in os.walk(folder):
        yield from ((root, name) for name in names)


def _check_pair(image: Path, label_map: Path) -> None:
    """Check that a label map has one band, and the size of its image."""
    try:
        size = read_size(image)
    except (OSError, Image.DecompressionBombError):
        return  # damaged: the run counts and names those
    try:
        with Image.open(label_map) as opened:
            mode, label_size = opened.mode, opened.size
    except OSError as error:
        raise ValueError(
            f"label map {label_map} can't be read ({error}); replace it, or remove it with its "
            "image"
        ) from error
    if mode not in _SINGLE_BAND_MODES:
        raise ValueError(
            f"label map {label_map} is a picture of mode {mode}; write one with a label a pixel "
            "(mode L or P)"
        )
    if label_size != size:
        raise ValueError(
            f"label map {label_map} has {label_size[0]} x {label_size[1]} pixels and its image "
            f"{image} has {size[0]} x {size[1]}, turned as its EXIF data says; they must be equal"
        )


def _check_labels(label_maps: Sequence[Path], num_classes: int, dataset: Any) -> None:
    """Check that each label is a class, or ignored."""
    start = time.monotonic()
    # With reduce_zero_label the file's 0 is ignored, and 1 is the first class.
    highest = num_classes if dataset.reduce_zero_label else num_classes - 1
    for path in label_maps:
        if time.monotonic() - start > MAX_SECONDS:
            return
        with Image.open(path) as opened:
            labels = np.unique(np.asarray(opened))
        odd = labels[(labels > highest) & (labels != dataset.ignore_index) & (labels != 255)]
        if len(odd):
            raise ValueError(
                f"label map {path} has the label {odd[0]}; {num_classes} classes have the labels "
                f"up to {highest} in a file (reduce_zero_label={dataset.reduce_zero_label}), and "
                f"{dataset.ignore_index} is ignored; correct the file, metainfo.classes or "
                "reduce_zero_label"
            )

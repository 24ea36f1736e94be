"""``densezoo data``: real digits on real photographs, as one data set in three formats.

The pictures come with scikit-learn, so nothing is downloaded: 1797 handwritten digits of 8 x 8
pixels (E. Alpaydin and C. Kaynak, 1998, UCI repository) and two photographs. A *scene* is a crop
of a photograph with a few digits painted on it. The scenes are written once and annotated twice,
as COCO instances and as semantic masks; the class folders hold a crop of every digit in them::

    DIR/images/{train,val}/000001.jpg              scenes
    DIR/annotations/instances_{train,val}.json     COCO instances: boxes and masks (RLE)
    DIR/masks/{train,val}/000001.png               class of each pixel, 255 where it is ignored
    DIR/classes/{train,val}/digit_0/000001_2.jpg   crop of annotation 2 of scene 1
    DIR/densezoo-data.json                         the arguments it was made with

The held-out split (``val``) shares no digit with the training split and takes its backgrounds
from another part of the photographs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

EXAMPLE = "densezoo data make digits --images 800 --size 128"

CLASSES = tuple(f"digit_{digit}" for digit in range(10))
SEGMENTATION_CLASSES = ("background", *CLASSES)
IGNORE_INDEX = 255
MARKER = "densezoo-data.json"

_FORMAT = 1  # raised when the same arguments come to give other files
_MIN_IMAGES = 16  # four held-out scenes of at least three digits show every class
_MIN_SIZE, _MAX_SIZE = 32, 1024
_MIN_DIGITS, _MAX_DIGITS = 3, 5  # per scene
_HELD_OUT = 0.2  # of each class's digits
_HELD_OUT_COLUMN = 0.3  # a photograph's columns left of this fraction are for held-out scenes
_MIN_CONTRAST = 96  # between a digit's luminance and the mean luminance under it, of 255
_LUMINANCE = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


@dataclass
class _Digit:
    """One painted digit: its index in load_digits, its class and its pixels in the scene."""

    index: int
    label: int
    mask: np.ndarray  # (size, size), bool


@dataclass
class _Scene:
    """One scene: picture (size, size, 3) and labels (size, size), both uint8."""

    picture: np.ndarray
    labels: np.ndarray
    digits: list[_Digit]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``densezoo data``."""
    subparsers = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    make = subparsers.add_parser(
        "make",
        help="write the data set into a folder",
        description="Write the data set into a folder, in the formats of the three tasks.",
        epilog=f"example:\n  {EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    make.add_argument("dir", metavar="DIR", help="folder to write, which must not exist")
    make.add_argument("--seed", type=int, default=0, help="same seed, same files (default: 0)")
    make.add_argument(
        "--images",
        type=int,
        default=800,
        help=f"training scenes, at least {_MIN_IMAGES}; a quarter as many are held out "
        "(default: 800)",
    )
    make.add_argument(
        "--size",
        type=int,
        default=128,
        help=f"side of a scene in pixels, {_MIN_SIZE} to {_MAX_SIZE}; class folders hold crops "
        "of half of it (default: 128)",
    )


def run(args: argparse.Namespace) -> None:
    """Run ``densezoo data make``."""
    out_dir = make_dataset(args.dir, seed=args.seed, images=args.images, size=args.size)
    print(f"{out_dir}: {args.images} training and {args.images // 4} held-out scenes")


def make_dataset(
    out_dir: str | os.PathLike, *, seed: int = 0, images: int = 800, size: int = 128
) -> Path:
    """Write the data set, unless the folder already holds the one with these arguments.

    Args:
        out_dir: Folder to write. It may exist only when it is empty or holds this very data set,
            which is then left as it is.
        seed: Equal arguments give byte-identical files (with the same Pillow and NumPy).
        images: Scenes in the training split; the held-out split has ``images // 4``.
        size: Side of a scene in pixels; the crops in the class folders have ``size // 2``.

    Returns:
        The folder.

    Raises:
        ValueError: An argument is out of its range.
        FileExistsError: The folder holds anything else.
        ImportError: scikit-learn is not installed.
    """
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must be 0 or more")
    if images < _MIN_IMAGES:
        raise ValueError(f"images is {images}; at least {_MIN_IMAGES} training scenes are needed")
    if not _MIN_SIZE <= size <= _MAX_SIZE:
        raise ValueError(f"size is {size}; it must be {_MIN_SIZE} to {_MAX_SIZE} pixels")
    out_dir = Path(out_dir)
    arguments = {"format": _FORMAT, "seed": seed, "images": images, "size": size}
    if _is_made(out_dir, arguments):
        return out_dir

    out_dir.parent.mkdir(parents=True, exist_ok=True)
    # Written beside it and renamed, so that an interrupted run leaves no half of a data set.
    partial = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    try:
        digits, targets, photos = _load_sources()
        train, held_out = _split_digits(targets, seed)
        with tqdm(total=images + images // 4, desc="data", unit="scene", disable=None) as progress:
            for split, indices, count in (
                ("train", train, images),
                ("val", held_out, images // 4),
            ):
                rng = np.random.default_rng([seed, int(split == "val")])
                backgrounds = [_background_region(photo, split) for photo in photos]
                deck = _deal(indices, targets, rng)
                scenes = (
                    _paint_scene(rng, backgrounds, deck, digits, targets, size)
                    for _ in range(count)
                )
                _write_split(partial, split, scenes, size, progress)
        _write_json(partial / MARKER, arguments)
        partial.chmod(0o755)  # mkdtemp makes it private
        os.replace(partial, out_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out_dir


def _is_made(out_dir: Path, arguments: dict) -> bool:
    """Say whether the folder holds this data set already; raise when it holds anything else."""
    if not out_dir.exists():
        return False
    if not out_dir.is_dir():
        raise FileExistsError(f"{out_dir} is a file; choose another folder")
    if not any(out_dir.iterdir()):
        return False
    marker = out_dir / MARKER
    if not marker.is_file():
        raise FileExistsError(
            f"{out_dir} is not empty and was not written by 'densezoo data make' "
            f"(it has no {MARKER}); choose another folder"
        )
    try:
        found = json.loads(marker.read_text())
    except json.JSONDecodeError as error:
        raise FileExistsError(f"{marker} is damaged; delete {out_dir} or choose another") from error
    if found != arguments:
        raise FileExistsError(
            f"{out_dir} holds a data set made with {found}, not {arguments}; delete it or choose "
            "another folder"
        )
    return True


def _load_sources() -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Load digits (1797, 8, 8) of 0 to 16, their classes (1797,), photographs (H, W, 3) uint8."""
    try:
        from sklearn.datasets import load_digits, load_sample_images
    except ImportError as error:
        raise ImportError(
            "the data set needs scikit-learn: pip install 'densezoo[demo]'"
        ) from error
    source = load_digits()
    return source.images, source.target, load_sample_images().images


def _split_digits(targets: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split the digits' indices at random into training and held-out ones, class by class."""
    rng = np.random.default_rng(seed)
    train, held_out = [], []
    for label in range(len(CLASSES)):
        indices = rng.permutation(np.flatnonzero(targets == label))
        first_held_out = round(len(indices) * (1 - _HELD_OUT))
        train.append(indices[:first_held_out])
        held_out.append(indices[first_held_out:])
    return np.concatenate(train), np.concatenate(held_out)


def _background_region(photo: np.ndarray, split: str) -> np.ndarray:
    """Return the columns of a photograph (H, W, 3) that a split may use."""
    border = round(photo.shape[1] * _HELD_OUT_COLUMN)
    return photo[:, border:] if split == "train" else photo[:, :border]


def _deal(indices: np.ndarray, targets: np.ndarray, rng: np.random.Generator) -> Iterator[int]:
    """Yield digits for ever, so that ten in a row show every class once.

    A class's digits are all dealt before one of them is dealt again.
    """
    piles: list[list[int]] = [[] for _ in CLASSES]
    while True:
        for label in rng.permutation(len(CLASSES)):
            if not piles[label]:
                piles[label] = list(rng.permutation(indices[targets[indices] == label]))
            yield int(piles[label].pop())


def _paint_scene(
    rng: np.random.Generator,
    backgrounds: list[np.ndarray],
    deck: Iterator[int],
    digits: np.ndarray,
    targets: np.ndarray,
    size: int,
) -> _Scene:
    """Paint three to five digits on a crop of a photograph."""
    picture = _crop_background(rng, backgrounds, size)
    labels = np.zeros((size, size), np.uint8)
    painted = []
    for top, left, height, width in _place_boxes(rng, size):
        index = next(deck)
        opacity = _render_digit(rng, digits[index], height, width)
        window = (slice(top, top + height), slice(left, left + width))
        colour = _contrasting_colour(rng, picture[window])
        picture[window] += opacity[..., None] * (colour - picture[window])
        # As in PASCAL VOC, the blurred border belongs neither to the object nor to the ground.
        labels[window][opacity > 0.1] = IGNORE_INDEX
        labels[window][opacity >= 0.5] = targets[index] + 1
        mask = np.zeros((size, size), bool)
        mask[window] = opacity >= 0.5
        painted.append(_Digit(index, int(targets[index]), mask))
    return _Scene(picture.round().astype(np.uint8), labels, painted)


def _crop_background(
    rng: np.random.Generator, backgrounds: list[np.ndarray], size: int
) -> np.ndarray:
    """Crop a square of 80 to 160 pixels, resize it to (size, size, 3), maybe flip it."""
    region = backgrounds[rng.integers(len(backgrounds))]
    side = int(rng.integers(80, 161))
    top = rng.integers(region.shape[0] - side + 1)
    left = rng.integers(region.shape[1] - side + 1)
    crop = Image.fromarray(region[top : top + side, left : left + side])
    picture = np.asarray(crop.resize((size, size), Image.Resampling.BICUBIC), np.float64)
    if rng.random() < 0.5:
        picture = picture[:, ::-1]
    return picture * rng.uniform(0.7, 1.0)


def _place_boxes(rng: np.random.Generator, size: int) -> list[tuple[int, int, int, int]]:
    """Choose three to five boxes (top, left, height, width) in pixels that do not overlap."""
    while True:
        wanted = rng.integers(_MIN_DIGITS, _MAX_DIGITS + 1)
        boxes: list[tuple[int, int, int, int]] = []
        for _ in range(20 * wanted):
            height = int(round(size * rng.uniform(0.22, 0.45)))
            width = int(round(height * rng.uniform(0.75, 1.0)))
            top = int(rng.integers(size - height + 1))
            left = int(rng.integers(size - width + 1))
            is_free = all(
                top >= other_top + other_height
                or other_top >= top + height
                or left >= other_left + other_width
                or other_left >= left + width
                for other_top, other_left, other_height, other_width in boxes
            )
            if is_free:
                boxes.append((top, left, height, width))
            if len(boxes) == wanted:
                return boxes
        if len(boxes) >= _MIN_DIGITS:
            return boxes


def _render_digit(
    rng: np.random.Generator, digit: np.ndarray, height: int, width: int
) -> np.ndarray:
    """Enlarge a digit (8, 8) to opacities (height, width) of 0 to 1, turned by up to 15 degrees."""
    # A border of one pixel lets the strokes fade out inside of the box.
    bordered = Image.fromarray(np.pad(digit, 1).astype(np.float32))
    enlarged = bordered.resize((width, height), Image.Resampling.BICUBIC)
    turned = enlarged.rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC)
    # Ink runs from 0 to 16: what is fainter than 3 is paper, what is stronger than 9 is full.
    return np.clip((np.asarray(turned, np.float64) - 3) / 6, 0, 1)


def _contrasting_colour(rng: np.random.Generator, patch: np.ndarray) -> np.ndarray:
    """Draw a colour (3,) whose luminance stands out from the mean of a patch (H, W, 3)."""
    luminance = patch.mean(axis=(0, 1)) @ _LUMINANCE
    while True:
        colour = rng.uniform(0, 255, 3)
        if abs(colour @ _LUMINANCE - luminance) >= _MIN_CONTRAST:
            return colour


def _write_split(
    out_dir: Path, split: str, scenes: Iterator[_Scene], size: int, progress: tqdm
) -> None:
    """Write a split's scenes with their annotations in the three formats."""
    image_dir, mask_dir, class_dir = (
        out_dir / kind / split for kind in ("images", "masks", "classes")
    )
    for folder in (image_dir, mask_dir, *(class_dir / name for name in CLASSES)):
        folder.mkdir(parents=True)
    images, annotations = [], []
    for image_id, scene in enumerate(scenes, start=1):
        stem = f"{image_id:06d}"
        picture = Image.fromarray(scene.picture)
        _write_jpeg(picture, image_dir / f"{stem}.jpg")
        Image.fromarray(scene.labels).save(mask_dir / f"{stem}.png")
        images.append({"id": image_id, "file_name": f"{stem}.jpg", "width": size, "height": size})
        for position, digit in enumerate(scene.digits):
            box = _tight_box(digit.mask)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": digit.label + 1,
                    "bbox": box,
                    "area": int(digit.mask.sum()),
                    "segmentation": _encode_rle(digit.mask),
                    "iscrowd": 0,
                    "digit_index": digit.index,
                }
            )
            crop = picture.crop(_context_window(box, size))
            crop = crop.resize((size // 2, size // 2), Image.Resampling.BICUBIC)
            _write_jpeg(crop, class_dir / CLASSES[digit.label] / f"{stem}_{position}.jpg")
        progress.update()
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)]
    _write_json(
        out_dir / "annotations" / f"instances_{split}.json",
        {"images": images, "annotations": annotations, "categories": categories},
    )


def _tight_box(mask: np.ndarray) -> list[int]:
    """Return the smallest COCO box (left, top, width, height) around a mask (H, W)."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    left, top = int(columns[0]), int(rows[0])
    return [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1]


def _encode_rle(mask: np.ndarray) -> dict:
    """Encode a mask (H, W) as COCO's uncompressed run lengths.

    The runs go down the columns and alternate between outside and inside, outside first.
    """
    pixels = mask.flatten(order="F")
    borders = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    runs = np.diff(np.concatenate([[0], borders, [pixels.size]])).tolist()
    counts = [0, *runs] if pixels[0] else runs
    return {"size": list(mask.shape), "counts": counts}


def _context_window(box: list[int], size: int) -> tuple[int, int, int, int]:
    """Return a square (left, top, right, bottom) around a box, a fifth wider on each side.

    It is moved inside of the scene where it would leave it.
    """
    left, top, width, height = box
    side = min(size, round(1.4 * max(width, height)))
    left = min(max(left + (width - side) // 2, 0), size - side)
    top = min(max(top + (height - side) // 2, 0), size - side)
    return left, top, left + side, top + side


def _write_jpeg(picture: Image.Image, path: Path) -> None:
    """Write a picture at a quality that keeps the edges of digits, colour in full resolution."""
    picture.save(path, quality=95, subsampling=0)


def _write_json(path: Path, content: dict) -> None:
    """Write JSON, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    from .cli import run_module

    run_module("data")

"""``densezoo predict``: what a checkpoint says of images, drawn on them.

Boxes (and masks, where the detector has them), the class of each pixel, or the most probable
classes of the whole image: the config's model decides which.
"""

from __future__ import annotations

import argparse
import colorsys
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from tqdm import tqdm

if TYPE_CHECKING:
    from torch import nn

EXAMPLE = (
    "densezoo predict retinanet_cas_vit_xs_fpn_1x_coco work_dirs/coco/epoch_12.pth street.jpg "
    "--out drawn"
)

_MIN_SIDE = 384  # pixels; smaller pictures are enlarged, so that their labels can be read
_NEAREST = Image.Resampling.NEAREST
_TOP_CLASSES = 5
_FONT_SIZE = 15  # pixels
_CAPTION_HEIGHT = _FONT_SIZE + 5  # pixels


@dataclass
class Detections:
    """Objects that a detector found.

    Attributes:
        boxes: (N, 4), left, top, right and bottom in pixels of the image.
        labels: (N,), class indices.
        scores: (N,), 0 to 1; None for annotated objects.
        masks: (N, H, W), bool; None where only boxes are known.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray | None = None
    masks: np.ndarray | None = None

    def above(self, score_thr: float) -> Detections:
        """Return the detections whose score is at least `score_thr`."""
        return self.take(self.scores >= score_thr)

    def take(self, which: np.ndarray) -> Detections:
        """Return the detections that an array of indices or of N bools selects."""
        return Detections(
            self.boxes[which],
            self.labels[which],
            None if self.scores is None else self.scores[which],
            None if self.masks is None else self.masks[which],
        )


@dataclass
class LabelMap:
    """The class of each pixel: labels (H, W), indices; others than the classes' are not drawn."""

    labels: np.ndarray


@dataclass
class ClassScores:
    """The probabilities of the classes of an image: scores (num_classes,)."""

    scores: np.ndarray


Prediction = Detections | LabelMap | ClassScores


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``densezoo predict``."""
    parser.add_argument("config", metavar="CONFIG", help="a config file, or the name of one")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint of its model")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image files")
    parser.add_argument(
        "--out",
        metavar="DIR",
        default="predictions",
        help="folder of the drawn images (default: predictions)",
    )
    parser.add_argument(
        "--score-thr",
        type=float,
        default=0.3,
        help="draw detections with at least this score, 0 to 1 (default: 0.3)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace pictures that are in --out already"
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="change the config, as in training",
    )


def run(args: argparse.Namespace) -> None:
    """Run ``densezoo predict``."""
    if not 0 <= args.score_thr <= 1:
        raise ValueError(f"--score-thr is {args.score_thr}; it must be from 0 to 1")
    paths = [Path(path) for path in args.images]
    pictures = plan_pictures(paths, Path(args.out), overwrite=args.overwrite)
    predictor = Predictor(args.config, args.checkpoint, cfg_options=args.cfg_options)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    progress = tqdm(zip(paths, pictures, strict=True), total=len(paths), disable=None)
    for path, picture in progress:
        image = read_image(path)
        prediction = predictor(image)
        if isinstance(prediction, Detections):
            prediction = prediction.above(args.score_thr)
        draw(image, prediction, predictor.classes, predictor.palette).save(picture)
        tqdm.write(f"{path}: {describe(prediction, predictor.classes)} -> {picture}")


def plan_pictures(paths: Sequence[Path], out_dir: Path, *, overwrite: bool) -> list[Path]:
    """Name the picture of each image, before any work is done.

    Raises:
        FileNotFoundError: An image does not exist.
        FileExistsError: A picture exists (and `overwrite` is false), or `out_dir` is a file.
        ValueError: Two images would be drawn into one picture, or a picture is the image itself.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise FileExistsError(f"--out {out_dir} is a file; name a folder")
    sources: dict[Path, Path] = {}
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"image {path} does not exist or is not a file")
        picture = out_dir / f"{path.stem}.png"
        if picture in sources:
            raise ValueError(
                f"{sources[picture]} and {path} would both be drawn into {picture}; predict them "
                "into two folders"
            )
        if picture.exists() and picture.samefile(path):
            raise ValueError(f"{picture} is the image itself; choose another folder with --out")
        if picture.exists() and not overwrite:
            raise FileExistsError(f"{picture} exists; pass --overwrite or another --out")
        sources[picture] = path
    return list(sources)


def read_image(path: str | os.PathLike) -> Image.Image:
    """Read an image as RGB, turned upright as its EXIF data says.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not an image that Pillow can read, or is damaged.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not an image") from error
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        # Pillow's PNG reader raises SyntaxError.
        raise ValueError(f"{path} can't be read: {error}") from error


class Predictor:
    """A config's model with the weights of a checkpoint, ready for one image after another.

    Args:
        config: Path or name of a config.
        checkpoint: A checkpoint of ``densezoo train``; for a classifier also a published one.
        cfg_options: ``KEY=VALUE`` options, as in training.

    Attributes:
        classes: Names of the classes, from the checkpoint if it says them.
        palette: A colour (red, green, blue), 0 to 255, for each class.

    Raises:
        FileNotFoundError: The config or the checkpoint does not exist.
        ValueError: One of them can't be read, or they do not belong together.
    """

    def __init__(
        self, config: str, checkpoint: str | os.PathLike, *, cfg_options: Sequence[str] = ()
    ) -> None:
        import torch
        from mmengine.model import revert_sync_batchnorm
        from mmengine.registry import DATASETS, MODELS, init_default_scope

        from ..backbones.checkpoints import read_checkpoint
        from .engine.config_files import load_config, walk_dicts

        cfg = load_config(config, cfg_options)
        weights = read_checkpoint(checkpoint)
        init_default_scope(cfg.get("default_scope", "mmengine"))
        try:
            self.model = revert_sync_batchnorm(MODELS.build(cfg.model))
        except (KeyError, TypeError, AssertionError, AttributeError) as error:
            reason = error.args[0] if error.args else type(error).__name__
            raise ValueError(f"the model of {config} can't be built: {reason}") from error
        self._load(weights, checkpoint)
        self.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

        dataset = next(
            part
            for _, part in walk_dicts(cfg.test_dataloader.dataset)
            if "pipeline" in part or part["type"] == "TimmDataset"
        )
        self._transform = (
            _classifier_transform(dataset)
            if dataset["type"] == "TimmDataset"
            else _dense_transform(dataset["pipeline"])
        )
        known = {
            **getattr(DATASETS.get(dataset["type"]), "METAINFO", {}),
            **(dataset.get("metainfo") or {}),
            **weights.get("meta", {}).get("dataset_meta", {}),
        }
        self.classes = _class_names(known.get("classes"), self.model)
        palette = known.get("palette")
        is_usable = isinstance(palette, Sequence) and len(palette) == len(self.classes)
        self.palette = (
            [tuple(int(value) for value in colour) for colour in palette]
            if is_usable and not isinstance(palette, str)
            else make_palette(len(self.classes))
        )

    def _load(self, checkpoint: dict, path: str | os.PathLike) -> None:
        """Load the weights, and see that they are this model's."""
        from .engine import checks

        weights = checkpoint.get("state_dict", checkpoint)
        weights = {key.removeprefix("module."): value for key, value in weights.items()}
        is_bare = not any(key.startswith("backbone.") for key in weights)
        if is_bare and hasattr(self.model, "load_backbone"):
            self.model.load_backbone(str(path))
            return
        checks.check_checkpoint(self.model, checkpoint, path)
        # Not strict, since old checkpoints lack counters that are of no use here.
        self.model.load_state_dict(weights, strict=False)

    def __call__(self, image: Image.Image) -> Prediction:
        """Predict what is on an RGB image of any size."""
        import torch

        with torch.no_grad():
            result = self.model.test_step(self._transform(image))[0]
        if isinstance(result, dict):
            return ClassScores(result["pred_scores"].cpu().numpy())
        if "pred_sem_seg" in result:
            return LabelMap(result.pred_sem_seg.data[0].cpu().numpy())
        found = result.pred_instances.cpu()
        masks = found.masks.numpy().astype(bool) if "masks" in found else None
        return Detections(found.bboxes.numpy(), found.labels.numpy(), found.scores.numpy(), masks)


def _classifier_transform(dataset: dict) -> Callable[[Image.Image], dict]:
    """Build what turns an image into a batch of one for the classifier."""
    from timm.data import create_transform
    from torch import as_tensor

    transform = create_transform(
        input_size=dataset.get("input_size", 224),
        is_training=False,
        normalize=False,
        **(dataset.get("transform") or {}),
    )
    return lambda image: {"inputs": as_tensor(transform(image))[None]}


def _dense_transform(steps: Sequence[dict]) -> Callable[[Image.Image], dict]:
    """Build what turns an image into a batch of one for a detector or a segmenter."""
    from mmengine.dataset import Compose

    steps = [dict(step) for step in steps if step["type"].split(".")[-1] != "LoadAnnotations"]
    steps[0]["type"] = steps[0]["type"].replace("LoadImageFromFile", "LoadImageFromNDArray")
    pipeline = Compose(steps)

    def transform(image: Image.Image) -> dict:
        data = pipeline({"img": np.asarray(image)[..., ::-1], "img_id": 0})  # blue comes first
        return {key: [value] for key, value in data.items()}

    return transform


def _class_names(known: Sequence[str] | None, model: nn.Module) -> list[str]:
    """Return the names of the classes; a classifier's are ImageNet-1k's or numbers if unknown."""
    if known:
        return [str(name) for name in known]
    num_classes = getattr(model, "num_classes", None)
    if num_classes is None:
        raise ValueError(
            "neither the checkpoint nor the config names the classes; give --cfg-options "
            "test_dataloader.dataset.metainfo.classes=(NAME,NAME,...)"
        )
    if num_classes == 1000:
        from timm.data import ImageNetInfo

        return ImageNetInfo().label_descriptions()
    return [str(label) for label in range(num_classes)]


def make_palette(num_classes: int) -> list[tuple[int, int, int]]:
    """Make colours (red, green, blue), 0 to 255, of which neighbours differ much in hue."""
    golden_ratio = 0.618034
    colours = (
        colorsys.hsv_to_rgb(label * golden_ratio % 1, 0.75, 1.0) for label in range(num_classes)
    )
    return [tuple(round(255 * value) for value in colour) for colour in colours]


def describe(prediction: Prediction, classes: Sequence[str]) -> str:
    """Say in a few words what was predicted."""
    if isinstance(prediction, ClassScores):
        return ", ".join(
            f"{classes[label]} {100 * prediction.scores[label]:.1f} %"
            for label in _top_classes(prediction.scores)
        )
    if isinstance(prediction, LabelMap):
        labels, counts = np.unique(prediction.labels, return_counts=True)
        return ", ".join(
            f"{classes[label]} {100 * count / prediction.labels.size:.1f} %"
            for label, count in sorted(zip(labels, counts, strict=True), key=lambda x: -x[1])
            if label < len(classes)
        )
    if not len(prediction.labels):
        return "nothing found"
    return ", ".join(_tags(prediction, classes))


def draw(
    image: Image.Image,
    prediction: Prediction,
    classes: Sequence[str],
    palette: Sequence[tuple[int, int, int]],
) -> Image.Image:
    """Draw a prediction, or a ground truth in the same form, on an RGB image.

    Small images are enlarged by a whole factor. What does not belong to a place (the legend of a
    label map, the most probable classes) is written below the image.
    """
    zoom = max(1, -(-_MIN_SIDE // max(image.size)))
    canvas = image.resize((zoom * image.width, zoom * image.height), Image.Resampling.BICUBIC)
    if isinstance(prediction, ClassScores):
        return _draw_classes(canvas, prediction.scores, classes)
    if isinstance(prediction, LabelMap):
        return _draw_label_map(canvas, prediction.labels, classes, palette)
    return _draw_detections(canvas, prediction, zoom, classes, palette)


def _draw_detections(
    canvas: Image.Image,
    found: Detections,
    zoom: int,
    classes: Sequence[str],
    palette: Sequence[tuple[int, int, int]],
) -> Image.Image:
    """Draw masks, boxes and their tags, the surest on top."""
    if found.scores is not None:
        found = found.take(np.argsort(found.scores, kind="stable"))
    for mask, label in zip(() if found.masks is None else found.masks, found.labels, strict=False):
        opacity = Image.fromarray(mask.astype(np.uint8) * 115).resize(canvas.size, _NEAREST)
        canvas.paste(palette[label], (0, 0), opacity)
    pen, font = ImageDraw.Draw(canvas), _font()
    tags = _tags(found, classes)
    for box, label, tag in zip(found.boxes * zoom, found.labels, tags, strict=True):
        colour = palette[label]
        left, top, right, bottom = (float(value) for value in box)
        pen.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour, width=2)
        width = pen.textlength(tag, font=font) + 6
        left = min(max(left, 0), max(canvas.width - width, 0))
        top = top - _CAPTION_HEIGHT if top >= _CAPTION_HEIGHT else min(bottom, canvas.height)
        top = min(max(top, 0), canvas.height - _CAPTION_HEIGHT)
        pen.rectangle((left, top, left + width, top + _CAPTION_HEIGHT), fill=colour)
        pen.text((left + 3, top + 1), tag, fill=_readable_on(colour), font=font)
    return canvas


def _draw_label_map(
    canvas: Image.Image,
    labels: np.ndarray,
    classes: Sequence[str],
    palette: Sequence[tuple[int, int, int]],
) -> Image.Image:
    """Tint each pixel by its class, and list the classes below; a background stays as it is."""
    drawn = [
        label
        for label in np.unique(labels)
        if label < len(classes) and classes[label] != "background"
    ]
    for label in drawn:
        opacity = Image.fromarray((labels == label).astype(np.uint8) * 165).resize(
            canvas.size, _NEAREST
        )
        canvas.paste(palette[label], (0, 0), opacity)

    font = _font()
    places, x, y = [], 4, canvas.height + 3
    for label in drawn:
        width = round(font.getlength(classes[label])) + _FONT_SIZE + 16
        if x + width > canvas.width and x > 4:
            x, y = 4, y + _CAPTION_HEIGHT
        places.append((x, y))
        x += width
    canvas = _extend(canvas, y + _CAPTION_HEIGHT)
    pen = ImageDraw.Draw(canvas)
    for label, (x, y) in zip(drawn, places, strict=True):
        pen.rectangle((x, y + 2, x + _FONT_SIZE, y + 2 + _FONT_SIZE), fill=palette[label])
        pen.text((x + _FONT_SIZE + 5, y), classes[label], fill="black", font=font)
    return canvas


def _draw_classes(canvas: Image.Image, scores: np.ndarray, classes: Sequence[str]) -> Image.Image:
    """List the most probable classes below the image, with bars."""
    top = _top_classes(scores)
    first = canvas.height + 3
    canvas = _extend(canvas, first + _CAPTION_HEIGHT * len(top))
    pen, font = ImageDraw.Draw(canvas), _font()
    for row, label in enumerate(top):
        y = first + row * _CAPTION_HEIGHT
        length = float(scores[label]) * (canvas.width - 8)
        pen.rectangle((4, y, 4 + length, y + _CAPTION_HEIGHT - 3), fill=(170, 205, 240))
        text = f"{100 * scores[label]:.1f} %  {classes[label]}"
        pen.text((8, y), text, fill="black", font=font)
    return canvas


def _tags(found: Detections, classes: Sequence[str]) -> list[str]:
    """Name the objects, with their scores where they have them."""
    names = [classes[label] for label in found.labels]
    if found.scores is None:
        return names
    return [f"{name} {score:.2f}" for name, score in zip(names, found.scores, strict=True)]


def _top_classes(scores: np.ndarray) -> np.ndarray:
    """Return the indices of the most probable classes, the most probable first."""
    return np.argsort(-scores, kind="stable")[:_TOP_CLASSES]


def _extend(canvas: Image.Image, height: int) -> Image.Image:
    """Return the picture with white below it, `height` pixels high."""
    extended = Image.new("RGB", (canvas.width, height), "white")
    extended.paste(canvas)
    return extended


def _font() -> ImageFont.FreeTypeFont:
    """Return the font of captions, which comes with Pillow."""
    return ImageFont.load_default(_FONT_SIZE)


def _readable_on(colour: tuple[int, int, int]) -> str:
    """Return the colour of text that can be read on a colour."""
    red, green, blue = colour
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 128 else "white"


if __name__ == "__main__":
    from .cli import run_module

    run_module("predict")

"""Predictions, and ground truth in the same form: what they hold, in words, and in pictures."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_MIN_SIDE = 384  # pixels; smaller pictures are enlarged, so that their labels can be read
_NEAREST = Image.Resampling.NEAREST
_MIN_WIDTH = 200  # pixels of a picture with captions below it
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
            for label in top_classes(prediction.scores)
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

    canvas = _extend(canvas, canvas.height)
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
    top = top_classes(scores)
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


def top_classes(scores: np.ndarray) -> np.ndarray:
    """Return the indices of the most probable classes, the most probable first."""
    return np.argsort(-scores, kind="stable")[:_TOP_CLASSES]


def _extend(canvas: Image.Image, height: int) -> Image.Image:
    """Return the picture with white around it: `height` pixels high, and wide enough for words."""
    extended = Image.new("RGB", (max(canvas.width, _MIN_WIDTH), height), "white")
    extended.paste(canvas)
    return extended


def _font() -> ImageFont.FreeTypeFont:
    """Return the font of captions, which comes with Pillow."""
    return ImageFont.load_default(_FONT_SIZE)


def _readable_on(colour: tuple[int, int, int]) -> str:
    """Return the colour of text that can be read on a colour."""
    red, green, blue = colour
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 128 else "white"

"""Whole-image and sliding-window testing of segmenters: its settings, and how windows are merged.

The segmenter itself, which imports mmseg, is in ``dense_segmentor.py``.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS
from torch import Tensor

from ...backbones.registry import register_in_mmengine

if TYPE_CHECKING:
    from .dense_segmentor import DenseSegmentor

MODES = ("whole", "slide")
KEYS = (
    "mode",
    "crop_size",
    "stride",
    "accumulation_device",
    "window_batch_size",
    "keep_logits",
)


@register_in_mmengine(MODELS, "DenseSegmentor")
def dense_segmentor(**options) -> DenseSegmentor:
    """Build a :class:`~.dense_segmentor.DenseSegmentor`, importing mmseg only now.

    Raises:
        ImportError: if mmseg is not installed.
        ValueError: for what :func:`check_test_cfg` refuses.
    """
    try:
        from .dense_segmentor import DenseSegmentor
    except ModuleNotFoundError as error:
        raise ImportError(
            f"DenseSegmentor needs mmseg ({error}): pip install 'densezoo[openmmlab]'"
        ) from error
    return DenseSegmentor(**options)


def check_test_cfg(test_cfg: Mapping | None) -> ConfigDict:
    """Return a segmenter's `test_cfg` with its defaults filled in and sizes as pairs.

    Args:
        test_cfg: settings of testing; keys that are not named here are left to the heads.

            mode: "whole" (the default) predicts the whole image at once; "slide" predicts
                overlapping windows and averages their logits, so memory does not grow with the
                activations of a large image.
            crop_size: of "slide": size of a window in pixels, (height, width) or both at once.
            stride: of "slide": step from window to window in pixels, likewise; at most the
                window.
            accumulation_device: of "slide": where the logits of the image are summed: "cpu",
                "cuda" (or "cuda:1", ...), or None for where the image is. With "cpu" a GPU holds
                one batch of windows at a time, and labels and logits stay on the CPU.
            window_batch_size: of "slide": windows of each image that the model gets at once;
                1 by default.
            keep_logits: give logits with the labels, as mmseg does and test-time augmentation
                needs; True by default. False saves a copy of them at the size of the original
                image where the pipeline resized it.

    Raises:
        ValueError: if a value makes no sense, or a key looks like one of these misspelt.
    """
    checked = ConfigDict(test_cfg or {})
    for key in set(checked) - set(KEYS):
        near = difflib.get_close_matches(str(key), KEYS, n=1, cutoff=0.8)
        if near:
            raise ValueError(f"test_cfg.{key} is not a setting; did you mean {near[0]}?")
    checked.setdefault("mode", "whole")
    if checked.mode not in MODES:
        raise ValueError(f"test_cfg.mode={checked.mode!r} must be one of {', '.join(MODES)}")
    keep_logits = checked.setdefault("keep_logits", True)
    if not isinstance(keep_logits, bool):
        raise ValueError(f"test_cfg.keep_logits={keep_logits!r} must be True or False")
    if checked.mode == "whole":
        return checked

    for key in ("crop_size", "stride"):
        checked[key] = _pair_of_pixels(key, checked.get(key))
    if any(step > side for step, side in zip(checked.stride, checked.crop_size, strict=True)):
        raise ValueError(
            f"test_cfg.stride={checked.stride} is larger than test_cfg.crop_size="
            f"{checked.crop_size}: pixels between the windows would have no prediction"
        )
    number = checked.setdefault("window_batch_size", 1)
    if not _is_positive(number):
        raise ValueError(f"test_cfg.window_batch_size={number!r} must be an integer from 1")
    _check_device(checked.setdefault("accumulation_device", None))
    return checked


def _is_positive(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 1


def _pair_of_pixels(key: str, value: object) -> tuple[int, int]:
    """Return (height, width) of a setting that is a pair or one integer for both."""
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or not all(_is_positive(side) for side in pair):
        raise ValueError(
            f'test_cfg.{key}={value!r} must be (height, width) in pixels, from 1, for mode="slide"'
        )
    return pair


def _check_device(name: object) -> None:
    key = f"test_cfg.accumulation_device={name!r}"
    if name is None:
        return
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f'{key} must be "cpu", "cuda", "cuda:N" or None') from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f'{key} must be "cpu", "cuda", "cuda:N" or None')
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f'{key} is not a GPU of this machine; give "cpu" or None')


def window_starts(size: int, window: int, stride: int) -> list[int]:
    """Return where the windows along one side of an image start, in pixels.

    The last window is shifted inward to end with the image, so all are full; an image smaller
    than the window has one, at 0. With ``stride <= window`` every pixel is covered.
    """
    last = max(size - window, 0)
    return [*range(0, last, stride), last]


def slide_over(
    images: Tensor,
    predict: Callable[[Tensor], Tensor],
    num_classes: int,
    *,
    crop_size: tuple[int, int],
    stride: tuple[int, int],
    device: torch.device | str | None = None,
    window_batch_size: int = 1,
) -> Tensor:
    """Average the predictions of overlapping windows.

    Besides the result it needs the memory of one call of `predict`, however many windows there
    are: they are summed and divided in place, and how often a pixel was covered is a product of
    its row's and its column's counts.

    Args:
        images: (B, C, H, W).
        predict: maps windows (N * B, C, h, w) to logits (N * B, num_classes, h, w).
        num_classes: channels of the logits.
        crop_size: (height, width) of a window in pixels; an image that is smaller is one window.
        stride: (height, width) from one window to the next in pixels, at most `crop_size`.
        device: where the logits are summed; None is where the images are.
        window_batch_size: N, the windows of each image that `predict` gets at once.

    Returns:
        (B, num_classes, H, W) logits on `device`, in float32 at least.
    """
    batch_size, _, height, width = images.shape
    crop_height, crop_width = min(crop_size[0], height), min(crop_size[1], width)
    tops = window_starts(height, crop_height, stride[0])
    lefts = window_starts(width, crop_width, stride[1])
    corners = [(top, left) for top in tops for left in lefts]
    summed = torch.zeros(
        (batch_size, num_classes, height, width),
        dtype=torch.promote_types(images.dtype, torch.float32),
        device=images.device if device is None else device,
    )
    for start in range(0, len(corners), window_batch_size):
        chosen = corners[start : start + window_batch_size]
        boxes = [
            (..., slice(top, top + crop_height), slice(left, left + crop_width))
            for top, left in chosen
        ]
        logits = predict(torch.cat([images[box] for box in boxes])).to(summed.device)
        for box, window in zip(boxes, logits.split(batch_size), strict=True):
            summed[box] += window
        del logits, window  # or they would live through the next prediction
    summed /= _coverage(tops, crop_height, height).to(summed)[:, None]
    summed /= _coverage(lefts, crop_width, width).to(summed)
    return summed


def _coverage(starts: list[int], window: int, size: int) -> Tensor:
    """Count the windows over each of `size` pixels along a side: (size,)."""
    counts = torch.zeros(size)
    for start in starts:
        counts[start : start + window] += 1
    return counts

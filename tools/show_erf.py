"""The effective receptive field: what the middle of each stage's map depends on, over images.

The derivative of the middle of a map, summed over its channels, in the image: its absolute value,
averaged over images and channels (Luo et al., arXiv:1701.04128). Squares are around its centre of
mass, since strided convolutions see an image up to half a stride off.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image, ImageOps

from .read_images import UnusableImage
from .show_model import Subject
from .show_pictures import Panel, draw_heat

_SHARES = (0.5, 0.99)


def receptive_fields(
    subject: Subject, images: Iterable[Image.Image]
) -> tuple[list[np.ndarray], int]:
    """Compute the effective receptive field of the middle of each stage's map.

    Args:
        subject: the model.
        images: RGB, all of one size.

    Returns:
        (H, W) a stage: the field at each pixel, in the units of the derivative; and the number of
        images.
    """
    fields: list[np.ndarray] = []
    count = 0
    for image in images:
        with torch.enable_grad():
            batch = subject.batch(image).requires_grad_()
            middles = [m[0, :, m.shape[2] // 2, m.shape[3] // 2].sum() for m in subject.maps(batch)]
            slopes = [torch.autograd.grad(m, batch, retain_graph=True)[0] for m in middles]
        found = [slope[0].abs().mean(0).double().cpu().numpy() for slope in slopes]
        fields = [
            (field * count + new) / (count + 1)
            for field, new in zip(fields or found, found, strict=True)
        ]
        count += 1
    return fields, count


def centre_of(field: np.ndarray) -> tuple[float, float]:
    """Find the centre of mass of a field (H, W): row and column, from the top and left edge."""
    total = field.sum()
    if not total:
        return field.shape[0] / 2, field.shape[1] / 2
    rows, columns = (np.arange(length) + 0.5 for length in field.shape)
    return float(field.sum(1) @ rows / total), float(field.sum(0) @ columns / total)


def square_of(field: np.ndarray, centre: tuple[float, float], share: float) -> int:
    """Find the smallest square around a point that holds a share of a field.

    Args:
        field: (H, W), at least 0.
        centre: row and column, where 0 is the top or left edge of the first pixel.
        share: above 0, up to 1.

    Returns:
        Its side, pixels; 0 of an empty field. It may reach beyond the image.
    """
    rows, columns = (
        np.abs(np.arange(length) + 0.5 - at) for length, at in zip(field.shape, centre, strict=True)
    )
    distances = np.maximum(rows[:, None], columns)  # of a pixel's middle, along an axis
    order = np.argsort(distances, axis=None, kind="stable")
    held = np.cumsum(field.flat[order])
    if not held[-1]:
        return 0
    # Rounding must not ask for more than there is.
    last = min(int(np.searchsorted(held, share * held[-1])), held.size - 1)
    return int(np.ceil(2 * distances.flat[order[last]]))


def draw_erf(subject: Subject, images: Iterable[Image.Image], size: tuple[int, int]) -> bytes:
    """Draw the effective receptive field of each stage, as PNG.

    Args:
        subject: the model.
        images: RGB, all of the size.
        size: height and width, pixels.

    Raises:
        ValueError: there is no image, or a derivative is not finite.
    """
    fields, num_images = receptive_fields(subject, images)
    if not num_images:
        raise UnusableImage("none of the images can be read")
    panels = []
    for stage, (field, stride) in enumerate(zip(fields, subject.strides, strict=True)):
        if not np.isfinite(field).all():
            raise ValueError(
                f"the derivative of stage {stage} of {subject.name} is not finite; take the "
                "weights of a sound run"
            )
        centre = centre_of(field)
        sides = [square_of(field, centre, share) for share in _SHARES]
        held = ", ".join(
            f"{share:.0%} in {side} px" for share, side in zip(_SHARES, sides, strict=True)
        )
        caption = f"stage {stage} (stride {stride})\n{held}"
        panels.append(Panel(field, (1, 1), caption, own=[_square(centre, n) for n in sides]))
    title = (
        f"Effective receptive field of {subject.title}, {num_images} image{'s'[: num_images > 1]} "
        f"of {size[0]}x{size[1]} pixels\n{subject.weights}; squares hold "
        + " and ".join(f"{share:.0%}" for share in _SHARES)
    )
    return draw_heat(panels, title, "absolute derivative, relative to the largest")


def _square(centre: tuple[float, float], side: int) -> tuple[float, float, float, float]:
    row, column = centre
    return column - side / 2, row - side / 2, column + side / 2, row + side / 2


def fill(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale an image so that it covers height and width, and cut out its middle."""
    height, width = size
    return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)

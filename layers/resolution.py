"""Maps of any size: padding to whole windows and cropping back.

Eager code pads or crops only where that changes something. Under compilers and exporters sizes may
be symbols: there all sizes go the same way, so that one graph serves them.

Legend: B batch, H and W height and width of the map, C channels. All maps are NHWC.
"""

from __future__ import annotations

import torch

from .tracing import Length, is_open


def num_windows(length: Length, side: int) -> Length:
    """Count the windows of `side` tokens that cover `length` tokens of an axis."""
    return (length + side - 1) // side


def padded_length(length: Length, side: int) -> Length:
    """Count the tokens of the windows of `side` tokens that cover `length` tokens of an axis."""
    return num_windows(length, side) * side


def pad_axis(
    x: torch.Tensor, axis: int, length: Length, value: torch.Tensor | None = None
) -> torch.Tensor:
    """Extend an axis to `length` positions at its end; `x` itself where it is that long.

    Args:
        x: any tensor; the axis has `length` positions at most.
        axis: which; not the last.
        length: positions wanted.
        value: (C,), what the new positions hold; None for zeros.

    Returns:
        As `x`, with `length` positions in the axis.
    """
    own = x.shape[axis]
    traced = is_open(own)
    if not traced and own == length:
        return x
    shape = list(x.shape)
    shape[axis] = 1 if traced else length - own
    padding = x.new_zeros(()) if value is None else value.to(x.dtype)
    x = torch.cat([x, padding.expand(shape)], dim=axis)
    if not traced:
        return x
    return x.index_select(axis, torch.arange(length, device=x.device).clamp(max=own))


def crop_axis(x: torch.Tensor, axis: int, length: Length) -> torch.Tensor:
    """Take the first `length` positions of an axis."""
    if is_open(length):  # a view would be contiguous or not by the size: a graph for each
        return x.index_select(axis, torch.arange(length, device=x.device))
    return x.narrow(axis, 0, length)


def pad_to_windows(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Pad a map with zeros at the bottom and right to whole windows. NHWC.

    Args:
        x: (B, H, W, C).
        size: rows and columns of tokens in a window, (P_r, P_c).

    Returns:
        (B, P_r * ceil(H / P_r), P_c * ceil(W / P_c), C); `x` itself where its sides divide.
    """
    for axis, side in enumerate(size, 1):
        x = pad_axis(x, axis, padded_length(x.shape[axis], side))
    return x


def crop(x: torch.Tensor, height: Length, width: Length) -> torch.Tensor:
    """Take the top left of a map: the inverse of `pad_to_windows`. NHWC.

    (B, H, W, C) -> (B, height, width, C).
    """
    return crop_axis(crop_axis(x, 1, height), 2, width)

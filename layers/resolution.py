"""Maps of any size: padding to whole windows, cropping back, and which tokens are real.

Eager code pads or crops only where that changes something. Under compilers and exporters sizes may
be symbols: there all sizes go the same way, so that one graph serves them.

Legend: B batch, H and W height and width of the map, C channels. All maps are NHWC.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch

from .tracing import Length, is_open, is_plain_inference
from .window_attention import WindowAttention, merge, partition


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


def real_tokens(
    batch: Length,
    height: Length,
    width: Length,
    size: tuple[int, int],
    *,
    is_grid: bool = False,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Tell the tokens of padded maps' windows from what padding added.

    Args:
        batch: maps B.
        height: rows of a map before `pad_to_windows`.
        width: columns of a map before it.
        size: rows and columns of tokens in a window, (P_r, P_c).
        is_grid: as in `partition`.
        device: where the result is to be.

    Returns:
        (B * windows, P_r * P_c) bool, in the order of `partition`: True where a token is a map's.
    """
    padded = [padded_length(n, side) for n, side in zip((height, width), size, strict=True)]
    rows, columns = (torch.arange(n, device=device) for n in padded)
    is_real = (rows < height)[:, None] & (columns < width)
    is_real = is_real.flatten().repeat(batch).unflatten(0, (batch, *padded))
    return partition(is_real[..., None], size, is_grid=is_grid)[:, :, 0]


def attend_to_real_tokens(
    x: torch.Tensor, attention: WindowAttention, *, is_grid: bool = False
) -> torch.Tensor:
    """Attention inside the windows of a map of any size, of which padding is no part. NHWC.

    A token attends to those tokens of the map that are in its window, once the map is padded to
    whole windows at the bottom and right.

    Args:
        x: (B, H, W, C).
        attention: inside windows.
        is_grid: as in `partition`.

    Returns:
        (B, H, W, C).
    """
    size = attention.window_size
    height, width = x.shape[1:3]
    if not (is_open(height) or is_open(width)):
        if height % size[0] == 0 and width % size[1] == 0:
            windows = attention(partition(x, size, is_grid=is_grid))
            return merge(windows, size, height, width, is_grid=is_grid)
        if is_plain_inference():
            return _attend_by_kinds(x, attention, is_grid)
    mask = real_tokens(*x.shape[:3], size, is_grid=is_grid, device=x.device)
    x = pad_to_windows(x, size)
    windows = attention(partition(x, size, is_grid=is_grid), mask)
    x = merge(windows, size, *x.shape[1:3], is_grid=is_grid)
    return crop(x, height, width)


def _attend_by_kinds(x: torch.Tensor, attention: WindowAttention, is_grid: bool) -> torch.Tensor:
    """`attend_to_real_tokens` without padding: windows of as many real tokens are done together.

    Padding takes whole rows and columns off a window. What is left is a smaller window, with the
    biases of the same offsets.
    """
    out = None
    rows, columns = map(_window_kinds, x.shape[1:3], attention.window_size, (is_grid, is_grid))
    for kinds in product(rows, columns):
        windows = _windows_of(x, *kinds)
        size = windows.shape[3:5]
        result = attention(windows.reshape(-1, size.numel(), x.shape[-1]), size=tuple(size))
        if out is None:
            out = result.new_empty(x.shape)
        _windows_of(out, *kinds).copy_(result.view(windows.shape))
    return out


class _WindowKind(NamedTuple):
    """Windows with equally many real tokens along an axis, positions in tokens of the map."""

    start: int  # first token of the first
    count: int
    length: int  # real tokens of each
    step: int  # from a window to the next
    token_step: int  # from a token of a window to the next


def _window_kinds(length: int, side: int, is_grid: bool) -> list[_WindowKind]:
    """Sort the windows that cover an axis by how many real tokens they have."""
    count = num_windows(length, side)
    if is_grid:
        least, num_longer = divmod(length, count)
        kinds = [
            _WindowKind(0, num_longer, least + 1, 1, count),
            _WindowKind(num_longer, count - num_longer, least, 1, count),
        ]
    else:
        num_whole, rest = divmod(length, side)
        kinds = [
            _WindowKind(0, num_whole, side, side, 1),
            _WindowKind(num_whole * side, count - num_whole, rest, side, 1),
        ]
    return [kind for kind in kinds if kind.count]


def _windows_of(x: torch.Tensor, rows: _WindowKind, columns: _WindowKind) -> torch.Tensor:
    """View the windows of a map, (B, H, W, C), that are of a kind along either axis.

    (B, window rows, window columns, token rows, token columns, C).
    """
    batch, row, column, channel = x.stride()
    return x.as_strided(
        (len(x), rows.count, columns.count, rows.length, columns.length, x.shape[-1]),
        (
            batch,
            rows.step * row,
            columns.step * column,
            rows.token_step * row,
            columns.token_step * column,
            channel,
        ),
        x.storage_offset() + rows.start * row + columns.start * column,
    )

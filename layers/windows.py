"""Windows and grids of maps of any size: cut with padding, and merged without it.

Eager code pads or crops only where that changes something. Under compilers and exporters sizes may
be symbols: there all sizes go the same way, so that one graph serves them.

Legend: B batch, H and W height and width of the map, C channels. All maps are NHWC.
"""

from __future__ import annotations

import torch

from .resolution import crop, num_windows, pad_to_windows
from .token_order import gather_map, gather_windows
from .tracing import Length, is_open


def partition(
    x: torch.Tensor, size: tuple[Length, Length], *, is_grid: bool = False
) -> torch.Tensor:
    """Cut a map into windows, padded with zeros at the bottom and right to whole ones. NHWC.

    Args:
        x: (B, H, W, C).
        size: rows and columns of tokens in a window, (P_r, P_c).
        is_grid: False for windows of adjacent tokens; True for windows of P_r x P_c tokens spread
            evenly over the padded map, ceil(H / P_r) and ceil(W / P_c) apart (MaxViT's grid).

    Returns:
        (B * windows, P_r * P_c, C): all windows of an image before the next image's, windows and
        their tokens row by row.
    """
    rows, columns = size
    shape = x.shape[:3]
    if any(is_open(side) for side in shape[1:]):
        tokens = torch.cat([x.flatten(0, 2), x.new_zeros(1, x.shape[-1])])
        return gather_windows(tokens, shape, size, is_grid)
    x = pad_to_windows(x, size)
    if is_grid:  # axes: 1 token row, 2 window row, 3 token column, 4 window column
        x = x.unflatten(2, (columns, -1)).unflatten(1, (rows, -1)).permute(0, 2, 4, 1, 3, 5)
    else:  # axes: 1 window row, 2 token row, 3 window column, 4 token column
        x = x.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, rows * columns, x.shape[-1])


def merge(
    windows: torch.Tensor,
    size: tuple[Length, Length],
    height: Length,
    width: Length,
    *,
    is_grid: bool = False,
) -> torch.Tensor:
    """Put windows together to the map that they were cut from: the inverse of `partition`. NHWC.

    Args:
        windows: (B * windows, P_r * P_c, C).
        size: rows and columns of tokens in a window, (P_r, P_c).
        height: rows of the map, H.
        width: columns of the map, W.
        is_grid: as in `partition`.

    Returns:
        (B, H, W, C), without what `partition` padded.
    """
    if is_open(height) or is_open(width):
        return gather_map(windows, size, height, width, is_grid)
    rows, columns = size
    down, across = num_windows(height, rows), num_windows(width, columns)
    x = windows.reshape(-1, down, across, rows, columns, windows.shape[-1])
    x = x.permute(0, 3, 1, 4, 2, 5) if is_grid else x.permute(0, 1, 3, 2, 4, 5)
    return crop(x.reshape(-1, down * rows, across * columns, x.shape[-1]), height, width)


def real_tokens(
    batch: Length,
    height: Length,
    width: Length,
    size: tuple[Length, Length],
    *,
    is_grid: bool = False,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Tell the tokens of maps in the windows of `partition` from what it padded.

    Args:
        batch: maps B.
        height: rows of a map, H.
        width: columns of a map, W.
        size: rows and columns of tokens in a window, (P_r, P_c).
        is_grid: as in `partition`.
        device: where the result is to be.

    Returns:
        (B * windows, P_r * P_c) bool, True where a token is a map's.
    """
    ones = torch.ones(batch, height, width, 1, dtype=torch.bool, device=device)
    return partition(ones, size, is_grid=is_grid)[:, :, 0]

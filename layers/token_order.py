"""The orders in which windows and maps hold the same tokens, where sizes are symbols.

Views would be other graphs where there is one window along an axis. These orders are computed on
one axis, that of all tokens, which is never of length 1 without being the map.

`torch.compile` sees one operator, ``torch.ops.densezoo.token_order``: inductor would fuse the
arithmetic with symbols into each load of a map, and takes minutes a layer to simplify it. Exporters
see the arithmetic, so that their programs need PyTorch alone.

Legend: B images, H and W height and width of their maps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .resolution import num_windows
from .tracing import Length


def gather_windows(
    tokens: torch.Tensor, shape: Sequence[Length], size: Sequence[Length], is_grid: bool
) -> torch.Tensor:
    """Take the tokens of each window of maps that are padded to whole windows.

    Args:
        tokens: (B * H * W + 1, C), those of the maps, row by row, and what padding holds.
        shape: B, H, W.
        size: rows and columns of tokens in a window, (P_r, P_c).
        is_grid: as in :func:`~densezoo.layers.windows.partition`.

    Returns:
        (B * windows, P_r * P_c, C), padding at the bottom and right.
    """
    rows, columns = size
    tokens = tokens.index_select(0, _order(shape, size, is_grid, False, tokens.device))
    # The count is spelled out: a size of -1 would have the others divide by it.
    batch, down, across = _num_windows(shape, size)
    return tokens.unflatten(0, (batch * down * across, rows * columns))


def gather_map(
    windows: torch.Tensor, size: Sequence[Length], height: Length, width: Length, is_grid: bool
) -> torch.Tensor:
    """Take the tokens of maps from their windows, without padding.

    Args:
        windows: (B * windows, P_r * P_c, C), as of `gather_windows`.
        size: rows and columns of tokens in a window, (P_r, P_c).
        height: H.
        width: W.
        is_grid: as in `gather_windows`.

    Returns:
        (B, H, W, C).
    """
    _, down, across = _num_windows((1, height, width), size)
    shape = windows.shape[0] // (down * across), height, width
    order = _order(shape, size, is_grid, True, windows.device)
    return windows.flatten(0, 1).index_select(0, order).unflatten(0, shape)


def _order(
    shape: Sequence[Length],
    size: Sequence[Length],
    is_grid: bool,
    is_inverse: bool,
    device: torch.device,
) -> torch.Tensor:
    compute = torch.ops.densezoo.token_order.default if _is_compiled() else _compute
    return compute(list(shape), list(size), is_grid, is_inverse, device)


def _is_compiled() -> bool:
    """Whether the program that is traced is to be compiled, not exported."""
    is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # torch < 2.7 has none
    return torch.compiler.is_dynamo_compiling() and not is_exporting()


def _compute(
    shape: Sequence[Length],
    size: Sequence[Length],
    is_grid: bool,
    is_inverse: bool,
    device: torch.device,
) -> torch.Tensor:
    batch, height, width = shape
    rows, columns = size
    _, down, across = _num_windows(shape, size)
    if is_inverse:
        position = torch.arange(batch * height * width, device=device)
        row, column = _divmod(position, width)
        image, row = _divmod(row, height)
        if is_grid:
            token_row, window_row = _divmod(row, down)
            token_column, window_column = _divmod(column, across)
        else:
            window_row, token_row = _divmod(row, rows)
            window_column, token_column = _divmod(column, columns)
        window = (image * down + window_row) * across + window_column
        return (window * rows + token_row) * columns + token_column
    position = torch.arange(batch * down * across * rows * columns, device=device)
    window, token = _divmod(position, rows * columns)
    image, window = _divmod(window, down * across)
    token_row, token_column = _divmod(token, columns)
    window_row, window_column = _divmod(window, across)
    if is_grid:
        row, column = token_row * down + window_row, token_column * across + window_column
    else:
        row, column = window_row * rows + token_row, window_column * columns + token_column
    is_real = (row < height) & (column < width)
    return torch.where(is_real, (image * height + row) * width + column, batch * height * width)


def _num_windows(shape: Sequence[Length], size: Sequence[Length]) -> tuple[Length, Length, Length]:
    """Count the images, and the windows along the axes of each that cover it."""
    batch, *sides = shape
    down, across = (num_windows(length, side) for length, side in zip(sides, size, strict=True))
    return batch, down, across


def _divmod(x: torch.Tensor, by: Length) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide with a remainder, in operators that ONNX has for symbols too."""
    quotient = x // by
    return quotient, x - quotient * by


def _allocate(
    shape: Sequence[Length],
    size: Sequence[Length],
    is_grid: bool,
    is_inverse: bool,
    device: torch.device,
) -> torch.Tensor:
    """Give what the operator returns, uninitialised."""
    batch, height, width = shape
    if not is_inverse:
        rows, columns = size
        _, down, across = _num_windows(shape, size)
        height, width = down * rows, across * columns
    return torch.empty(batch * height * width, dtype=torch.int64, device=device)


_library = torch.library.Library("densezoo", "FRAGMENT")
if not hasattr(torch.ops.densezoo, "token_order"):  # a package imported anew takes what is there
    _library.define(
        "token_order(SymInt[] shape, SymInt[] size, bool is_grid, bool is_inverse, Device device) "
        "-> Tensor",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    # No argument is a tensor that would tell the device: one kernel stands for all.
    _library.impl("token_order", _compute, "BackendSelect")
    torch.library.register_fake("densezoo::token_order", _allocate, lib=_library)

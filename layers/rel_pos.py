"""Tables of relative position biases: what they say of each pair, and their resizing.

A table (heads, 2L_1 - 1, 2L_2 - 1) has an entry for each offset of key minus query, from
-(L - 1) to L - 1 along each axis; its centre is the query itself.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def resize_rel_pos_bias(table: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize every head's table by bicubic interpolation, in float32 at least.

    Pixels are taken as areas (``align_corners=False``), as Swin's and timm's resizing of such
    tables does. The centre stays the centre, and with it the query's own entry.

    Args:
        table: (heads, rows, columns), both odd.
        size: rows and columns wanted, both odd.

    Returns:
        (heads, *size), of the dtype of `table`.

    Raises:
        ValueError: a side is even, which leaves no centre.
    """
    if table.ndim != 3 or any(n % 2 == 0 for n in (*table.shape[1:], *size)):
        raise ValueError(
            f"a table of shape {tuple(table.shape)} is to have size {tuple(size)}: (heads, rows, "
            "columns) with odd sides are taken"
        )
    exact = table[None].to(torch.promote_types(table.dtype, torch.float32))
    resized = F.interpolate(exact, size=tuple(size), mode="bicubic", align_corners=False)
    return resized[0].to(table.dtype)


def rel_pos_bias_of_pairs(table: torch.Tensor) -> torch.Tensor:
    """Look up the bias of every pair of positions of an L_1 x L_2 map.

    Args:
        table: (heads, 2L_1 - 1, 2L_2 - 1).

    Returns:
        (heads, L_1 * L_2 queries, L_1 * L_2 keys), rows before columns in either.
    """
    height, width = (n // 2 + 1 for n in table.shape[1:])
    y = torch.arange(height, device=table.device)
    x = torch.arange(width, device=table.device)
    dy = y[None, :] - y[:, None] + height - 1  # (queries, keys)
    dx = x[None, :] - x[:, None] + width - 1
    bias = table[:, dy[:, None, :, None], dx[None, :, None, :]]  # (heads, query y, x, key y, x)
    return bias.flatten(3, 4).flatten(1, 2)

"""Relative position biases, as tables and as MLPs of offsets, and embeddings of positions.

A table (heads, 2L_1 - 1, 2L_2 - 1) has an entry for each offset of key minus query, from
-(L - 1) to L - 1 along each axis; its centre is the query itself.

A bias depends on weights alone. In evaluation on a CPU it is kept and used again, as long as the
weights that it was made of are what they were.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from .arguments import check_whole_number
from .linear import Linear
from .tracing import is_plain_inference
from .weight_init import trunc_normal_

# Values of a result above which it is not kept, 4 MiB of float32: attention of so many tokens
# costs many times what looking up their biases does.
_MOST_KEPT_VALUES = 2**20

# Integers as wide as a weight, by bytes.
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def resize_rel_pos_bias(
    table: torch.Tensor, size: tuple[int, int], mode: str = "bicubic"
) -> torch.Tensor:
    """Resize every head's table by interpolation, in float32 at least.

    Pixels are taken as areas (``align_corners=False``), as Swin's and timm's resizing of such
    tables does. The centre stays the centre, and with it the query's own entry.

    Args:
        table: (heads, rows, columns), both odd.
        size: rows and columns wanted, both odd.
        mode: "bicubic" or "bilinear".

    Returns:
        (heads, *size), of the dtype of `table`.

    Raises:
        ValueError: a side is even, which leaves no centre; the mode is none of these.
    """
    if table.ndim != 3 or any(n % 2 == 0 for n in (*table.shape[1:], *size)):
        raise ValueError(
            f"a table of shape {tuple(table.shape)} is to have size {tuple(size)}: (heads, rows, "
            "columns) with odd sides are taken"
        )
    if mode not in ("bicubic", "bilinear"):
        raise ValueError(f'mode is {mode!r}: "bicubic" or "bilinear" is taken')
    exact = table[None].to(torch.promote_types(table.dtype, torch.float32))
    resized = F.interpolate(exact, size=tuple(size), mode=mode, align_corners=False)
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
    index = dy[:, None, :, None] * (2 * width - 1) + dx[None, :, None, :]
    # Of the ways to look up, the one whose backward pass is fastest by far.
    bias = table.flatten(1).index_select(1, index.flatten())
    return bias.view(-1, height * width, height * width)


class WeightCache:
    """Results of functions of weights, each kept until a weight differs.

    Weights are compared with copies bit by bit: writes through ``.data``, swaps of tensors and
    tensors without a version counter are noticed as optimizer steps are. In plain inference on a
    CPU alone, where comparing stalls nothing; elsewhere each call computes anew. A copy of the
    cache, and what a pickle of it gives, is empty.

    Args:
        size: results kept at the most; the one used longest ago makes room.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.entries: OrderedDict[Hashable, tuple[list[np.ndarray], torch.Tensor]] = OrderedDict()

    def get(
        self,
        key: Hashable,
        weights: Sequence[torch.Tensor],
        function: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """Give function(), which depends on `key` and `weights` alone; not to be written to."""
        is_kept = weights[0].device.type == "cpu" and is_plain_inference()
        if not is_kept or torch.is_autocast_enabled("cpu"):
            return function()
        key = (key, weights[0].dtype)
        bits = [_bits(weight) for weight in weights]
        # Taken out and put back: threads may compute twice, and never meet a missing entry.
        entry = self.entries.pop(key, None)
        if entry is None or not all(map(np.array_equal, bits, entry[0])):
            entry = [array.copy() for array in bits], function()
        if entry[1].numel() <= _MOST_KEPT_VALUES:
            self.entries[key] = entry
            if len(self.entries) > self.size:
                self.entries.popitem(last=False)
        return entry[1]

    def __deepcopy__(self, memo: dict) -> WeightCache:
        return WeightCache(self.size)

    def __reduce__(self) -> tuple:
        return WeightCache, (self.size,)


def _bits(weight: torch.Tensor) -> np.ndarray:
    """Give a weight's memory as integers, without a copy; NumPy compares them fastest."""
    return weight.detach().view(_INTEGERS[weight.itemsize]).numpy()


class RelPosBias(nn.Module):
    """A learned bias for each relative position and head, the same in all windows.

    Args:
        num_heads: heads.
        window_size: rows and columns of tokens in a window, (P_r, P_c).

    Raises:
        ValueError: an argument is below 1, or there are not two sides.
    """

    def __init__(self, num_heads: int, window_size: tuple[int, int]) -> None:
        super().__init__()
        check_whole_number("num_heads", num_heads, 1)
        if len(window_size) != 2:
            raise ValueError(f"window_size is {window_size!r}: rows and columns are taken")
        for side in window_size:
            check_whole_number("a side of window_size", side, 1)
        self.window_size = tuple(window_size)
        self.table = nn.Parameter(torch.empty(num_heads, *(2 * n - 1 for n in window_size)))
        self._cache = WeightCache(4)
        trunc_normal_(self.table)

    def forward(self, size: tuple[int, int] | None = None) -> torch.Tensor:
        """Give the bias of every pair of tokens.

        Args:
            size: rows and columns of tokens in a smaller window, (R, S); None for whole ones.

        Returns:
            (heads, R * S queries, R * S keys).
        """
        size = self.window_size if size is None else size
        return self._cache.get(size, (self.table,), lambda: self._pairs(size))

    def _pairs(self, size: tuple[int, int]) -> torch.Tensor:
        table = self.table
        for axis, (side, own) in enumerate(zip(size, self.window_size, strict=True), 1):
            table = table.narrow(axis, own - side, 2 * side - 1)
        return rel_pos_bias_of_pairs(table)

    def extra_repr(self) -> str:
        return f"num_heads={len(self.table)}, window_size={self.window_size}"


class PositionMlp(nn.Module):
    """Two linear layers with a ReLU between them, of coordinates. (..., 2) -> (..., out_dim).

    The first has a bias, the second has none.

    Args:
        out_dim: values out.
        hidden_dim: values between.
    """

    def __init__(self, out_dim: int, hidden_dim: int = 512) -> None:
        super().__init__()
        check_whole_number("out_dim", out_dim, 1)
        check_whole_number("hidden_dim", hidden_dim, 1)
        self.fc1 = Linear(2, hidden_dim)
        self.fc2 = Linear(hidden_dim, out_dim, bias=False)
        self._cache = WeightCache(4)

    def forward(self, coordinates: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.relu(self.fc1(coordinates)))

    def cached(self, key: Hashable, function: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Give function(), which depends on `key` and this module's weights alone.

        `key` holds plain numbers; where they are symbols of sizes, nothing is kept.
        """
        weights = self.fc1.weight, self.fc1.bias, self.fc2.weight
        return self._cache.get(key, weights, function)


class MlpPosEmbed(PositionMlp):
    """An embedding of each position of a grid by an MLP of its coordinates.

    Position r of a side is at (r - origin) / origin, origin = floor(side / 2).

    Hatamizadeh et al., FasterViT, arXiv:2306.06189.

    Args:
        dim: channels of the embedding.
        hidden_dim: values between the two layers.
    """

    def forward(self, size: tuple[int, int], origin: tuple[int, int] | None = None) -> torch.Tensor:
        """Embed the positions of a grid.

        Args:
            size: rows and columns, each at least 2.
            origin: what is at 0, by axis; None for half of each side, rounded down.

        Returns:
            (rows * columns, dim), row by row, in the dtype of the weights.
        """
        origin = tuple(n // 2 for n in size) if origin is None else origin
        return self.cached((size, origin), lambda: self._embed(size, origin))

    def _embed(self, size: tuple[int, int], origin: tuple[int, int]) -> torch.Tensor:
        weight = self.fc1.weight
        rows, columns = (
            (torch.arange(n, device=weight.device, dtype=weight.dtype) - at) / at
            for n, at in zip(size, origin, strict=True)
        )
        return super().forward(_grid(rows, columns)).flatten(0, 1)


class MlpRelPosBias(PositionMlp):
    """A bias for each relative position of a grid and head, by an MLP of logarithmic offsets.

    An offset d (query minus key) along a side of n positions is t = 8 d / (n - 1), then
    sign(t) log2(1 + |t|) / 3; the bias is 16 sigmoid of what the MLP makes of the two.

    Liu et al., Swin Transformer V2, arXiv:2111.09883; as in FasterViT, arXiv:2306.06189.

    Args:
        num_heads: heads.
        hidden_dim: values between the two layers.
    """

    def forward(self, size: tuple[int, int]) -> torch.Tensor:
        """Give the bias of every pair of positions.

        Args:
            size: rows and columns of the grid, each at least 2.

        Returns:
            (heads, rows * columns queries, rows * columns keys), in the dtype of the weights.
        """
        return self.cached(("pairs", size), lambda: rel_pos_bias_of_pairs(self.table(size)))

    def table(self, size: tuple[int, int]) -> torch.Tensor:
        """Give the bias of every offset of key minus query, as a table.

        Args:
            size: rows and columns of the grid, each at least 2.

        Returns:
            (heads, 2 rows - 1, 2 columns - 1), in the dtype of the weights.
        """
        return self.cached(("table", size), lambda: self._table(size))

    def _table(self, size: tuple[int, int]) -> torch.Tensor:
        weight = self.fc1.weight
        offsets = []
        for n in size:
            # Query minus key, over a table of key minus query.
            steps = torch.arange(n - 1, -n, -1, device=weight.device, dtype=torch.float32)
            t = steps * (8 / (n - 1))
            offsets.append((t.sign() * (t.abs() + 1).log2() / 3).to(weight.dtype))
        table = 16 * super().forward(_grid(*offsets)).sigmoid()
        return table.permute(2, 0, 1)


def _grid(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Pair two lists of coordinates: (R,) and (C,) to (R, C, 2)."""
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)

"""Attention inside windows, and inside those of maps of any size.

Legend: B batch, H and W height and width of the map, C channels; B' windows of all images, N
queries and M keys of a window. All maps are NHWC.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .arguments import check_whole_number
from .attention_maps import attention_weights
from .linear import Linear, in_pieces
from .rel_pos import RelPosBias
from .resolution import num_windows
from .tracing import is_exporting, is_open, is_plain_inference
from .windows import merge, partition, real_tokens

# Values of queries, keys and values that are held at a time, in CPU inference: up to 32 MiB of
# float32 in one piece, which is fastest, and otherwise in pieces of 2 MiB.
_MOST_VALUES = 2**23
_VALUES_OF_PIECE = 2**19


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of the queries of each window to its keys.

    Args:
        query: (B', N, heads, head_dim), any strides.
        key: (B', M, heads, head_dim), any strides.
        value: as `key`.
        bias: added to the logits; broadcastable to (B', heads, N, M), floating point.
        scale: factor of the products of queries and keys; None for head_dim**-0.5.

    Returns:
        (B', N, heads * head_dim).
    """
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if bias is not None:
        bias = bias.to(query.dtype)
        bias = bias[(None,) * (4 - bias.ndim)]
        if bias.requires_grad and _is_fused_nowhere(query):
            query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
            weights = (query @ key.transpose(2, 3) + bias).softmax(-1)
            return (weights @ value).transpose(1, 2).flatten(2)
    x = F.scaled_dot_product_attention(query, key, value, bias, scale=scale).transpose(1, 2)
    if is_exporting():  # ONNX's result has other strides than the one traced: no view
        x = x.clone(memory_format=torch.contiguous_format)
    return x.flatten(2)


def _is_fused_nowhere(query: torch.Tensor) -> bool:
    """Whether PyTorch's attention with a bias that is learned takes longer than its formula.

    On a CPU it has no kernel for that, and guards against rows of -inf, of which there are none.
    """
    return (
        query.device.type == "cpu"
        and query.dtype in (torch.float32, torch.float64)
        and not torch.compiler.is_compiling()
    )


def weights_of_tokens(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    tokens: torch.Tensor,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """Find the weights with which `attend` takes up the values, for one query of each window.

    Args:
        query, key, value, bias, scale: as `attend` takes them.
        tokens: (B',), the query of each window.

    Returns:
        (B', M, heads).
    """
    heads = value.shape[2]
    windows = torch.arange(len(tokens), device=tokens.device)
    return attention_weights(
        lambda value: attend(query, key, value, bias, scale=scale).unflatten(-1, (heads, -1)),
        value,
        [(windows, tokens)],
    )[0]


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows, with a bias for each relative position.

    (B', N, C) -> (B', N, C), N = P_r * P_c tokens of a window row by row.

    Args:
        dim: channels C.
        num_heads: heads; divides `dim`.
        window_size: rows and columns of tokens in a window, (P_r, P_c).

    Raises:
        ValueError: an argument is none of these.
    """

    def __init__(self, dim: int, num_heads: int, window_size: tuple[int, int]) -> None:
        super().__init__()
        check_whole_number("dim", dim, 1)
        check_whole_number("num_heads", num_heads, 1)
        if dim % num_heads:
            raise ValueError(f"num_heads is {num_heads}: a divisor of dim {dim} is taken")
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.rel_pos_bias = RelPosBias(num_heads, window_size)
        self.proj = Linear(dim, dim)

    @property
    def window_size(self) -> tuple[int, int]:
        """Rows and columns of tokens in a window."""
        return self.rel_pos_bias.window_size

    def forward(
        self,
        windows: torch.Tensor,
        mask: torch.Tensor | None = None,
        *,
        size: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """Attend inside windows.

        Args:
            windows: (B', N, C).
            mask: (B', N) bool, True where a token is attended to; None for all.
            size: rows and columns of tokens in these windows, if they are smaller.

        Returns:
            (B', N, C).
        """
        bias = self.rel_pos_bias(size)
        if mask is not None:
            return self._attend(windows, _masked(bias, mask))
        return in_pieces(
            lambda part: self._attend(part, bias),
            windows,
            3 * windows.shape[1] * windows.shape[2],
            most=_MOST_VALUES,
            piece=_VALUES_OF_PIECE,
        )

    def attention_weights(
        self, windows: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Find what one token of each window attends to.

        Args:
            windows: (B', N, C).
            tokens: (B',), a token of each window.
            mask: as in the forward pass.

        Returns:
            (B', N, heads): the weights of the window's tokens.
        """
        bias = self.rel_pos_bias()
        bias = bias if mask is None else _masked(bias, mask)
        return weights_of_tokens(*self._project(windows), bias, tokens)

    def _project(self, windows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Give query, key and value: (B', N, heads, head_dim) each."""
        return self.qkv(windows).unflatten(-1, (3, self.num_heads, -1)).unbind(2)

    def _attend(self, windows: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return self.proj(attend(*self._project(windows), bias))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"


def _masked(bias: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Take the bias (heads, N, N) of windows whose masked tokens nothing attends to.

    (B', heads, N, N); `mask` is (B', N), True where a token is attended to.
    """
    return bias.masked_fill(~mask[:, None, None], float("-inf"))


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
    windows = attention(partition(x, size, is_grid=is_grid), mask)
    return merge(windows, size, height, width, is_grid=is_grid)


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

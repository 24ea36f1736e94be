"""Windows and grids of a map, and attention inside each.

Legend: B batch, H and W height and width of the map, C channels; B' windows of all images, N
queries and M keys of a window. All maps are NHWC.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from .arguments import check_whole_number
from .attention_maps import attention_weights
from .linear import Linear, in_pieces
from .rel_pos import RelPosBias
from .tracing import Length, is_exporting, is_open

# Values of queries, keys and values that are held at a time, in CPU inference: up to 32 MiB of
# float32 in one piece, which is fastest, and otherwise in pieces of 2 MiB.
_MOST_VALUES = 2**23
_VALUES_OF_PIECE = 2**19


def partition(x: torch.Tensor, size: tuple[int, int], *, is_grid: bool = False) -> torch.Tensor:
    """Cut a map into windows. NHWC.

    Args:
        x: (B, H, W, C); its sides divide by those of `size`.
        size: rows and columns of tokens in a window, (P_r, P_c).
        is_grid: False for windows of adjacent tokens; True for windows of P_r x P_c tokens spread
            evenly over the map, H / P_r and W / P_c apart (MaxViT's grid).

    Returns:
        (B * windows, P_r * P_c, C): all windows of an image before the next image's, windows and
        their tokens row by row.
    """
    batch, height, width = x.shape[:3]
    rows, columns = size
    if is_open(height) or is_open(width):
        x = x.flatten(0, 2).index_select(0, _order_of_windows(x.shape[:3], size, is_grid, x.device))
        num_windows = batch * (height // rows) * (width // columns)
        return x.unflatten(0, (num_windows, rows * columns))
    if is_grid:  # axes: 1 token row, 2 window row, 3 token column, 4 window column
        x = x.unflatten(2, (columns, -1)).unflatten(1, (rows, -1)).permute(0, 2, 4, 1, 3, 5)
    else:  # axes: 1 window row, 2 token row, 3 window column, 4 token column
        x = x.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, rows * columns, x.shape[-1])


def merge(
    windows: torch.Tensor,
    size: tuple[int, int],
    height: int,
    width: int,
    *,
    is_grid: bool = False,
) -> torch.Tensor:
    """Put windows together to the map that they were cut from: the inverse of `partition`. NHWC.

    Args:
        windows: (B * windows, P_r * P_c, C).
        size: rows and columns of tokens in a window, (P_r, P_c).
        height: rows of the map, a multiple of P_r.
        width: columns of the map, a multiple of P_c.
        is_grid: as in `partition`.

    Returns:
        (B, height, width, C).
    """
    rows, columns = size
    if is_open(height) or is_open(width):
        x = windows.flatten(0, 1)
        shape = x.shape[0] // (height * width), height, width
        x = x.index_select(0, _order_of_map(shape, size, is_grid, x.device))
        return x.unflatten(0, shape)
    x = windows.reshape(-1, height // rows, width // columns, rows, columns, windows.shape[-1])
    x = x.permute(0, 3, 1, 4, 2, 5) if is_grid else x.permute(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, height, width, x.shape[-1])


# Views would be other graphs where there is one window along an axis. These orders are computed on
# one axis, that of all tokens, which is never of length 1 without being the map.


def _order_of_windows(
    shape: Sequence[Length], size: tuple[int, int], is_grid: bool, device: torch.device
) -> torch.Tensor:
    """Give the position in maps, row by row, of each token of their windows: (B * H * W,)."""
    batch, height, width = shape
    rows, columns = size
    across, down = width // columns, height // rows  # windows of a map
    position = torch.arange(batch * height * width, device=device)
    window, token = _divmod(position, rows * columns)
    image, window = _divmod(window, down * across)
    token_row, token_column = _divmod(token, columns)
    window_row, window_column = _divmod(window, across)
    if is_grid:
        row, column = token_row * down + window_row, token_column * across + window_column
    else:
        row, column = window_row * rows + token_row, window_column * columns + token_column
    return (image * height + row) * width + column


def _order_of_map(
    shape: Sequence[Length], size: tuple[int, int], is_grid: bool, device: torch.device
) -> torch.Tensor:
    """Give the position in windows of each token of maps, row by row: (B * H * W,)."""
    batch, height, width = shape
    rows, columns = size
    across, down = width // columns, height // rows
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


def _divmod(x: torch.Tensor, by: Length) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide with a remainder, in operators that ONNX has for symbols too."""
    quotient = x // by
    return quotient, x - quotient * by


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

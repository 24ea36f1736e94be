"""Neighborhood attention as ``densezoo bench-kernels`` times it: inputs, definition and peers.

The definition has windows of exactly kernel_size keys along an axis, shifted inside at borders, in
the query's own dilation group (Hassani et al., arXiv 2204.07143 and 2209.15001). Biases are a table
of relative position biases.

Legend: as in `operator_cases`; K kernel size.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from ..kernels import neighborhood_attention
from ..kernels.runtime import which_backend
from .kernel_shapes import NeighborhoodShape
from .operator_cases import (
    FLEX_BLOCK,
    AttentionCase,
    DeclinedError,
    Forward,
    attend,
    compile_flex,
    count_pairs,
    make_block_mask,
    to_heads_first,
    to_map,
)


@dataclass(frozen=True)
class NeighborhoodCase(AttentionCase):
    """A shape of neighborhood attention with its inputs."""

    def make_biases(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Make the table of relative position biases (h, 2K-1, 2K-1)."""
        side = 2 * self.shape.kernel_size - 1
        return (torch.randn(self.shape.num_heads, side, side, generator=generator),)

    def attend_exactly(self, queries: Tensor, *inputs: Tensor) -> Tensor:
        """Attend to the keys of each query's window."""
        q, k, v = (x[0].flatten(0, 1) for x in inputs[:3])  # (N, h, D)
        keys_at, offsets = (x.to(queries.device)[queries] for x in _tabulate(self.shape))
        bias = inputs[3].flatten(1)[:, offsets] if self.has_bias else None
        return attend(q[queries], k[keys_at], v[keys_at], self.shape.head_dim**-0.5, bias)


def window_keys(length: int, kernel_size: int, dilation: int) -> Tensor:
    """List the keys of every query along an axis, ascending: (length, kernel_size) positions."""
    rows = []
    for position in range(length):
        group, member = position % dilation, position // dilation
        group_size = len(range(group, length, dilation))
        start = min(max(member - kernel_size // 2, 0), group_size - kernel_size)
        rows.append([group + dilation * (start + i) for i in range(kernel_size)])
    return torch.tensor(rows)


def _tabulate(shape: NeighborhoodShape) -> tuple[Tensor, Tensor]:
    """List the tokens that every token sees, and their places in the flattened table: (N, K*K)."""
    (height, width), kernel_size, dilation = shape.size, shape.kernel_size, shape.dilation
    rows, columns = (window_keys(n, kernel_size, dilation) for n in (height, width))
    # Queries by row and column, then keys by row and column.
    keys_at = rows[:, None, :, None] * width + columns[None, :, None, :]
    down, right = (
        (keys - torch.arange(len(keys))[:, None]) // dilation + kernel_size - 1
        for keys in (rows, columns)
    )
    offsets = down[:, None, :, None] * (2 * kernel_size - 1) + right[None, :, None, :]
    return keys_at.reshape(shape.num_tokens, -1), offsets.reshape(shape.num_tokens, -1)


def make_ours(case: NeighborhoodCase, is_training: bool) -> Forward:
    """Our operator on the backend of the case."""
    return _call_operator(case, case.backend)


def describe_ours(case: NeighborhoodCase) -> str:
    """Name the backend that our operator takes."""
    query, key, value, *bias = case.inputs
    return which_backend(
        neighborhood_attention,
        query,
        key,
        value,
        case.shape.kernel_size,
        dilation=case.shape.dilation,
        bias=bias[0] if bias else None,
        backend=case.backend,
    ).backend


def make_gather(case: NeighborhoodCase, is_training: bool) -> Forward:
    """Gather the keys and values of every window, then multiply: our reference backend."""
    copies = case.inputs[0].nbytes * case.shape.kernel_size**2
    # Copies of keys and values, and of their gradients.
    case.check_memory(copies * (4 if is_training else 2), "copies of every window")
    return _call_operator(case, "reference")


def _call_operator(case: NeighborhoodCase, backend: str | None) -> Forward:
    shape = case.shape

    def forward(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        return neighborhood_attention(
            query,
            key,
            value,
            shape.kernel_size,
            dilation=shape.dilation,
            bias=bias,
            backend=backend,
        )

    return forward


def make_mask_mod(shape: NeighborhoodShape) -> Callable[..., Tensor]:
    """Make FlexAttention's mask: whether a query sees a key, tokens numbered in raster order."""
    (height, width), kernel_size, dilation = shape.size, shape.kernel_size, shape.dilation

    def is_in_window(query: Tensor, key: Tensor, length: int) -> Tensor:
        group_size = (length - query % dilation + dilation - 1) // dilation
        first = query // dilation - kernel_size // 2
        start = torch.minimum(first.clamp(min=0), group_size - kernel_size)
        member = key // dilation
        is_in_group = key % dilation == query % dilation
        return is_in_group & (member >= start) & (member < start + kernel_size)

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        rows = is_in_window(query // width, key // width, height)
        return rows & is_in_window(query % width, key % width, width)

    return mask_mod


def make_score_mod(shape: NeighborhoodShape, table: Tensor) -> Callable[..., Tensor]:
    """Make FlexAttention's change of scores: the bias by the offset of key minus query.

    Args:
        shape: the map and windows.
        table: (h, 2K-1, 2K-1).
    """
    width, dilation, last = shape.size[1], shape.dilation, 2 * shape.kernel_size - 2

    def offset(query: Tensor, key: Tensor) -> Tensor:
        # Scores are changed before they are masked: pairs outside the window have to read the
        # table somewhere.
        return (key // dilation - query // dilation + last // 2).clamp(0, last)

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        down = offset(query // width, key // width)
        return score + table[head, down, offset(query % width, key % width)]

    return score_mod


def make_window_blocks(shape: NeighborhoodShape, device: torch.device) -> BlockMask:
    """Make FlexAttention's block mask from lists of keys, not from all N x N pairs."""
    num_tokens = shape.num_tokens
    keys_at = _tabulate(shape)[0]
    num_blocks = -(-num_tokens // FLEX_BLOCK)
    query_blocks = torch.arange(num_tokens)[:, None] // FLEX_BLOCK
    pairs = query_blocks * num_blocks + keys_at // FLEX_BLOCK
    seen = torch.bincount(pairs.flatten(), minlength=num_blocks**2).view(1, num_blocks, num_blocks)
    return make_block_mask(seen, make_mask_mod(shape), (num_tokens, num_tokens), device)


def make_flex(case: NeighborhoodCase, is_training: bool) -> Forward:
    """FlexAttention, compiled for the shape."""
    case.check_flex(is_training)
    shape = case.shape
    block_mask = make_window_blocks(shape, case.device)
    compiled = compile_flex(case, count_pairs(case, block_mask))

    def forward(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        # In float32, as scores are: the table's gradient is a long sum.
        score_mod = None if bias is None else make_score_mod(shape, bias.float())
        q, k, v = (to_heads_first(x) for x in (query, key, value))
        out = compiled(q, k, v, score_mod=score_mod, block_mask=block_mask)
        return to_map(out, shape.size)

    return forward


def make_sdpa(case: NeighborhoodCase, is_training: bool) -> Forward:
    """PyTorch's attention over the whole map, with windows and bias in an additive mask.

    Forward, the mask is there before the clock starts; where the table learns, every step makes
    it from the table.
    """
    shape = case.shape
    pairs = shape.num_tokens**2
    maps = case.dtype.itemsize * shape.num_heads * pairs
    # Training holds the mask, and logits and weights of every image, and their gradients.
    maps *= 2 * (1 + 2 * case.batch) if is_training else 2
    case.check_memory(8 * pairs + maps, "masks over all pairs")
    keys_at, offsets = (x.to(case.device) for x in _tabulate(shape))
    outside = (2 * shape.kernel_size - 1) ** 2  # the place of minus infinity, after the table
    places = torch.full((shape.num_tokens,) * 2, outside, device=case.device)
    places.scatter_(1, keys_at, offsets)

    def make_mask(bias: Tensor) -> Tensor:
        values = F.pad(bias.flatten(1), (0, 1), value=float("-inf"))
        return values.index_select(1, places.flatten()).unflatten(1, places.shape)  # (h, N, N)

    if case.has_bias:
        table = case.inputs[3]
    else:
        table = torch.zeros(1, outside, dtype=case.dtype, device=case.device)
    ready = None if is_training and case.has_bias else make_mask(table)

    def forward(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = (to_heads_first(x) for x in (query, key, value))
        mask = make_mask(bias) if ready is None else ready
        return to_map(F.scaled_dot_product_attention(q, k, v, mask), shape.size)

    return forward


def make_natten(case: NeighborhoodCase, is_training: bool) -> Forward:
    """NATTEN as installed: up to 0.17 it takes a bias on all devices, from 0.20 on none."""
    try:
        natten = importlib.import_module("natten")
    except ImportError as error:
        raise DeclinedError("not installed") from error
    functional, shape = importlib.import_module("natten.functional"), case.shape
    windows = dict(kernel_size=shape.kernel_size, dilation=shape.dilation)

    def forward(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return functional.na2d(query, key, value, **windows)

    def forward_by_logits(
        query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        q, k, v = (x.permute(0, 3, 1, 2, 4) for x in (query, key, value))  # (B, h, H, W, D)
        logits = functional.na2d_qk(q * shape.head_dim**-0.5, k, **windows, rpb=bias)
        return functional.na2d_av(logits.softmax(-1), v, **windows).permute(0, 2, 3, 1, 4)

    if hasattr(functional, "na2d_qk"):
        return forward_by_logits
    if case.has_bias:
        raise DeclinedError(f"NATTEN {natten.__version__} takes no bias")
    return forward

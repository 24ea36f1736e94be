"""Neighborhood attention on the CPU: dense attention per tile of queries, in PyTorch's operators.

The queries of a tile attend to the union of their windows, with a mask that holds the bias and
shuts out what is not in the window. `cpu_plan` cuts the grid and groups tiles that share a mask;
where one tile covers a group of dilation (small maps, kernel_size x dilation = length) this is
plain attention within groups.

The forward pass is PyTorch's CPU flash attention over the tiles of a class. The backward pass makes
the weights of some tiles at a time anew. The windows of neighbouring tiles overlap: gradients of
their keys are added one by one, in a fixed order. Both hold copies of a bounded number of tiles,
not of the map; both are deterministic. Sums are made in at least float32.

Shapes: B batch, (H, W) the grid (W = 1 for 1-D), h heads, D channels of a head, n tiles, Q queries
and K keys of a tile, M extra keys.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .. import runtime
from . import cpu_plan
from .cpu_tiles import Bands, Chunk, Tiles
from .windows import Neighborhood

# Elements of the masks of a table that are kept.
_MOST_KEPT = 1 << 18

_Plan = tuple[Tiles, ...] | tuple[Bands, ...]

# {table: (plan, dtype, extra keys, values of the table, masks)}, the latest ones of every table
# that is alive. Values are compared, not versions, which inference tensors lack and which changes
# through `.data` do not count.
_known_masks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _with_masks(
    plan: _Plan,
    bias: Tensor | None,
    neighborhood: Neighborhood,
    num_heads: int,
    dtype: torch.dtype,
    num_extra: int,
) -> Iterable[tuple[Tiles | Bands, Tensor | None]]:
    """Go over the classes with what is added to their logits, None where nothing is.

    A mask is (1, h, Q, K + M) for `Tiles` and (1, n * h, Q, K) for `Bands`, made when it is needed:
    where tiles are few and large, masks are what takes most memory.
    """
    if bias is None:
        table = torch.zeros(1, prod(2 * k - 1 for k in neighborhood.kernel_size), dtype=dtype)
        table = table.expand(num_heads if isinstance(plan[0], Bands) else 1, -1)
        return ((c, None if c.is_full else _mask(c, table, num_extra)) for c in plan)
    known = _known_masks.get(bias)
    if known is not None and known[:3] == (plan, dtype, num_extra) and torch.equal(known[3], bias):
        return zip(plan, known[4], strict=True)
    table = bias.detach().flatten(1).to(dtype)
    masks = ((c, _mask(c, table, num_extra)) for c in plan)
    if num_heads * sum(c.num_masks * c.num_queries * c.num_keys for c in plan) > _MOST_KEPT:
        return masks
    masks = list(masks)
    values = bias.detach().clone()
    _known_masks[bias] = plan, dtype, num_extra, values, [mask for _, mask in masks]
    return masks


def _mask(tiles: Tiles | Bands, table: Tensor, num_extra: int) -> Tensor:
    """Spread a (h, offsets) table over a tile, -inf where a key is not in the window."""
    table = torch.cat([table, table.new_full((len(table), 1), float("-inf"))], dim=1)
    mask = tiles.spread(table)
    return torch.nn.functional.pad(mask, (0, num_extra)) if num_extra else mask


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    neighborhood: Neighborhood,
) -> str | None:
    """Say why this path cannot take a call; None when it can."""
    if neighborhood.num_axes > 2:
        return "it has 1-D and 2-D grids alone"
    return runtime.why_no_cpu_path(query)


class _Tensors(NamedTuple):
    """What both passes go over: (B, H, W, h, D), the extra ones (B, M, h, D) or None."""

    query: Tensor
    key: Tensor
    value: Tensor
    extra_key: Tensor | None
    extra_value: Tensor | None


def _as_2d(neighborhood: Neighborhood) -> Neighborhood:
    """A 1-D neighborhood as that of a grid whose second axis has length 1."""
    if neighborhood.num_axes == 2:
        return neighborhood
    return Neighborhood(
        (*neighborhood.kernel_size, 1),
        (*neighborhood.dilation, 1),
        (*neighborhood.stride, 1),
        (*neighborhood.is_causal, False),
    )


def _map(tensor: Tensor, num_axes: int) -> Tensor:
    """(B, *grid, h, D) as (B, H, W, h, D), the channels of all heads side by side."""
    if num_axes == 1:
        tensor = tensor.unsqueeze(2)
    if tensor.stride(4) == 1 and tensor.stride(3) == tensor.shape[4]:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    neighborhood: Neighborhood,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute the output and the log-sum-exp.

    Args:
        query: (B, *grid, h, D), one or two axes, any strides.
        key: like query.
        value: like query.
        bias: (h, 2 K_1 - 1, ...) or None.
        extra_key: (B, M, h, D) or None.
        extra_value: (B, M, h, D) or None.
        neighborhood: the windows.
        scale: factor of the logits.

    Returns:
        (B, *grid, h, D) and (B, *grid, h), the latter in float32, or in float64 for float64.
    """
    shape = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key, value = (_map(t, neighborhood.num_axes) for t in (query, key, value))
    neighborhood = _as_2d(neighborhood)
    batch, height, width, heads, head_dim = query.shape
    num_extra = 0 if extra_key is None else extra_key.shape[1]
    plan = cpu_plan.forward_plan(
        (height, width), neighborhood, max(batch, 1), heads, head_dim, num_extra > 0
    )
    classes = _with_masks(plan, bias, neighborhood, heads, dtype, num_extra)
    out = torch.empty(query.shape, dtype=query.dtype)
    lse = torch.empty(*query.shape[:4], 1, dtype=dtype)
    if isinstance(plan[0], Bands):
        _forward_bands(plan, classes, query, key, value, scale, out, lse)
    else:
        _forward_tiles(classes, query, key, value, extra_key, extra_value, scale, out, lse)
    return out.view(shape), lse.view(shape[:-1])


def _forward_tiles(
    classes: Iterable[tuple[Tiles, Tensor | None]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Fill `out` and `lse`, (B, H, W, h, D or 1), a chunk of tiles at a time."""
    batch, heads, head_dim = query.shape[0], *query.shape[3:]
    dtype = lse.dtype
    num_extra = 0 if extra_key is None else extra_key.shape[1]
    for tiles, mask in classes:
        for chunk in tiles.chunks(batch, 2 * heads * head_dim * (tiles.num_keys + num_extra)):
            tile_out, tile_lse = _attend(
                chunk.queries(query, dtype),
                chunk.keys(key, extra_key, dtype),
                chunk.keys(value, extra_value, dtype),
                mask,
                scale,
            )
            view = chunk.view(out)
            view.copy_(tile_out.view(view.shape))
            view = chunk.view(lse)
            view.copy_(tile_lse.view(view.shape))


def _forward_bands(
    plan: tuple[Bands, ...],
    classes: Iterable[tuple[Bands, Tensor | None]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Fill `out` and `lse`, (B, H, W, h, D or 1), some rows of tiles at a time."""
    heads, head_dim = query.shape[3:]
    dtype = lse.dtype
    # One for all copies: fresh memory costs more than the copies.
    key_size, query_size = (
        max(getattr(bands, name).numel() if bands.is_copied else 0 for bands in plan)
        * heads
        * head_dim
        for name in ("key_tokens", "query_tokens")
    )
    spaces = query.new_empty(query_size + 2 * key_size).split([query_size, key_size, key_size])
    maps = [t.flatten(3).flatten(1, 2) for t in (query, key, value, out, lse)]  # (B, H * W, h * D)
    for bands, mask in classes:
        for call in bands.calls():
            for query_rows, key_rows, value_rows, out_rows, lse_rows in zip(*maps, strict=True):
                tile_out, tile_lse = _attend(
                    call.queries(query_rows, heads, spaces[0]).to(dtype),
                    call.keys(key_rows, heads, spaces[1]).to(dtype),
                    call.keys(value_rows, heads, spaces[2]).to(dtype),
                    mask,
                    scale,
                )
                call.put(tile_out, out_rows)
                call.put(tile_lse, lse_rows)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend in tiles: (n, h, Q, D) and (n, h, K, D) to (n, Q, h, D) and (n, Q, h), contiguous."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, attn_mask=mask, scale=scale
    )
    return out.transpose(1, 2).contiguous(), lse.transpose(1, 2).contiguous()


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    out: Tensor,
    lse: Tensor,
    neighborhood: Neighborhood,
    scale: float,
    needs_bias_grad: bool = True,
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of query, key, value, bias, extra_key and extra_value.

    Args:
        grad_out: like query, cotangent of the output.
        grad_lse: (B, *grid, h), cotangent of the log-sum-exp, or None.
        query: what `forward` was given, as the arguments that follow.
        key: as above.
        value: as above.
        bias: as above.
        extra_key: as above.
        extra_value: as above.
        out: what `forward` returned.
        lse: what `forward` returned.
        neighborhood: the windows.
        scale: factor of the logits.
        needs_bias_grad: whether to compute that of the bias.

    Returns:
        Gradients in the dtypes of their inputs; None for what was None or is not needed.
    """
    del out, lse  # weights of a tile are made anew, normalised by their own sum
    shape = query.shape
    needs_bias_grad = needs_bias_grad and bias is not None
    dtype = torch.promote_types(query.dtype, torch.float32)
    inputs = _Tensors(
        *(_map(t, neighborhood.num_axes) for t in (query, key, value)), extra_key, extra_value
    )
    grad_out = _map(grad_out, neighborhood.num_axes)
    if grad_lse is not None:
        grad_lse = _map(grad_lse.unsqueeze(-1), neighborhood.num_axes)
    grads = _Tensors(*(None if t is None else t.new_zeros(t.shape, dtype=dtype) for t in inputs))
    neighborhood = _as_2d(neighborhood)
    batch, height, width, heads, head_dim = inputs.query.shape
    plan = cpu_plan.backward_plan((height, width), neighborhood, max(batch, 1), heads, head_dim)
    num_extra = 0 if extra_key is None else extra_key.shape[1]
    # An offset sums thousands of logits' gradients of either sign.
    table_size = bias[0].numel() + 1 if needs_bias_grad else 0
    grad_table = torch.zeros(heads, table_size, dtype=torch.float64)
    for tiles, mask in _with_masks(plan, bias, neighborhood, heads, dtype, num_extra):
        num_keys = tiles.num_keys + num_extra
        grad_mask = torch.zeros(heads, tiles.num_queries, num_keys, dtype=dtype)
        for chunk in tiles.chunks(batch, heads * num_keys * max(2 * head_dim, tiles.num_queries)):
            grad_logits = _backward_chunk(chunk, mask, grad_out, grad_lse, inputs, scale, grads)
            if needs_bias_grad:
                grad_mask += grad_logits.view(-1, *grad_mask.shape).sum(0)
        if needs_bias_grad:
            at = tiles.table_index.expand(heads, -1)
            grad_table.scatter_add_(1, at, grad_mask[..., : tiles.num_keys].flatten(1).double())
    grads = [None if t is None else t.to(query.dtype) for t in grads]
    grad_bias = None
    if needs_bias_grad:
        grad_bias = grad_table[:, :-1].reshape(bias.shape).to(bias.dtype)
    return *(t.view(shape) for t in grads[:3]), grad_bias, *grads[3:]


def _backward_chunk(
    chunk: Chunk,
    mask: Tensor | None,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    inputs: _Tensors,
    scale: float,
    grads: _Tensors,
) -> Tensor:
    """Add a chunk's part of all gradients but that of the bias to `grads`.

    Returns:
        Gradient of the logits, (n * h, Q, K + M).
    """
    dtype = grads.query.dtype
    query = chunk.flat_queries(inputs.query, dtype) * scale
    key = chunk.flat_keys(inputs.key, inputs.extra_key, dtype)
    value = chunk.flat_keys(inputs.value, inputs.extra_value, dtype)
    grad_out = chunk.flat_queries(grad_out, dtype)
    logits = torch.bmm(query, key.transpose(1, 2))
    if mask is not None:
        logits.view(-1, *mask.shape[-3:]).add_(mask)
    weights = logits.softmax(-1)
    grad_value = torch.bmm(weights.transpose(1, 2), grad_out)
    chunk.add_keys(grads.value, grads.extra_value, grad_value)
    grad_weights = torch.bmm(grad_out, value.transpose(1, 2))
    grad_logits = torch._softmax_backward_data(grad_weights, weights, -1, dtype)
    if grad_lse is not None:
        grad_logits += weights * chunk.flat_queries(grad_lse, dtype)
    grad_key = torch.bmm(grad_logits.transpose(1, 2), query)
    chunk.add_keys(grads.key, grads.extra_key, grad_key)
    view = chunk.view(grads.query, is_head_first=True)
    view.copy_(torch.bmm(grad_logits, key).mul_(scale).view(view.shape))
    return grad_logits

"""Routing attention on the CPU: PyTorch's flash attention, of all tokens or of regions' own.

On small maps every token attends to all, with a mask that shuts out the regions that its own does
not route to. On others regions go in chunks of which keys and values fit the cache: these are
gathered by the number of their token from the map, whatever its strides, for one chunk at a time.
`_is_dense` chooses by the time that both take.

The backward pass is that of flash attention, which makes the weights anew from the log-sum-exp;
gradients of a chunk's keys and values are added to those of the map, chunk by chunk in a fixed
order. Both passes are deterministic and make their sums in at least float32. Neither has padded
tokens among the keys: `cpu_padding` adds what they do.

Shapes: B batch, (H, W) the map, N the tokens of all images, h heads, D and E channels of a head of
keys and of values, R regions, n regions of a chunk, Q queries and K keys of a region.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import runtime
from .cpu_chunks import CHUNK, chunks, most_keys, query_view
from .cpu_padding import Padding
from .regions import Regions

# Nanoseconds, fitted to float32 and head_dim 32 on one core of an AMD EPYC (AVX-512); only their
# ratios matter. Measured there beside other work, in milliseconds, regions' own and all tokens:
#   14x14, 8 heads, 49 regions:  topk 16  0.99 and 0.83;  topk 8  0.69 and 0.79;  topk 4  0.52, 0.80
#   16x16, 8 heads, 64 regions:  topk 16  1.55 and 1.38
#   7x7, 8 heads, 49 regions:    topk 16  0.26 and 0.14
#   28x28, 4 heads, 49 regions:  topk 4   1.27 and 9.50
# Attention to regions' own tokens by two batched products and a softmax in place of flash attention
# took as long within 5%, but for regions of at most 6 tokens, where it was 15% faster; its backward
# pass took longer but for regions of 4.
_LOGIT_COST = 1.9
_MASK_COST = 0.25  # of a logit, with that of making the mask
_BLOCK_COST = 1000.0  # up to 32 queries of a head
_COPY_COST = 0.1  # a channel of a key or value that is gathered
_CHUNK_COST = 60_000.0  # the calls of a chunk


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    pad_key: Tensor | None,
    pad_value: Tensor | None,
    regions: Regions,
) -> str | None:
    """Say why this path cannot take a call; None when it can."""
    return runtime.why_no_cpu_path(query)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    pad_key: Tensor | None,
    pad_value: Tensor | None,
    regions: Regions,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute the output and the log-sum-exp.

    Args:
        query: (B, H, W, h, D), any strides.
        key: like query.
        value: (B, H, W, h, E), any strides.
        routes: (B, R, topk).
        pad_key: (h, D), or None for zeros.
        pad_value: (h, E), or None for zeros.
        regions: the regions of the map.
        scale: factor of the logits.

    Returns:
        (B, H, W, h, E) and (B, H, W, h), the latter in float32, or in float64 for float64.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    padding = Padding.of(query, value, routes, pad_key, pad_value, regions, scale, dtype)
    if _is_dense(query, value, routes, regions):
        out, lse = _forward_dense(query, key, value, routes, regions, scale, dtype)
    else:
        out, lse = _forward_chunks(query, key, value, routes, regions, scale, dtype)
    if padding is not None:
        padding.merge(_rows(query), _rows(out), _rows(lse.unsqueeze(-1)))
    return out, lse


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    pad_key: Tensor | None,
    pad_value: Tensor | None,
    out: Tensor,
    lse: Tensor,
    regions: Regions,
    scale: float,
    needs_pad_grad: bool = True,
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of query, key, value, pad_key and pad_value.

    Args:
        grad_out: like `out`, its cotangent, any strides.
        query: what `forward` was given, as the arguments that follow.
        key: as above.
        value: as above.
        routes: as above.
        pad_key: as above.
        pad_value: as above.
        out: what `forward` returned.
        lse: what `forward` returned.
        regions: the regions of the map.
        scale: factor of the logits.
        needs_pad_grad: whether to compute those of pad_key and pad_value.

    Returns:
        Gradients in the dtypes of their inputs; None for what was None or is not needed.
    """
    run = _backward_dense if _is_dense(query, value, routes, regions) else _backward_chunks
    grads = run(grad_out, query, key, value, routes, out, lse, regions, scale)
    pads = pad_key, pad_value
    grad_pads = [None if token is None else torch.zeros_like(token) for token in pads]
    padding = Padding.of(query, value, routes, *pads, regions, scale, lse.dtype)
    if padding is not None:
        rows = map(_rows, (grad_out, query, out, lse.unsqueeze(-1), grads[0]))
        grad_pads = padding.backward(*rows)
    return (
        *(grad.to(query.dtype) for grad in grads),
        *(
            grad.to(token.dtype) if needs_pad_grad and token is not None else None
            for token, grad in zip(pads, grad_pads, strict=True)
        ),
    )


def _is_dense(query: Tensor, value: Tensor, routes: Tensor, regions: Regions) -> bool:
    """Whether attention of all tokens takes less time than that of regions' own.

    The estimate is of the forward pass; the backward pass takes two to three times as long in
    either form.
    """
    batch, height, width, heads, head_dim = query.shape
    num_tokens = height * width
    if num_tokens > heads * (head_dim + value.shape[4]):
        return False  # the mask would be larger than keys and values
    if (regions.rows - 1) * regions.height >= height:
        return False  # regions without a token on the map may be all that another routes to
    if (regions.columns - 1) * regions.width >= width:
        return False
    num_keys = routes.shape[2] * regions.area
    blocks, region_blocks = -(-num_tokens // 32), regions.count * -(-regions.area // 32)
    dense = blocks * _BLOCK_COST + num_tokens**2 * (_LOGIT_COST + _MASK_COST)
    copies = regions.count * num_keys * (head_dim + value.shape[4])
    own = region_blocks * _BLOCK_COST + num_tokens * num_keys * _LOGIT_COST + copies * _COPY_COST
    # Of all heads of all images.
    dense, own, copies = (batch * heads * one for one in (dense, own, copies))
    return dense + _CHUNK_COST < own + _CHUNK_COST * -(-copies // CHUNK)


def _forward_dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    regions: Regions,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Attend to the tokens on the map: (B, H, W, h, E) and (B, H, W, h)."""
    grid = query.shape[1:3]
    mask = _dense_mask(routes, regions, tuple(grid), dtype)
    out, lse = _attend(*(_tokens(t, dtype) for t in (query, key, value)), mask, scale)
    return out.to(query.dtype).unflatten(1, grid).contiguous(), lse.unflatten(1, grid).contiguous()


def _backward_dense(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    out: Tensor,
    lse: Tensor,
    regions: Regions,
    scale: float,
) -> list[Tensor]:
    """Give the gradients of query, key and value, in the dtype of `lse`."""
    grid = query.shape[1:3]
    mask = _dense_mask(routes, regions, tuple(grid), lse.dtype)
    maps = (_tokens(t, lse.dtype) for t in (grad_out, query, key, value, out))
    grads = _attend_backward(*maps, lse.flatten(1, 2), mask, scale)
    return [grad.unflatten(1, grid).contiguous() for grad in grads]


def _dense_mask(
    routes: Tensor, regions: Regions, grid: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """Give the logarithm of how often a token attends to another: (B, 1, H * W, H * W)."""
    times = routes.new_zeros(len(routes), regions.count, regions.count, dtype=dtype)
    times.scatter_add_(2, routes, routes.new_ones((), dtype=dtype).expand(routes.shape))
    region = _region_of_tokens(regions, grid)
    # Single values in the smaller table, whole rows in the larger one.
    return times.log_().index_select(2, region).index_select(1, region).unsqueeze(1)


@lru_cache(maxsize=128)
def _region_of_tokens(regions: Regions, grid: tuple[int, int]) -> Tensor:
    """Give the number of every token's region: (H * W,)."""
    rows, columns = (torch.arange(length, device="cpu") for length in grid)
    rows = rows // regions.height * regions.columns
    return (rows[:, None] + columns // regions.width).flatten()


def _forward_chunks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    regions: Regions,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Attend to the tokens on the map: (B, H, W, h, E) and (B, H, W, h)."""
    grid, heads = tuple(query.shape[1:3]), query.shape[3]
    out = query.new_empty(value.shape)
    lse = query.new_empty(query.shape[:4], dtype=dtype)
    key, value = _rows(key), _rows(value)
    query, out_view, lse_view = (
        query_view(_rows(t), regions, grid) for t in (query, out, lse.unsqueeze(-1))
    )
    channels = key.shape[1] + value.shape[1]
    spaces = _spaces(key, value, most_keys(routes, regions, channels))
    for chunk in chunks(routes, regions, grid, channels):
        q = chunk.queries(query, heads, dtype)
        if chunk.num_keys:
            k, v = (
                chunk.keys(t, heads, space).to(dtype)
                for t, space in zip((key, value), spaces, strict=True)
            )
            tile, tile_lse = _attend(q, k, v, chunk.mask(dtype), scale)
        else:
            tile = q.new_zeros(*q.shape[:3], value.shape[1] // heads)
            tile_lse = q.new_full(q.shape[:3], float("-inf"))
        chunk.put(tile, out_view)
        chunk.put(tile_lse, lse_view)
    return out, lse


def _backward_chunks(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    out: Tensor,
    lse: Tensor,
    regions: Regions,
    scale: float,
) -> list[Tensor]:
    """Give the gradients of query, key and value, in the dtype of `lse`."""
    grid, heads, dtype = tuple(query.shape[1:3]), query.shape[3], lse.dtype
    grads = [t.new_zeros(t.shape, dtype=dtype) for t in (query, key, value)]
    grad_query, grad_key, grad_value = map(_rows, grads)
    key, value = _rows(key), _rows(value)
    grad_out, query, out, lse, grad_query = (
        query_view(t, regions, grid)
        for t in (*map(_rows, (grad_out, query, out, lse.unsqueeze(-1))), grad_query)
    )
    # Gradients of keys and values take as much as these again.
    channels = 2 * (key.shape[1] + value.shape[1])
    spaces = _spaces(key, value, most_keys(routes, regions, channels))
    for chunk in chunks(routes, regions, grid, channels):
        if chunk.num_keys == 0:
            continue
        do, q, o, tile_lse = (chunk.queries(t, heads, dtype) for t in (grad_out, query, out, lse))
        k, v = (
            chunk.keys(t, heads, space).to(dtype)
            for t, space in zip((key, value), spaces, strict=True)
        )
        dq, dk, dv = _attend_backward(
            do, q, k, v, o, tile_lse.squeeze(-1), chunk.mask(dtype), scale
        )
        chunk.put(dq, grad_query)
        chunk.add_keys(dk, grad_key)
        chunk.add_keys(dv, grad_value)
    return grads


def _rows(tokens: Tensor) -> Tensor:
    """(B, H, W, h, D) as (N, h * D), channels side by side; a copy where strides are others."""
    rows = tokens.flatten(3).flatten(0, 2)
    is_plain = rows.stride(1) == 1 and rows.stride(0) >= rows.shape[1]
    return rows if is_plain else rows.contiguous()


def _tokens(tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, H, W, h, D) as (B, H * W, h, D)."""
    batch, height, width, heads, _ = tokens.shape
    return _rows(tokens).to(dtype).unflatten(1, (heads, -1)).unflatten(0, (batch, height * width))


def _spaces(key: Tensor, value: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """Make room for the keys and values of a chunk, (keys, h * D) and (keys, h * E).

    One for all chunks: fresh memory costs more than the copies.
    """
    return tuple(rows.new_empty(num_keys, rows.shape[1]) for rows in (key, value))


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend in regions: (n, Q, h, D), (n, K, h, D), (n, K, h, E) to (n, Q, h, E), (n, Q, h)."""
    num_channels = value.shape[3]
    query, key, value = (t.transpose(1, 2) for t in _as_wide(query, key, value))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, attn_mask=_for_all(mask, query), scale=scale
    )
    return out.transpose(1, 2)[..., :num_channels], lse.transpose(1, 2)


def _attend_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the gradients of query, key and value of `_attend`.

    Output and log-sum-exp may be those of these keys and of more.
    """
    dims = query.shape[3], key.shape[3], value.shape[3]
    grad_out, query, key, value, out = (
        t.transpose(1, 2) for t in _as_wide(grad_out, query, key, value, out)
    )
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out,
        query,
        key,
        value,
        out,
        lse.transpose(1, 2),
        0.0,
        False,
        attn_mask=_for_all(mask, query),
        scale=scale,
    )
    return tuple(grad.transpose(1, 2)[..., :dim] for grad, dim in zip(grads, dims, strict=True))


def _as_wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Give all as many channels, which flash attention wants; zeros change nothing."""
    most = max(t.shape[-1] for t in tensors)
    return tuple(F.pad(t, (0, most - t.shape[-1])) if t.shape[-1] < most else t for t in tensors)


def _for_all(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """Spread a mask over heads and queries, without a copy: (n, 1, Q or 1, K) to (n, h, Q, K)."""
    return None if mask is None else mask.expand(-1, query.shape[1], query.shape[2], -1)

"""Which regions a region attends to: those whose mean key is nearest to its mean query."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import checks
from .checks import check_maps, check_pads, check_topk, checked_regions
from .regions import Regions, are_known, grid_of


def route_regions(
    query: Tensor,
    key: Tensor,
    num_regions: int | Sequence[int],
    topk: int,
    *,
    region_size: int | Sequence[int] | None = None,
    pad_query: Tensor | None = None,
    pad_key: Tensor | None = None,
) -> Tensor:
    """Choose for every region of a map the `topk` regions that it attends to.

    The descriptor of a region is the mean of its tokens, of queries and of keys, all heads and
    channels together; kept are the regions whose mean keys have the largest products with the
    mean query. Computed in at least float32, also under autocast; no gradient passes.

    Args:
        query: (B, H, W, heads, head_dim), any strides.
        key: like query.
        num_regions: regions along each axis; see
            :func:`densezoo.kernels.routing_attention`.
        topk: regions to keep, 1 to the number of regions.
        region_size: tokens of a region along each axis; see there.
        pad_query: (heads, head_dim), query of the tokens of regions that are not on the map, which
            then count in the means. Without it and `pad_key` the means are over the tokens on the
            map, and zero for regions that have none.
        pad_key: (heads, head_dim), their key.

    Returns:
        Numbers of regions (B, regions, topk), int64, counted row by row. Their order has no
        meaning.

    Raises:
        ValueError: shapes, dtypes or devices do not belong together, an argument is out of its
            range, or products are NaN; the latter is looked for in eager mode alone, and makes a
            GPU wait.

    Source: Zhu et al., "BiFormer: Vision Transformer with Bi-Level Routing Attention", CVPR 2023,
    arXiv 2303.08810, section 3.2.
    """
    tensors = dict(query=query, key=key, pad_query=pad_query, pad_key=pad_key)
    checks.check_tensors(tensors, optional=("pad_query", "pad_key"))
    check_maps(query, key)
    if (pad_query is None) != (pad_key is None):
        given, missing = ("pad_query", "pad_key")[:: 1 if pad_key is None else -1]
        raise ValueError(f"{missing} is None but {given} is not: both are taken, or neither")
    if not torch.jit.is_tracing():  # there sizes are tensors
        check_pads(pad_query=(pad_query, query), pad_key=(pad_key, key))
    cast = checks.cast_under_autocast(tensors.values())
    checks.check_alike(dict(zip(tensors, cast, strict=True)))
    regions = checked_regions(query, num_regions, region_size)
    check_topk(topk, regions)
    grid = grid_of(query)
    is_known = are_known(*grid, regions.rows, regions.columns, regions.height, regions.width)
    num_real = None  # all of a region's tokens
    if not is_known or regions.padded_grid != grid:
        num_real = regions.num_real(grid, query.device)[:, None]
    with checks.without_autocast(query.device):
        q = _describe(query.detach(), pad_query, regions, num_real, is_known)
        k = _describe(key.detach(), pad_key, regions, num_real, is_known)
        products, routes = torch.topk(q @ k.transpose(1, 2), topk, sorted=False)
    # NaN is the largest of all to topk.
    if checks.can_be_read(products) and products.isnan().any():
        raise ValueError(
            "query and key have NaN among the products of their means over regions: finite numbers "
            "are taken"
        )
    return routes


def _describe(
    tokens: Tensor,
    pad_token: Tensor | None,
    regions: Regions,
    num_real: Tensor | None,
    is_known: bool,
) -> Tensor:
    """Average the tokens of each region: (B, H, W, h, D) to (B, R, h * D), at least float32."""
    height, width = grid_of(tokens)
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    # One axis after the other: the first pass makes the map a region's height times smaller
    # without a copy of it, also where regions do not divide it.
    sum_along = _sum_along if is_known else _sum_along_open
    sums = sum_along(1, tokens.flatten(3), height, regions.rows, regions.height, dtype)
    sums = sum_along(2, sums, width, regions.columns, regions.width, dtype).flatten(1, 2)
    if num_real is None:
        return sums / regions.area
    if pad_token is None:
        return sums / num_real.clamp_min(1)
    padding = (regions.area - num_real).to(dtype) * pad_token.detach().flatten().to(dtype)
    return (sums + padding) / regions.area


def _sum_along(
    axis: int, tokens: Tensor, length: int, count: int, size: int, dtype: torch.dtype
) -> Tensor:
    """Add `size` neighbours of an axis at a time, `count` times; beyond its end there is zero."""
    if count * size == length:
        return tokens.unflatten(axis, (count, size)).sum(axis + 1, dtype=dtype)
    num_whole = length // size
    body = tokens.narrow(axis, 0, num_whole * size).unflatten(axis, (num_whole, size))
    rest = tokens.narrow(axis, num_whole * size, length - num_whole * size)
    sums = torch.cat(
        [body.sum(axis + 1, dtype=dtype), rest.sum(axis, keepdim=True, dtype=dtype)], dim=axis
    )
    # The sum of the rest is superfluous where nothing is left for it.
    after = [0, 0] * (tokens.ndim - 1 - axis)
    return F.pad(sums, (*after, 0, count - num_whole)).narrow(axis, 0, count)


def _sum_along_open(
    axis: int, tokens: Tensor, length: int, count: int, size: int, dtype: torch.dtype
) -> Tensor:
    """Do the same in a graph for all sizes: a product with what tells tokens from those of others.

    A view with an axis of `size` would be one for which compilers tell 1 from larger sizes.
    """
    first = size * torch.arange(count, device=tokens.device)[:, None]
    position = torch.arange(length, device=tokens.device)
    is_in = ((first <= position) & (position < first + size)).to(dtype)  # (count, length)
    # No open axes become one here: exporters cannot prove that they come apart again.
    return (tokens.to(dtype).movedim(axis, -1) @ is_in.T).movedim(-1, axis)

"""Routing attention in plain PyTorch: the definition that every other path is held to.

It gathers the keys and values of the kept regions, which takes topk times the memory of the keys;
any device and dtype. Derivatives are PyTorch's own, forward-mode and higher ones included. Tokens
change their order by tables of places, not by pads and views: a compiler's one graph then serves
maps that regions divide and others.

Shapes: B batch, (H, W) the map, R regions of T tokens, k kept regions, h heads, D channels of a
head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .regions import Regions, grid_of


def routing_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    pad_key: Tensor | None,
    pad_value: Tensor | None,
    regions: Regions,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute softmax(scale * q k^T) v over the tokens of the regions that each region routes to.

    Products are made in the inputs' dtype; logits are softmaxed in at least float32.

    Args:
        query: (B, H, W, heads, head_dim); any strides, as all inputs.
        key: like query.
        value: (B, H, W, heads, value_dim).
        routes: (B, regions, topk), int64; a region that is listed twice counts twice.
        pad_key: (heads, head_dim), key of the tokens of regions that are not on the map; None: 0.
        pad_value: (heads, value_dim), their value.
        regions: the regions of the map.
        scale: factor of the logits.

    Returns:
        The output (B, H, W, heads, value_dim) and the natural logarithm of the softmax's
        denominator (B, H, W, heads), the latter in float32, or in float64 for float64.
    """
    batch, heads = query.shape[0], query.shape[3]
    height, width = grid_of(query)
    q = _per_head(split_into_regions(query * scale, None, regions).flatten(0, 1))
    k = _per_head(gather_regions(split_into_regions(key, pad_key, regions), routes).flatten(0, 1))
    v = gather_regions(split_into_regions(value, pad_value, regions), routes).flatten(0, 1)
    logits = q @ k.transpose(1, 2)  # (BRh, T, kT)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    out = logits.softmax(dim=-1).to(value.dtype) @ _per_head(v)
    lse = logits.logsumexp(dim=-1, keepdim=True)
    place = regions.numbers((height, width), query.device)

    def on_map(tokens: Tensor) -> Tensor:
        tokens = tokens.unflatten(0, (batch, regions.count, heads)).transpose(2, 3).flatten(1, 2)
        return tokens.index_select(1, place).unflatten(1, (height, width))

    return on_map(out), on_map(lse).squeeze(-1)


def _per_head(tokens: Tensor) -> Tensor:
    """(BR, tokens, h, D) to (BRh, tokens, D): one axis for what a product is made for each of."""
    return tokens.transpose(1, 2).flatten(0, 1)


def split_into_regions(tokens: Tensor, pad_token: Tensor | None, regions: Regions) -> Tensor:
    """Put the tokens of a map in order of regions: (B, H, W, h, D) to (B, R, T, h, D).

    Those that are not on the map are `pad_token` (h, D), or zeros.
    """
    row, column = regions.places(tokens.device)
    height, width = grid_of(tokens)
    is_real = (row < height) & (column < width)
    # A token elsewhere stands in for one that is not there.
    place = row.clamp_max(height - 1) * width + column.clamp_max(width - 1)
    split = tokens.flatten(1, 2).index_select(1, place)
    absent = tokens.new_zeros(()) if pad_token is None else pad_token
    split = torch.where(is_real[:, None, None], split, absent)
    return split.unflatten(1, (regions.count, regions.area))


def gather_regions(tokens: Tensor, routes: Tensor) -> Tensor:
    """Take the tokens of the kept regions: (B, R, T, h, D) and (B, R, k) to (B, R, kT, h, D)."""
    batch, count = tokens.shape[:2]
    kept = routes.flatten()
    image = torch.div(
        torch.arange(kept.shape[0], device=kept.device),
        count * routes.shape[2],
        rounding_mode="floor",
    )
    gathered = tokens.flatten(0, 1).index_select(0, image * count + kept)
    return gathered.unflatten(0, (batch, count, routes.shape[2])).flatten(2, 3)

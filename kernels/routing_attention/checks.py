"""Checks of calls of routing attention: each a ValueError that names the argument."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import checks
from ..checks import shape
from .regions import Regions, are_known, cut, grid_of, plain_sizes

TENSOR_NAMES = ("query", "key", "value", "routes", "pad_key", "pad_value")
Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def checked_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    num_regions: int | Sequence[int],
    scale: float | None,
    region_size: int | Sequence[int] | None,
    pad_key: Tensor | None,
    pad_value: Tensor | None,
    is_range_known: bool = False,
) -> tuple[Tensors, Regions, float]:
    """Check the arguments of a call; give its tensors (cast, under autocast), regions and scale.

    `is_range_known` says that routes need no look at their range.
    """
    tensors = (query, key, value, routes, pad_key, pad_value)
    checks.check_tensors(
        dict(zip(TENSOR_NAMES, tensors, strict=True)), optional=("pad_key", "pad_value")
    )
    check_maps(query, key)
    if not torch.jit.is_tracing():  # there sizes are tensors
        checks.check_values(value, query)
        check_pads(pad_key=(pad_key, query), pad_value=(pad_value, value))
    regions = checked_regions(query, num_regions, region_size)
    _check_routes(routes, query, regions, is_range_known)
    scale = checks.checked_scale(scale, query.shape[-1])
    tensors = checks.cast_under_autocast(tensors)
    named = dict(zip(TENSOR_NAMES, tensors, strict=True))
    del named["routes"]
    checks.check_alike(named)
    return tensors, regions, scale


def check_maps(query: Tensor, key: Tensor) -> None:
    """Raise a ValueError unless both are (B, H, W, heads, head_dim) with a token and an image."""
    checks.check_maps(query, key)
    if not torch.jit.is_tracing() and query.shape[0] == 0:  # there sizes are tensors
        raise ValueError(f"query has shape {shape(query)}: at least 1 image is taken")


def check_pads(**pads: tuple[Tensor | None, Tensor]) -> None:
    """Raise a ValueError unless what padded tokens carry is a token of its map, or None."""
    for name, (token, tokens) in pads.items():
        if token is not None and token.shape != tokens.shape[3:]:
            raise ValueError(
                f"{name} has shape {shape(token)}: that of one token, {shape(tokens)[3:]}, is "
                "taken, or None"
            )


def checked_regions(
    query: Tensor, num_regions: int | Sequence[int], region_size: int | Sequence[int] | None
) -> Regions:
    """Check what describes the regions, and cut the map."""
    pairs: dict[str, Any] = {"num_regions": num_regions}
    if region_size is not None:
        pairs["region_size"] = region_size
    for name, value in pairs.items():
        pair = checks.per_axis(name, value, 2)
        if not torch.jit.is_tracing():  # there sizes are tensors
            checks.check_whole_numbers(name, pair, 1)
            pair = tuple(int(size) if isinstance(size, np.integer) else size for size in pair)
        pairs[name] = plain_sizes(pair)
    return cut(grid_of(query), **pairs)


def check_topk(topk: int, regions: Regions) -> None:
    """Raise a ValueError unless there are that many regions to keep."""
    if torch.jit.is_tracing():  # there sizes are tensors
        return
    if not checks.is_whole_number(topk) or topk < 1:
        raise ValueError(f"topk is {checks.brief(topk)}: a whole number of at least 1 is taken")
    if are_known(topk, regions.count) and topk > regions.count:
        raise ValueError(
            f"topk is {topk}: at most the number of regions, {regions.count} "
            f"({regions.rows} x {regions.columns}), is taken"
        )


def _check_routes(routes: Tensor, query: Tensor, regions: Regions, is_range_known: bool) -> None:
    if routes.dtype != torch.int64:
        raise ValueError(f"routes has dtype {routes.dtype}: torch.int64 is taken")
    checks.check_device("routes", routes, "query", query)
    expected = (query.shape[0], regions.count)
    is_wrong = are_known(*routes.shape, *expected) and (
        tuple(routes.shape[:2]) != expected or routes.shape[2:] == (0,)
    )
    if routes.ndim != 3 or is_wrong:
        raise ValueError(
            f"routes has shape {shape(routes)}: (B, regions, topk) is taken, here "
            f"({expected[0]}, {expected[1]}, topk) for {regions.rows} x {regions.columns} regions"
        )
    if is_range_known or not checks.can_be_read(routes):
        return
    lowest, highest = (int(end) for end in routes.aminmax())
    if lowest < 0 or highest >= regions.count:
        raise ValueError(
            f"routes holds {lowest if lowest < 0 else highest}: numbers of regions, 0 to "
            f"{regions.count - 1}, are taken"
        )

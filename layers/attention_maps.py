"""What single positions of a map attend to: maps of attention weights, for pictures.

A module that attends has ``attention_maps(*inputs, size=..., points=...)``, where `inputs` are
those of its own forward pass on one image, so that a hook can catch them and ask. It gives a dict:
what the attention is, in a few words, -> `AttentionMaps`.

Attention is linear in its values. The derivative of a query's output in the values is therefore
its weights, and those of the very operator that the layer runs, whichever that is.

Legend: H and W height and width of the map, P points (queries) of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

# Row and column of a position of a map.
Point = tuple[int, int]


class AttentionMaps(NamedTuple):
    """What each of P positions of a map attends to.

    Attributes:
        weights: (P, heads, rows, columns), the weight of each cell of the map.
        elsewhere: (P, heads), the weight of all that has no place on the map: padding, carriers.
            With `weights` it sums to 1.
        cell: rows and columns of the map's positions that a cell covers.
    """

    weights: torch.Tensor
    elsewhere: torch.Tensor
    cell: tuple[float, float] = (1.0, 1.0)


def attention_weights(
    attend: Callable[[torch.Tensor], torch.Tensor],
    value: torch.Tensor,
    queries: Sequence[tuple[int, ...]],
) -> torch.Tensor:
    """Find the weights with which single queries take up the values.

    Args:
        attend: from values like `value` to outputs (..., heads, head_dim), linear.
        value: (..., heads, head_dim); its shape, dtype and device alone matter.
        queries: index of each query in the leading axes of the outputs.

    Returns:
        (queries, ..., heads): the weights, in the layout of `value`.
    """
    with torch.enable_grad():
        value = torch.zeros_like(value).requires_grad_()
        outputs = attend(value)
        weights = [
            torch.autograd.grad(outputs[query][..., 0].sum(), value, retain_graph=True)[0]
            for query in queries
        ]
    return torch.stack(weights)[..., 0]


class RoutedRegions(NamedTuple):
    """Where the regions of P positions of a map are routed to.

    Attributes:
        grid: rows and columns of regions.
        size: rows and columns of the map's positions that a region covers.
        regions: the region of each position, row by row.
        routes: the regions that it is routed to, in no order.
    """

    grid: tuple[int, int]
    size: tuple[int, int]
    regions: Sequence[int]
    routes: Sequence[Sequence[int]]


def maps_of_all(
    weights: torch.Tensor, size: tuple[int, int], cell: tuple[float, float] = (1.0, 1.0)
) -> AttentionMaps:
    """Put weights of all of a map's cells on it: (P, rows * columns, heads), `size` of cells."""
    weights = weights.transpose(1, 2)
    return AttentionMaps(weights.unflatten(-1, size), weights.new_zeros(weights.shape[:2]), cell)


def maps_of_grid(weights: torch.Tensor, size: tuple[int, int]) -> AttentionMaps:
    """Cut the map out of weights on a padded one: (P, rows, columns, heads), to H rows, W columns.

    Padding is at the bottom and right.
    """
    height, width = size
    weights = weights.permute(0, 3, 1, 2)
    below, beside = weights[:, :, height:], weights[:, :, :height, width:]
    elsewhere = below.sum((2, 3)) + beside.sum((2, 3))
    return AttentionMaps(weights[:, :, :height, :width], elsewhere)

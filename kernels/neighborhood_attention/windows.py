"""Which keys a query of neighborhood attention sees: the geometry, shared by all paths.

An axis of length L and dilation d falls apart into d groups: position p is member p // d of group
p mod d. A query sees keys of its own group alone, so that starts, ends and offsets of windows are
counted in members of the group, not in positions.

Source: NATTEN's definition of neighborhood attention (Hassani et al., CVPR 2023, arXiv 2204.07143;
dilation: arXiv 2209.15001; stride and causality: arXiv 2504.16922).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Neighborhood:
    """The windows of a call, one entry an axis of the grid, all of them checked.

    Attributes:
        kernel_size: keys of a window, at least 2.
        dilation: distance of neighbouring keys of a window, positions; kernel_size x dilation is
            at most the length of the axis.
        stride: queries that share a window, from 1 to kernel_size.
        is_causal: whether keys after the query are left out.
    """

    kernel_size: tuple[int, ...]
    dilation: tuple[int, ...]
    stride: tuple[int, ...]
    is_causal: tuple[bool, ...]

    @property
    def num_axes(self) -> int:
        """Axes of the grid."""
        return len(self.kernel_size)

    @property
    def window_area(self) -> int:
        """Keys of a window over all axes."""
        return prod(self.kernel_size)

    @property
    def spans(self) -> tuple[int, ...]:
        """Kernel size x dilation along each axis: the least lengths that the windows fit into."""
        return tuple(k * d for k, d in zip(self.kernel_size, self.dilation, strict=True))


class AxisWindows(NamedTuple):
    """The windows along one axis of length L, int64 tensors of shape (L,).

    Attributes:
        group: dilation group of a position.
        index: which member of its group a position is.
        start: first member of the group that the query at a position sees.
        end: one past the last member that it sees.
    """

    group: Tensor
    index: Tensor
    start: Tensor
    end: Tensor


def axis_windows(
    length: int,
    kernel_size: int,
    dilation: int = 1,
    stride: int = 1,
    is_causal: bool = False,
    *,
    device: torch.device | str | None = None,
) -> AxisWindows:
    """Compute the window of every position of an axis.

    Windows of ``kernel_size`` members are shifted inside at the ends of their group, never cut;
    an even one reaches one member further back than ahead. The queries of a stride group share
    the window of one of them, its leader. Causal windows start where that of the last query of
    the stride group does and end at the query itself, so that they may hold fewer members.

    Args:
        length: positions along the axis; may be symbolic, when a model is traced.
        kernel_size: keys of a window.
        dilation: number of groups.
        stride: queries that share a window.
        is_causal: whether keys after the query are left out.
        device: where the tensors are made.
    """
    position = torch.arange(length, device=device)
    group, index = position % dilation, position // dilation
    group_size = (length - group + (dilation - 1)) // dilation
    first_of_stride = index // stride * stride
    if is_causal:
        leader = torch.minimum(first_of_stride + (stride - 1), group_size - 1)
        start = (leader - (kernel_size - 1)).clamp(min=0)
        return AxisWindows(group, index, start, index + 1)
    leader = first_of_stride + stride // 2
    start = torch.minimum((leader - kernel_size // 2).clamp(min=0), group_size - kernel_size)
    return AxisWindows(group, index, start, start + kernel_size)

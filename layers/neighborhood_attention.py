"""Neighborhood attention as a layer: projections, relative position bias, padding of small maps.

Legend: B batch, H and W height and width of the map, C channels. All maps are NHWC.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..kernels import neighborhood_attention
from .arguments import check_whole_number
from .attention_maps import AttentionMaps, Point, attention_weights, maps_of_grid
from .linear import Linear
from .resolution import crop, pad_axis
from .tracing import larger
from .weight_init import trunc_normal_


class NeighborhoodAttention(nn.Module):
    """Multi-head attention of each position to its kernel_size x kernel_size neighbours. NHWC.

    (B, H, W, C) -> (B, H, W, C). With a dilation d, neighbours are d positions apart. At borders
    the neighborhood is shifted inside: every position has as many neighbours.

    A side under kernel_size * dilation is padded to that, at the bottom or right, with positions
    of a zero input: their keys and values are the bias of `qkv`, and they are attended to as any
    neighbour is. That is what NATTEN 0.14's module does, which published weights depend on.

    Hassani et al., arXiv:2204.07143; dilation: Hassani and Shi, arXiv:2209.15001.

    Args:
        dim: channels C.
        num_heads: heads; divides `dim`.
        kernel_size: neighbours per axis; odd, at least 3.
        dilation: positions from a neighbour to the next, per axis.

    Raises:
        ValueError: an argument is none of these.
    """

    def __init__(self, dim: int, num_heads: int, kernel_size: int = 7, dilation: int = 1) -> None:
        super().__init__()
        check_whole_number("dim", dim, 1)
        check_whole_number("num_heads", num_heads, 1)
        check_whole_number("kernel_size", kernel_size, 3)
        check_whole_number("dilation", dilation, 1)
        if dim % num_heads:
            raise ValueError(f"num_heads is {num_heads}: a divisor of dim {dim} is taken")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {kernel_size}: an odd number is taken")
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.qkv = Linear(dim, 3 * dim)
        table = torch.empty(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1)
        self.rel_pos_bias = nn.Parameter(table)
        self.proj = Linear(dim, dim)
        trunc_normal_(self.rel_pos_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[1:3]
        x = self._attend(*self._project(x))
        return self.proj(crop(x.flatten(3), height, width))

    def attention_maps(
        self, x: torch.Tensor, *, size: tuple[int, int], points: Sequence[Point]
    ) -> dict[str, AttentionMaps]:
        """Show what positions of a map attend to.

        Args:
            x: (1, H, W, C), as in the forward pass.
            size: H and W.
            points: rows and columns of positions.

        Returns:
            One entry, named by kernel size and dilation.
        """
        query, key, value = self._project(x)
        weights = attention_weights(
            lambda value: self._attend(query, key, value), value, [(0, *point) for point in points]
        )
        kind = f"neighborhood {self.kernel_size}x{self.kernel_size}"
        kind += f", dilation {self.dilation}" if self.dilation > 1 else ""
        return {kind: maps_of_grid(weights[:, 0], size)}

    def _project(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Give query, key and value of the padded map."""
        qkv = self._pad(self._pad(self.qkv(x), 1), 2)
        return qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(3)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return neighborhood_attention(
            query, key, value, self.kernel_size, dilation=self.dilation, bias=self.rel_pos_bias
        )

    def _pad(self, qkv: torch.Tensor, axis: int) -> torch.Tensor:
        """Extend an axis of (B, H, W, 3C) to kernel_size * dilation by what zeros project to."""
        length = larger(qkv.shape[axis], self.kernel_size * self.dilation)
        return pad_axis(qkv, axis, length, self.qkv.bias)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, kernel_size={self.kernel_size}, dilation={self.dilation}"
        )

"""Bi-level routing attention as a layer: projections, both published forms of padding, LePE.

Legend: B batch, H and W height and width of the map, C channels. All maps are NHWC.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..kernels import route_regions
from ..kernels.routing_attention.dispatch import attend_known_routes
from ..kernels.routing_attention.regions import cut
from .arguments import check_flag, check_number, check_whole_number
from .attention_maps import AttentionMaps, Point, RoutedRegions, attention_weights
from .conv import prefers_channels_last
from .depthwise import depthwise
from .linear import Linear
from .resolution import crop, num_windows, pad_axis, padded_length
from .tracing import Length, is_open, larger, smaller
from .window_attention import attend
from .windows import merge, partition

# Values of a strip of the map whose LePE is computed at a time in CPU inference: 4 MiB of float32,
# which stays in the cache; of enough rows, of which the kernel reaches four more.
_LEPE_VALUES = 2**20
_LEAST_ROWS = 16


def _normed(x: torch.Tensor, norm: nn.Module | None) -> torch.Tensor:
    return x if norm is None else norm(x)


class RoutingAttention(nn.Module):
    """Multi-head attention of the tokens of each region to those of the `topk` best regions. NHWC.

    (B, H, W, C) -> (B, H, W, C). The map is cut into num_regions x num_regions regions. Routing
    compares the means of their queries and keys, all heads together, and has no gradient. LePE, a
    depthwise convolution of the values, is added to the heads' results.

    A side that num_regions does not divide is handled as in one of the two published designs:

    - padded (`is_ragged` False): the input is padded with zeros at the bottom and right, so that a
      padded token's query, key and value are the biases of `qkv`. Padding is in the means, can be
      routed to, is attended to and seen by LePE; only its results are dropped.
    - ragged: regions have max(1, floor(side / num_regions)) tokens along an axis, and there are as
      many as cover the map. Of those cut off by its edge the missing tokens have zero keys and
      values, which are attended to; means and LePE are of the map alone. Of a map of fewer than
      `topk` regions all are attended to.

    Zhu et al., arXiv:2303.08810.

    Args:
        dim: channels C.
        num_heads: heads; divides `dim` and `qk_dim`.
        num_regions: regions per side.
        topk: regions that a region attends to; at most num_regions**2.
        qk_dim: channels of queries and of keys; `dim` when None.
        scale: factor of the products of queries and keys; None for qk_dim**-0.5, of all heads
            together.
        is_ragged: whether regions are ragged at the edge, or padded.
        lepe_kernel_size: side of LePE's kernel, odd, tokens; 0 for no LePE.
        has_proj: whether a linear layer follows.
        soft_routing: multiply the keys and values of a region by the softmax, over the regions
            routed to, of the routing logits, without a gradient through that. Padded form alone;
            in plain PyTorch.
        kv_pool_size: side to which the keys and values of a region are reduced, by averages,
            before they are attended to; None for all of them. Padded form alone; in plain PyTorch.

    Raises:
        ValueError: an argument is none of these.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_regions: int = 7,
        topk: int = 4,
        *,
        qk_dim: int | None = None,
        scale: float | None = None,
        is_ragged: bool = False,
        lepe_kernel_size: int = 5,
        has_proj: bool = True,
        soft_routing: bool = False,
        kv_pool_size: int | None = None,
    ) -> None:
        super().__init__()
        check_whole_number("dim", dim, 1)
        check_whole_number("num_heads", num_heads, 1)
        check_whole_number("num_regions", num_regions, 1)
        check_whole_number("topk", topk, 1)
        if topk > num_regions**2:
            raise ValueError(
                f"topk is {topk}: at most {num_regions**2} is taken, the number of regions with "
                f"num_regions={num_regions}"
            )
        qk_dim = dim if qk_dim is None else qk_dim
        check_whole_number("qk_dim", qk_dim, 1)
        if dim % num_heads or qk_dim % num_heads:
            raise ValueError(
                f"num_heads is {num_heads}: a divisor of dim {dim} and qk_dim {qk_dim} is taken"
            )
        if scale is not None:
            check_number("scale", scale, 0)
        for name, value in dict(
            is_ragged=is_ragged, has_proj=has_proj, soft_routing=soft_routing
        ).items():
            check_flag(name, value)
        check_whole_number("lepe_kernel_size", lepe_kernel_size, 0)
        if lepe_kernel_size and lepe_kernel_size % 2 == 0:
            raise ValueError(f"lepe_kernel_size is {lepe_kernel_size}: 0 or an odd number is taken")
        if kv_pool_size is not None:
            check_whole_number("kv_pool_size", kv_pool_size, 1)
        if is_ragged and (soft_routing or kv_pool_size is not None):
            raise ValueError("soft_routing and kv_pool_size are taken with is_ragged=False alone")
        self.num_heads = num_heads
        self.num_regions = num_regions
        self.topk = topk
        self.qk_dim = qk_dim
        self.scale = qk_dim**-0.5 if scale is None else scale
        self.is_ragged = is_ragged
        self.soft_routing = soft_routing
        self.kv_pool_size = kv_pool_size
        self.qkv = Linear(dim, 2 * qk_dim + dim)
        self.lepe = None
        if lepe_kernel_size:
            self.lepe = nn.Conv2d(
                dim, dim, lepe_kernel_size, padding=lepe_kernel_size // 2, groups=dim
            )
        self.proj = Linear(dim, dim) if has_proj else nn.Identity()

    def forward(self, x: torch.Tensor, norm: nn.Module | None = None) -> torch.Tensor:
        """Attend.

        Args:
            x: (B, H, W, C).
            norm: applied to `x` first, if given. What it returns is let go before anything is
                attended to, when the most memory is in use.

        Returns:
            (B, H, W, C).
        """
        if self.soft_routing or self.kv_pool_size is not None:
            return self._attend_to_copies(_normed(x, norm))
        qkv = self.qkv(_normed(x, norm))
        out = self._attend(*self._split(qkv)).flatten(3)
        if self.lepe is not None:
            out = self._add_positions(out, qkv[..., 2 * self.qk_dim :])
        del qkv
        return self.proj(out)

    def _split(self, qkv: torch.Tensor) -> list[torch.Tensor]:
        """Cut (..., 2 * qk_dim + C) into three of (..., heads, channels)."""
        parts = qkv.split([self.qk_dim, self.qk_dim, qkv.shape[-1] - 2 * self.qk_dim], dim=-1)
        return [part.unflatten(-1, (self.num_heads, -1)) for part in parts]

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend to the best regions: (B, H, W, heads, channels), values' channels."""
        routes, num_regions, form = self._route(query, key)
        return attend_known_routes(query, key, value, routes, num_regions, scale=self.scale, **form)

    def _route(
        self, query: torch.Tensor, key: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[Length, Length], dict[str, Any]]:
        """Choose the regions for each region.

        Returns:
            (B, regions, topk) routes; regions along each axis; further arguments of the operator,
            which say how the map is covered by regions.
        """
        sides, topk, num_regions = query.shape[1:3], self.topk, (self.num_regions,) * 2
        size = pad_query = pad_key = pad_value = None
        if self.is_ragged:
            size = tuple(larger(side // self.num_regions, 1) for side in sides)
            # The larger is the first, and tells exporters the least that it can be.
            num_regions = tuple(
                larger(num_windows(side, length), smaller(side, self.num_regions))
                for side, length in zip(sides, size, strict=True)
            )
            topk = smaller(num_regions[0] * num_regions[1], topk)
        elif self._is_padded(sides):
            pad_query, pad_key, pad_value = self._split(self.qkv.bias.to(query.dtype))
        routes = route_regions(
            query, key, num_regions, topk,
            region_size=size, pad_query=pad_query, pad_key=pad_key,
        )  # fmt: skip
        return routes, num_regions, dict(region_size=size, pad_key=pad_key, pad_value=pad_value)

    def attention_maps(
        self,
        x: torch.Tensor,
        norm: nn.Module | None = None,
        *,
        size: tuple[int, int],
        points: Sequence[Point],
    ) -> dict[str, AttentionMaps]:
        """Show what positions of a map attend to; as `NeighborhoodAttention` does.

        Raises:
            ValueError: with `soft_routing` or `kv_pool_size`, where keys are not positions.
        """
        query, key, value = self._projected_plainly(_normed(x, norm))
        routes, num_regions, form = self._route(query, key)
        weights = attention_weights(
            lambda value: attend_known_routes(
                query, key, value, routes, num_regions, scale=self.scale, **form
            ),
            value,
            [(0, *point) for point in points],
        )
        weights = weights[:, 0].permute(0, 3, 1, 2)
        return {
            f"{routes.shape[2]} of {routes.shape[1]} regions": AttentionMaps(
                weights, 1 - weights.sum((2, 3))
            )
        }

    def routed_regions(
        self,
        x: torch.Tensor,
        norm: nn.Module | None = None,
        *,
        size: tuple[int, int],
        points: Sequence[Point],
    ) -> RoutedRegions:
        """Show where the regions of positions are routed to; arguments and errors as above."""
        query, key, _ = self._projected_plainly(_normed(x, norm))
        routes, num_regions, form = self._route(query, key)
        cells = cut(size, num_regions, form["region_size"])
        regions = [
            row // cells.height * cells.columns + column // cells.width for row, column in points
        ]
        grid = cells.rows, cells.columns
        return RoutedRegions(
            grid, (cells.height, cells.width), regions, routes[0, regions].tolist()
        )

    def _projected_plainly(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Give query, key and value, where they are what is attended with."""
        if self.soft_routing or self.kv_pool_size is not None:
            raise ValueError("attention is shown without soft_routing and kv_pool_size alone")
        return self._split(self.qkv(x))

    def _is_padded(self, sides: tuple[Length, Length]) -> bool:
        return any(is_open(side) or side % self.num_regions for side in sides)

    def _add_positions(self, out: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Add LePE of (B, H, W, C) values to the heads' results, in place in plain inference."""
        sides, padded = value.shape[1:3], None
        if not self.is_ragged and self._is_padded(sides):
            padded = [padded_length(side, self.num_regions) for side in sides]
        if not prefers_channels_last(value):
            return out + self._encode_positions(value, padded)
        height, reach = sides[0], self.lepe.padding[0]
        rows = max(_LEAST_ROWS, _LEPE_VALUES // value[:, 0].numel())
        for start in range(0, height, rows):
            end, above = min(start + rows, height), max(0, start - reach)
            strip, within = value[:, above : end + reach], None
            if padded:
                is_at_edge = end + reach > height
                within = padded[0] - above if is_at_edge else strip.shape[1], padded[1]
            strip = self._encode_positions(strip, within)
            out[:, start:end] += strip[:, start - above : end - above]
        return out

    def _encode_positions(
        self, value: torch.Tensor, padded: Sequence[Length] | None
    ) -> torch.Tensor:
        """Compute LePE of (B, H, W, C) values that go on with padding up to `padded` positions."""
        if padded is None:
            return depthwise(self.lepe, value)
        height, width = value.shape[1:3]
        bias, reach = self.qkv.bias[-value.shape[-1] :], self.lepe.padding[0]
        if not (is_open(height) or is_open(width)):
            for axis, length in enumerate(padded, 1):
                value = pad_axis(value, axis, min(length, value.shape[axis] + reach), bias)
            return crop(depthwise(self.lepe, value), height, width)
        # Lengths that exporters can tell to be above zero; beyond the padding there are zeros.
        value = pad_axis(pad_axis(value, 1, height + reach, bias), 2, width + reach, bias)
        rows, columns = (torch.arange(n, device=value.device) for n in value.shape[1:3])
        is_there = (rows < padded[0])[:, None] & (columns < padded[1])
        value = value.where(is_there[..., None], value.new_zeros(()))
        return crop(depthwise(self.lepe, value), height, width)

    def _attend_to_copies(self, x: torch.Tensor) -> torch.Tensor:
        """The padded form as it is defined, with keys and values that are changed on the way."""
        height, width = x.shape[1:3]
        size = num_windows(height, self.num_regions), num_windows(width, self.num_regions)
        for axis, side in enumerate(size, 1):
            x = pad_axis(x, axis, side * self.num_regions)
        query, key, value = self._split(self.qkv(x))
        routes = route_regions(query, key, self.num_regions, self.topk)
        num_regions = self.num_regions**2
        first = torch.arange(len(x), device=x.device) * num_regions
        routes = routes + first[:, None, None]
        # (B * regions, tokens of a region, channels)
        queries, keys, values = (partition(part.flatten(3), size) for part in (query, key, value))
        weights = None
        if self.soft_routing:
            dtype = torch.promote_types(queries.dtype, torch.float32)
            ours, theirs = (part.detach().mean(1, dtype=dtype) for part in (queries, keys))
            theirs = theirs.index_select(0, routes.flatten()).unflatten(0, (-1, self.topk))
            weights = (self.scale * (ours[:, None] * theirs).sum(-1)).softmax(-1)
        keys, values = (self._gather(part, routes, size, weights) for part in (keys, values))
        queries, keys, values = (
            part.unflatten(-1, (self.num_heads, -1)) for part in (queries, keys, values)
        )
        out = attend(queries, keys, values, scale=self.scale)
        out = merge(out, size, *x.shape[1:3])
        if self.lepe is not None:
            out = out + depthwise(self.lepe, value.flatten(3))
        return crop(self.proj(out), height, width)

    def _gather(
        self,
        regions: torch.Tensor,
        routes: torch.Tensor,
        size: tuple[Length, Length],
        weights: torch.Tensor | None,
    ) -> torch.Tensor:
        """Copy the regions routed to, pooled and weighted if asked for.

        Args:
            regions: (B * regions, tokens, channels).
            routes: (B, regions, topk), of all images' regions.
            size: rows and columns of tokens in a region.
            weights: (B * regions, topk), or None for none.

        Returns:
            (B * regions, topk * tokens, channels).
        """
        if self.kv_pool_size is not None:
            maps = regions.transpose(1, 2).unflatten(-1, size)
            regions = F.adaptive_avg_pool2d(maps, self.kv_pool_size).flatten(2).transpose(1, 2)
        copies = regions.index_select(0, routes.flatten()).unflatten(0, (-1, self.topk))
        if weights is not None:
            copies = copies * weights[:, :, None, None].to(copies.dtype)
        return copies.flatten(1, 2)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_regions={self.num_regions}, topk={self.topk}, "
            f"is_ragged={self.is_ragged}"
        )

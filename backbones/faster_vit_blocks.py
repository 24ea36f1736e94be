"""Stem, stages and blocks of FasterViT, whose model is in `faster_vit.py`.

Legend: B batch, C channels, H and W height and width of the map, w side of a window in tokens,
R and S rows and columns of windows, T tokens of a window with its carriers, which come first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from timm.layers import DropPath, LayerNorm2d
from torch import nn
from torch.nn import functional as F

from ..layers.attention_maps import AttentionMaps, Point, maps_of_all
from ..layers.conv import fold_norm_into_previous, run_channels_last
from ..layers.linear import Linear
from ..layers.mlp import Mlp
from ..layers.rel_pos import MlpPosEmbed, MlpRelPosBias, RelPosBias
from ..layers.resolution import crop, num_windows, pad_to_windows
from ..layers.tracing import Length, is_open
from ..layers.window_attention import attend, weights_of_tokens
from ..layers.window_places import WindowPlaces
from ..layers.windows import merge, partition
from .base import Stage

# Carriers of a window along each axis.
_SIDE = 2
_CARRIERS = _SIDE**2


class Stem(nn.Module):
    """Two 3x3 convolutions of stride 2, each with BatchNorm and ReLU. NCHW.

    (B, in_chans, H, W) -> (B, dim, ceil(H / 4), ceil(W / 4)).
    """

    def __init__(self, in_chans: int, hidden_dim: int, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, hidden_dim, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(hidden_dim, eps=1e-4)
        self.conv2 = nn.Conv2d(hidden_dim, dim, 3, stride=2, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(dim, eps=1e-4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return run_channels_last(self._forward, x)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(x)), inplace=True)

    def fuse(self) -> Stem:
        """Fold both norms into their convolutions, in place; return itself."""
        self.norm1 = fold_norm_into_previous(self.conv1, self.norm1)
        self.norm2 = fold_norm_into_previous(self.conv2, self.norm2)
        return self


class Downsample(nn.Module):
    """LayerNorm over channels and a 3x3 convolution of stride 2. NCHW.

    (B, in_dim, H, W) -> (B, dim, ceil(H / 2), ceil(W / 2)).
    """

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.norm = LayerNorm2d(in_dim, eps=1e-6)
        self.conv = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.norm(x))


class ConvBlock(nn.Module):
    """Residual 3x3 convolution, BatchNorm, GELU, 3x3 convolution, BatchNorm. (B, C, H, W), NCHW."""

    def __init__(self, dim: int, rate: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(dim)
        self.drop_path = DropPath(rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.gelu(self.norm1(self.conv1(x)))
        return x + self.drop_path(self.norm2(self.conv2(y)))

    def fuse(self) -> ConvBlock:
        """Fold both norms into their convolutions, in place; return itself."""
        self.norm1 = fold_norm_into_previous(self.conv1, self.norm1)
        self.norm2 = fold_norm_into_previous(self.conv2, self.norm2)
        return self


class ConvStage(Stage):
    """Stage of convolutional blocks; keeps the memory format of its input. NCHW.

    Args:
        downsample: changes the resolution and the channels.
        blocks: modules from map to map.
        side: the blocks run on a map padded with zeros to multiples of it; 1 for no padding.
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], side: int) -> None:
        super().__init__(downsample, blocks)
        self.side = side

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return run_channels_last(self._forward, x)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.downsample(x)
        if self.side == 1:
            return self.run_blocks(x)
        height, width = x.shape[2:]
        x = pad_to_windows(x.permute(0, 2, 3, 1), (self.side, self.side)).permute(0, 3, 1, 2)
        x = self.run_blocks(x)
        return crop(x.permute(0, 2, 3, 1), height, width).permute(0, 3, 1, 2)


class Grid(NamedTuple):
    """The windows of a map, and their carriers as a map of their own, of windows of 2x2.

    Attributes:
        rows: R.
        columns: S.
        share: (), the share that carriers have in windows: 1, or 0 where they are to be without
            effect; None for 1.
    """

    rows: Length
    columns: Length
    share: torch.Tensor | None

    @classmethod
    def of(cls, x: torch.Tensor, rows: Length, columns: Length) -> Grid:
        """Describe the carriers of a map (B, H, W, C)."""
        share = None
        if is_open(rows) or is_open(columns) or rows * columns == 1:
            # Of twice the windows: compilers tell a length apart that may be 1.
            are_more = [
                (torch.arange(_SIDE * count, device=x.device) >= _SIDE).any()
                for count in (rows, columns)
            ]
            share = (are_more[0] | are_more[1]).to(x.dtype)
        return cls(rows, columns, share)

    def size(self) -> tuple[Length, Length]:  # no property: torch 2.6 cannot compile one here
        """Count rows and columns of the grid of carriers."""
        return _SIDE * self.rows, _SIDE * self.columns

    def to_raster(self, carriers: torch.Tensor) -> torch.Tensor:
        """Put together the carriers of each image: (B R S, 4, C) -> (B, 4RS, C), row by row."""
        return merge(carriers, (_SIDE, _SIDE), *self.size()).flatten(1, 2)

    def to_windows(self, carriers: torch.Tensor) -> torch.Tensor:
        """Give each window its carriers: the inverse of `to_raster`."""
        return partition(carriers.unflatten(1, self.size()), (_SIDE, _SIDE))


class CarrierTokens(nn.Module):
    """The first carriers: a depthwise 3x3 convolution and averages of overlapping parts of it.

    (B, H, W, C), H = R w and W = S w, -> (B, 4RS, C), the carriers of the grid row by row.

    The 2n averages along an axis of n windows start w // 2 positions apart and are as long as
    lets the last one end with the axis: they are of equal length and drift against the windows.

    Args:
        dim: channels C.
        side: w.
    """

    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.side = side

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        counts = [num_windows(length, self.side) for length in x.shape[1:3]]
        x = self.conv(x.permute(0, 3, 1, 2))
        if is_open(counts[0]) or is_open(counts[1]):
            x = self._averages(self._averages(x, counts[0]).transpose(2, 3), counts[1])
            x = x.transpose(2, 3)
        else:
            x = F.avg_pool2d(x, [self._length(n) for n in counts], self.side // _SIDE)
        return x.flatten(2).transpose(1, 2)

    def _length(self, count: Length) -> Length:
        """Positions of each average along an axis of `count` windows."""
        return count * self.side - (_SIDE * count - 1) * (self.side // _SIDE)

    def _averages(self, x: torch.Tensor, count: Length) -> torch.Tensor:
        """Take the averages down the rows, of a number and a length that may be symbols.

        (B, C, count * w, W) -> (B, C, 2 count, W).
        """
        length = self._length(count)
        starts = torch.arange(_SIDE * count, device=x.device) * (self.side // _SIDE)
        after = torch.arange(count * self.side, device=x.device) - starts[:, None]
        return ((after >= 0) & (after < length)).to(x.dtype) @ x / length


class Attention(nn.Module):
    """Multi-head attention among the tokens of a grid, with a bias by an MLP of their offsets.

    Args:
        dim: channels C.
        num_heads: heads; divides `dim`.
        size: rows and columns of the grid; None where every call has its own.
    """

    def __init__(self, dim: int, num_heads: int, size: tuple[int, int] | None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.size = size
        self.qkv = Linear(dim, 3 * dim)
        self.rel_pos_bias = MlpRelPosBias(num_heads)
        self.proj = Linear(dim, dim)

    def forward(
        self,
        x: torch.Tensor,
        size: tuple[int, int],
        num_carriers: int = 0,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            x: (B', T, C), carriers before the tokens of the grid, which are row by row.
            size: rows and columns of the grid.
            num_carriers: tokens before those of the grid; no bias is between them and any other.
            mask: (T,), added to the logits of each key; None for zeros.

        Returns:
            (B', T, C).
        """
        return self.proj(attend(*self._project(x), self._bias(size, num_carriers, mask)))

    def attention_weights(
        self,
        x: torch.Tensor,
        tokens: torch.Tensor,
        size: tuple[int, int],
        num_carriers: int = 0,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Find what one token of each window attends to.

        Args:
            x, size, num_carriers, mask: as in the forward pass.
            tokens: (B',), a token of each window, carriers counted.

        Returns:
            (B', T, heads): the weights of the window's tokens, carriers first.
        """
        return weights_of_tokens(*self._project(x), self._bias(size, num_carriers, mask), tokens)

    def _project(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Give query, key and value: (B', T, heads, head_dim) each."""
        return self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)

    def _bias(
        self, size: tuple[int, int], num_carriers: int, mask: torch.Tensor | None
    ) -> torch.Tensor:
        is_table = isinstance(self.rel_pos_bias, RelPosBias)
        bias = self.rel_pos_bias() if is_table else self.rel_pos_bias(size)
        if num_carriers:
            bias = F.pad(bias, (num_carriers, 0, num_carriers, 0))
        return bias if mask is None else bias + mask.to(bias.dtype)

    @torch.no_grad()
    def fuse(self) -> Attention:
        """Put the table of offsets in the place of its MLP where the grid is fixed, in place."""
        if self.size is not None and isinstance(self.rel_pos_bias, MlpRelPosBias):
            table = RelPosBias(self.num_heads, self.size)
            table.table = nn.Parameter(self.rel_pos_bias.table(self.size).contiguous())
            self.rel_pos_bias = table
        return self


class FixedEmbed(nn.Module):
    """Embeddings of the positions of one grid, in the place of the MLP that made them.

    Args:
        values: (positions, C).
    """

    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)

    def forward(self, size: tuple[int, int], origin: tuple[int, int] | None) -> torch.Tensor:
        return self.values


class Residuals(nn.Module):
    """Position embedding, then residual attention and MLP, each after a LayerNorm.

    Args:
        dim: channels C.
        num_heads: heads; divides `dim`.
        size: rows and columns of the grid; None where every call has its own.
        mlp_ratio: hidden channels of the MLP over C.
        layer_scale: first value of the factors of both branches; None for no factors.
        rate: stochastic depth, of each item of the first axis by itself.
        origin: what coordinates of the embedding are counted from and divided by; None for half
            of each side of the grid.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        size: tuple[int, int] | None,
        mlp_ratio: float,
        layer_scale: float | None,
        rate: float,
        origin: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.size = size
        self.origin = origin
        self.pos_embed = MlpPosEmbed(dim)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, size)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(rate)
        for name in ("gamma1", "gamma2"):
            gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
            self.register_parameter(name, gamma)

    def embed(self, size: tuple[int, int]) -> torch.Tensor:
        """Give the embedding of a grid's positions: (rows * columns, C), row by row."""
        return self.pos_embed(size, self.origin)

    def forward(
        self,
        x: torch.Tensor,
        size: tuple[int, int],
        num_carriers: int = 0,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Apply both branches to tokens that have their embedding; arguments as `Attention`'s."""
        x = self._add(x, self.attn(self.norm1(x), size, num_carriers, mask), self.gamma1)
        return self._add(x, self.mlp(self.norm2(x)), self.gamma2)

    def _add(
        self, x: torch.Tensor, branch: torch.Tensor, gamma: torch.Tensor | None
    ) -> torch.Tensor:
        if gamma is not None:
            branch = branch * gamma
        return x + self.drop_path(branch)

    @torch.no_grad()
    def fuse(self) -> Residuals:
        """Put embeddings in the place of their MLP where the grid is fixed, in place."""
        if self.size is not None and isinstance(self.pos_embed, MlpPosEmbed):
            self.pos_embed = FixedEmbed(self.embed(self.size).clone())
        return self


class Block(nn.Module):
    """Attention among carriers, then inside windows; every block adds embeddings of position.

    (B R S, T, C) -> (B R S, T, C), T = w * w, or 4 + w * w with carriers.

    Args:
        dim: channels C.
        num_heads: heads; divides `dim`.
        side: w.
        mlp_ratio: hidden channels of the MLPs over C.
        layer_scale: first value of the factors of every branch; None for no factors.
        rate: stochastic depth, of windows and of images.
        has_carriers: whether there are weights for carriers.
        propagates: whether carriers are added to the tokens that they are nearest to, at the end.
        origin: as `Residuals` takes it, of windows.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        side: int,
        mlp_ratio: float,
        layer_scale: float | None,
        rate: float,
        *,
        has_carriers: bool,
        propagates: bool,
        origin: tuple[int, int] | None,
    ) -> None:
        super().__init__()
        arguments = mlp_ratio, layer_scale, rate
        self.side = side
        self.propagates = propagates
        self.carriers = Residuals(dim, num_heads, None, *arguments) if has_carriers else None
        self.windows = Residuals(dim, num_heads, (side, side), *arguments, origin)

    def forward(self, x: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        """Apply the block; `grid` is None where windows are without carriers."""
        size = (self.side, self.side)
        if grid is None:
            return self.windows(x + self.windows.embed(size), size)
        x = self._with_carriers(x, self.carriers(self._carriers(x, grid), grid.size()), grid)
        x = self.windows(x, size, _CARRIERS, self._mask(grid))
        return self._propagate(x, grid.share) if self.propagates else x

    def _carriers(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Take the carriers out of the windows and add their embedding: (B, 4RS, C)."""
        return grid.to_raster(x[:, :_CARRIERS]) + self.carriers.embed(grid.size())

    def _with_carriers(self, x: torch.Tensor, carriers: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Add the embedding to the tokens of windows, and put the new carriers before them."""
        tokens = x[:, _CARRIERS:] + self.windows.embed((self.side, self.side))
        return torch.cat([grid.to_windows(carriers), tokens], dim=1)

    def _mask(self, grid: Grid) -> torch.Tensor | None:
        """Give the addends of the logits of a window's keys: (T,)."""
        if grid.share is None:
            return None
        return F.pad(grid.share.log().expand(_CARRIERS), (0, self.side**2))

    def attention_maps(
        self,
        x: torch.Tensor,
        grid: Grid | None = None,
        *,
        size: tuple[int, int],
        points: Sequence[Point],
    ) -> dict[str, AttentionMaps]:
        """Show what positions of a map attend to; as `NeighborhoodAttention` does.

        Where there are carriers, the carriers nearest to the points have maps of their own, of a
        cell a carrier.

        Args:
            x: (R S, T, C), as in the forward pass on one image.
            grid: as in the forward pass.
            size: H and W.
            points: rows and columns of positions.
        """
        sides = (self.side, self.side)
        found = WindowPlaces.find(points, size, sides, device=x.device)
        attention = self.windows.attn
        kind = f"window {self.side}x{self.side}"
        if grid is None:
            x = self.windows.norm1(x + self.windows.embed(sides))
            return {
                kind: found.maps(attention.attention_weights(x[found.windows], found.tokens, sides))
            }
        carriers = self._carriers(x, grid)
        maps = {}
        if grid.rows * grid.columns > 1:
            maps["carriers"] = self._carrier_maps(carriers, grid, points)
        x = self._with_carriers(x, self.carriers(carriers, grid.size()), grid)
        weights = attention.attention_weights(
            self.windows.norm1(x)[found.windows], _CARRIERS + found.tokens,
            sides, _CARRIERS, self._mask(grid),
        )  # fmt: skip
        return {**maps, f"{kind} and carriers": found.maps(weights)}

    def _carrier_maps(
        self, carriers: torch.Tensor, grid: Grid, points: Sequence[Point]
    ) -> AttentionMaps:
        """Show what the carriers that are nearest to points attend to, among carriers."""
        rows, columns = grid.size()
        tokens = [
            row * _SIDE // self.side * columns + column * _SIDE // self.side
            for row, column in points
        ]
        weights = self.carriers.attn.attention_weights(
            self.carriers.norm1(carriers).expand(len(points), -1, -1),
            torch.tensor(tokens, device=carriers.device),
            (rows, columns),
        )
        return maps_of_all(weights, (rows, columns), (self.side / _SIDE, self.side / _SIDE))

    def _propagate(self, x: torch.Tensor, share: torch.Tensor | None) -> torch.Tensor:
        """Add to each token the carrier that covers it; to carriers, which end here, any."""
        nearest = torch.arange(self.side, device=x.device) * _SIDE // self.side
        nearest = F.pad((nearest[:, None] * _SIDE + nearest).flatten(), (_CARRIERS, 0))
        nearest = x.index_select(1, nearest)
        if self.carriers.gamma1 is not None:
            nearest = nearest * self.carriers.gamma1
        return x + (nearest if share is None else nearest * share)


class AttentionStage(Stage):
    """Stage of attention in windows; pads a map to whole windows and crops it back. NCHW.

    The blocks work on windows (B R S, T, C).

    Args:
        downsample: changes the resolution and the channels.
        blocks: modules from windows to windows.
        side: w.
        carriers: makes the first carriers of a map; None where there are none.
    """

    def __init__(
        self,
        downsample: nn.Module,
        blocks: Sequence[nn.Module],
        side: int,
        carriers: nn.Module | None,
    ) -> None:
        super().__init__(downsample, blocks)
        self.side = side
        self.carriers = carriers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.downsample(x).permute(0, 2, 3, 1)
        height, width = x.shape[1:3]
        size = (self.side, self.side)
        x = pad_to_windows(x, size)
        rows, columns = (num_windows(length, self.side) for length in (height, width))
        windows, shared = partition(x, size), ()
        # Compilers get one graph for all grids, and training a gradient of every weight: there a
        # single window has carriers too, which its tokens don't see.
        is_general = is_open(rows) or is_open(columns) or torch.is_grad_enabled()
        if self.carriers is not None and (is_general or rows * columns > 1):
            grid = Grid.of(x, rows, columns)
            windows = torch.cat([grid.to_windows(self.carriers(x)), windows], dim=1)
            shared = (grid,)
        windows = self.run_blocks(windows, *shared)[:, -(self.side**2) :]
        return merge(windows, size, height, width).contiguous().permute(0, 3, 1, 2)

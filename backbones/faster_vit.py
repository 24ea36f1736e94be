"""FasterViT: convolutions, then attention in windows that exchange carrier tokens.

Ali Hatamizadeh, Greg Heinrich, Hongxu Yin, Andrew Tao, Jose M. Alvarez, Jan Kautz, Pavlo Molchanov.
FasterViT: Fast Vision Transformers with Hierarchical Attention. ICLR 2024, arXiv:2306.06189.

Two stages of residual 3x3 convolutions, two of attention inside windows. In the third stage of
variants 0 to 6 every window has 2x2 carrier tokens: in each block the carriers of an image attend
to one another, then each window's attend together with its own tokens, which is how windows learn
of each other. Position enters by small MLPs of coordinates, an embedding and a bias, so that no
table depends on a size.

Where this differs from the official code: one class takes any size in every call, where that has a
class for 224 pixels, one for a size fixed when it is built, and one for detection. A map is padded
with zeros to whole windows, as in the second. At grids of windows that are not square the official
code permutes carriers by mistake, gives them no position and some of them no bias; here each axis
of the grid follows the formulas of the square one. No published weights depend on that. A map of
one window has no carriers. The official code stores every embedding and bias in its checkpoints,
which are left out here. `official_quirks=True` gives what the detection code computes without
carriers, which the published detector was trained with.

The official code (github.com/NVlabs/FasterViT) is under the NVIDIA Source Code License-NC, which
excludes commercial use; the page of the weights says "other".

Legend: B batch, C channels, H and W height and width of the map, w side of a window in tokens,
R and S rows and columns of windows, T tokens of a window with its carriers, which come first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from timm.layers import DropPath, LayerNorm2d, calculate_drop_path_rates
from torch import nn
from torch.nn import functional as F

from ..layers.arguments import (
    check_flag,
    check_number,
    check_whole_number,
    is_whole_number,
)
from ..layers.conv import fold_norm_into_previous, run_channels_last
from ..layers.linear import Linear
from ..layers.mlp import Mlp
from ..layers.rel_pos import MlpPosEmbed, MlpRelPosBias, RelPosBias
from ..layers.resolution import Length, crop, is_open, num_windows, pad_to_windows
from ..layers.window_attention import attend, merge, partition
from .base import ClassifierHead, HierarchicalBackbone, Stage, check_arguments
from .registry import Published, Weights, register_backbones

# Carriers of a window along each axis.
_SIDE = 2
_CARRIERS = _SIDE**2

# What the detection code pads the maps of convolutional stages to multiples of.
_QUIRKY_SIDE = 7


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

    @property
    def size(self) -> tuple[Length, Length]:
        """Rows and columns of the grid of carriers."""
        return _SIDE * self.rows, _SIDE * self.columns

    def to_raster(self, carriers: torch.Tensor) -> torch.Tensor:
        """Put together the carriers of each image: (B R S, 4, C) -> (B, 4RS, C), row by row."""
        return merge(carriers, (_SIDE, _SIDE), *self.size).flatten(1, 2)

    def to_windows(self, carriers: torch.Tensor) -> torch.Tensor:
        """Give each window its carriers: the inverse of `to_raster`."""
        return partition(carriers.unflatten(1, self.size), (_SIDE, _SIDE))


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
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        bias = self._bias(size)
        if num_carriers:
            bias = F.pad(bias, (num_carriers, 0, num_carriers, 0))
        if mask is not None:
            bias = bias + mask.to(bias.dtype)
        return self.proj(attend(query, key, value, bias))

    def _bias(self, size: tuple[int, int]) -> torch.Tensor:
        is_table = isinstance(self.rel_pos_bias, RelPosBias)
        return self.rel_pos_bias() if is_table else self.rel_pos_bias(size)

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
        embed = self.windows.embed(size)
        if grid is None:
            return self.windows(x + embed, size)
        carriers = grid.to_raster(x[:, :_CARRIERS])
        carriers = self.carriers(carriers + self.carriers.embed(grid.size), grid.size)
        x = torch.cat([grid.to_windows(carriers), x[:, _CARRIERS:] + embed], dim=1)
        mask = None
        if grid.share is not None:
            mask = F.pad(grid.share.log().expand(_CARRIERS), (0, self.side**2))
        x = self.windows(x, size, _CARRIERS, mask)
        return self._propagate(x, grid.share) if self.propagates else x

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
        x = merge(windows, size, rows * self.side, columns * self.side)
        return crop(x, height, width).contiguous().permute(0, 3, 1, 2)


class FasterViT(HierarchicalBackbone):
    """FasterViT at any image size.

    Args:
        depths: blocks per stage.
        dims: channels per stage.
        stem_dim: channels between the stem's two convolutions.
        num_heads: heads per stage, divisors of `dims`; the first two stages have no attention and
            ignore theirs.
        window_size: tokens along a side of a window, at least 2: one for all stages or one a
            stage, of which the first two, convolutional, ignore theirs. No weight depends on it.
        carriers: whether windows have carriers, by stage; the first two have no windows.
        propagation: whether carriers are added to the tokens at the end of their stage.
        mlp_ratio: hidden channels of the MLPs over their input's.
        layer_scale: first value of the factors of every branch of attention and MLP; None for no
            factors.
        official_quirks: compute what the official detection code does, for weights that were
            trained with it: maps of the first two stages are padded to multiples of 7, and
            coordinates of the embeddings in windows are (r - q) / q, q = floor(w * w / 2). For
            variants without carriers.
        num_classes: classes of the head; 0 gives pooled features (B, dims[-1]).
        in_chans: channels of the image.
        global_pool: "avg", or "" for the unpooled map with num_classes=0.
        drop_rate: dropout rate before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0. Windows drop
            paths each by itself, and carriers those of an image together.

    Raises:
        ValueError: an argument is none of these.
    """

    dense_norm = "batch_norm"

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        stem_dim: int = 64,
        num_heads: Sequence[int] = (2, 4, 8, 16),
        window_size: int | Sequence[int] = 7,
        carriers: Sequence[bool] = (False, False, True, False),
        propagation: bool = False,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        official_quirks: bool = False,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        check_arguments(depths, dims, in_chans, drop_path_rate)
        check_whole_number("stem_dim", stem_dim, 1)
        _check_heads(num_heads, dims)
        sides = _check_windows(window_size)
        _check_carriers(carriers, propagation, official_quirks)
        check_number("mlp_ratio", mlp_ratio, 1 / min(dims))
        if layer_scale is not None:
            check_number("layer_scale", layer_scale, 0)
        check_number("drop_rate", drop_rate, 0, 1)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages: list[Stage] = []
        for i, (dim, side) in enumerate(zip(dims, sides, strict=True)):
            downsample = Downsample(dims[i - 1], dim) if i else nn.Identity()
            if i < 2:
                blocks = [ConvBlock(dim, rate) for rate in rates[i]]
                stages.append(ConvStage(downsample, blocks, _QUIRKY_SIDE if official_quirks else 1))
                continue
            blocks = [
                Block(
                    dim, num_heads[i], side, mlp_ratio, layer_scale, rate,
                    has_carriers=carriers[i],
                    propagates=propagation and carriers[i] and j == depths[i] - 1,
                    origin=(side**2 // 2,) * 2 if official_quirks else None,
                )
                for j, rate in enumerate(rates[i])
            ]  # fmt: skip
            first = CarrierTokens(dim, side) if carriers[i] else None
            stages.append(AttentionStage(downsample, blocks, side, first))
        super().__init__(
            Stem(in_chans, stem_dim, dims[0]),
            stages,
            nn.BatchNorm2d(dims[-1]),
            ClassifierHead(dims[-1], num_classes, global_pool, drop_rate),
            dims=dims,
            in_chans=in_chans,
        )

    def adapt_checkpoint(self, state_dict: dict[str, torch.Tensor]) -> list[str]:
        # What the official model computes anew in every call, and a second name of one tensor.
        derived = ("relative_bias", "relative_coords_table", "relative_position_index")
        for key in list(state_dict):
            if key.endswith(derived) or ".carriers.same." in key:
                del state_dict[key]
        self._place_out_norms(state_dict)
        return []

    def _place_out_norms(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Number the output norms by stages, which their widths tell, in place."""
        norms: dict[str, dict[str, torch.Tensor]] = {}
        for key in [k for k in state_dict if k.startswith("out_norms.")]:
            _, number, name = key.split(".")
            norms.setdefault(number, {})[name] = state_dict.pop(key)
        stages = {info["num_chs"]: i for i, info in enumerate(self.feature_info)}
        for number, entries in norms.items():
            width = len(entries["weight"]) if "weight" in entries else None
            for name, value in entries.items():
                state_dict[f"out_norms.{stages.get(width, number)}.{name}"] = value


def _check_heads(num_heads: object, dims: Sequence[int]) -> None:
    """Raise a ValueError unless there are four numbers of heads that divide `dims`."""
    is_four = isinstance(num_heads, Sequence) and len(num_heads) == 4
    if not is_four or not all(
        is_whole_number(n) and n > 0 and dim % n == 0
        for n, dim in zip(num_heads, dims, strict=True)
    ):
        raise ValueError(
            f"num_heads is {num_heads!r}: four whole numbers, divisors of dims {dims}, are taken"
        )


def _check_windows(window_size: object) -> tuple[int, ...]:
    """Give the sides of windows, one a stage.

    Raises:
        ValueError: they are no whole numbers of at least 2: positions of one token have no scale.
    """
    sides = (window_size,) * 4 if is_whole_number(window_size) else window_size
    is_four = isinstance(sides, Sequence) and len(sides) == 4
    if not is_four or not all(is_whole_number(n) and n > 1 for n in sides):
        raise ValueError(
            f"window_size is {window_size!r}: a whole number of at least 2, or four of them, is "
            "taken"
        )
    return tuple(sides)


def _check_carriers(carriers: object, propagation: bool, official_quirks: bool) -> None:
    """Raise a ValueError unless carriers fit the stages and the other two arguments."""
    is_four = isinstance(carriers, Sequence) and len(carriers) == 4
    if not is_four or not all(isinstance(c, bool) for c in carriers) or any(carriers[:2]):
        raise ValueError(
            f"carriers is {carriers!r}: four of True and False are taken, of which the first two "
            "are False, as those stages have no windows"
        )
    check_flag("propagation", propagation)
    check_flag("official_quirks", official_quirks)
    if official_quirks and any(carriers):
        raise ValueError(
            "official_quirks=True is for variants without carriers, "
            f"{', '.join(n for n in VARIANTS if n.startswith(_NO_CARRIERS))}: no published "
            "weights of the others were trained so"
        )


_NO_CARRIERS = "faster_vit_4_21k_"


def _dims(dim: int) -> tuple[int, ...]:
    return dim, 2 * dim, 4 * dim, 8 * dim


_SCALED = dict(layer_scale=1e-5, propagation=True)
_HEADS = (4, 8, 16, 32)
_DEEP = (3, 3, 12, 5)
_21K = dict(
    depths=_DEEP, dims=_dims(196), num_heads=_HEADS, layer_scale=1e-5, carriers=(False,) * 4
)

VARIANTS = {
    "faster_vit_0": dict(depths=(2, 3, 6, 5), dims=_dims(64)),
    "faster_vit_1": dict(depths=(1, 3, 8, 5), dims=_dims(80), stem_dim=32),
    "faster_vit_2": dict(depths=(3, 3, 8, 5), dims=_dims(96)),
    "faster_vit_3": dict(depths=_DEEP, dims=_dims(128), **_SCALED),
    "faster_vit_4": dict(depths=_DEEP, dims=_dims(196), num_heads=_HEADS, **_SCALED),
    "faster_vit_5": dict(depths=_DEEP, dims=_dims(320), num_heads=_HEADS, **_SCALED),
    "faster_vit_6": dict(depths=(3, 3, 16, 8), dims=_dims(320), num_heads=_HEADS, **_SCALED),
    "faster_vit_4_21k_224": dict(window_size=(7, 7, 14, 7), **_21K),
    "faster_vit_4_21k_384": dict(window_size=(7, 7, 24, 12), **_21K),
    "faster_vit_4_21k_512": dict(window_size=(7, 7, 32, 16), **_21K),
    "faster_vit_4_21k_768": dict(window_size=(7, 7, 48, 24), **_21K),
}

_FILES = "https://huggingface.co/ahatamiz/FasterViT/resolve/main"


def _weights(file: str, params: float, gmacs: float, top1: float, **metadata: Any) -> Weights:
    """A file of the authors'; they give the accuracy.

    Parameters and GMACs are counted on the official model: the authors' own table has other
    parameters for variants 4 to 6, which their files do not have, and other GMACs throughout.
    """
    return Weights(
        page="https://github.com/NVlabs/FasterViT",
        files=(f"{_FILES}/{file}.pth.tar",),
        url=f"{_FILES}/{file}.pth.tar",
        license="other",
        paper_name="FasterViT: Fast Vision Transformers with Hierarchical Attention",
        paper_ids="arXiv:2306.06189",
        published=Published(params=params, gmacs=gmacs, top1=(top1,)),
        **metadata,
    )


def _weights_21k(size: int, window: int, gmacs: float, top1: float, crop_pct: float) -> Weights:
    """A file of the authors' that was trained on ImageNet-21K, then on ImageNet-1K."""
    file = f"fastervit_4_21k_{size}_w{window}"
    preparation = dict(input_size=(3, size, size), crop_pct=crop_pct, crop_mode="squash")
    return _weights(file, 271.9, gmacs, top1, **preparation)


_FULL = dict(crop_pct=1.0)

WEIGHTS = {
    "faster_vit_0": _weights("fastervit_0_224_1k", 31.4, 3.5, 82.1),
    "faster_vit_1": _weights("fastervit_1_224_1k", 53.4, 5.5, 83.2, **_FULL),
    "faster_vit_2": _weights("fastervit_2_224_1k", 75.9, 9.0, 84.2, **_FULL),
    "faster_vit_3": _weights("fastervit_3_224_1k", 159.5, 18.7, 84.9, **_FULL),
    "faster_vit_4": _weights("fastervit_4_224_1k", 365.6, 43.2, 85.4, **_FULL),
    "faster_vit_5": _weights("fastervit_5_224_1k", 957.5, 114.0, 85.6, **_FULL),
    "faster_vit_6": _weights("fastervit_6_224_1k", 1360.3, 144.0, 85.8, **_FULL),
    "faster_vit_4_21k_224": _weights_21k(224, 14, 41.6, 86.6, 0.95),
    "faster_vit_4_21k_384": _weights_21k(384, 24, 126.6, 87.6, 1.0),
    "faster_vit_4_21k_512": _weights_21k(512, 32, 234.1, 87.8, 1.0),
    "faster_vit_4_21k_768": _weights_21k(768, 48, 585.1, 87.9, 0.93),
}

_BLOCK = r"^(levels\.[23]\.blocks\.\d+)\."

# Official names -> ours; the dense backbone's out norms belong to the adapter.
KEY_RULES = {
    "official": [
        (r"^0\.", ""),  # of a detector's pair of backbone and position encoding
        (r"^patch_embed\.conv_down\.0\.", "stem.conv1."),
        (r"^patch_embed\.conv_down\.1\.", "stem.norm1."),
        (r"^patch_embed\.conv_down\.3\.", "stem.conv2."),
        (r"^patch_embed\.conv_down\.4\.", "stem.norm2."),
        *[(rf"^levels\.{i}\.downsample\.", f"stages.{i + 1}.downsample.") for i in range(3)],
        (r"\.downsample\.reduction\.0\.", ".downsample.conv."),
        (r"^levels\.(\d)\.global_tokenizer\.to_global_feature\.pos\.", r"stages.\1.carriers.conv."),
        (r"^levels\.(\d)\.global_tokenizer\.pos_embed\.", r"stages.\1.carriers.same."),
        (rf"{_BLOCK}hat_", r"\1.carriers."),
        (rf"{_BLOCK}(pos_embed|norm1|attn|norm2|mlp)\.", r"\1.windows.\2."),
        (rf"{_BLOCK}gamma([12])$", r"\1.carriers.gamma\2"),
        (rf"{_BLOCK}gamma3$", r"\1.windows.gamma1"),
        (rf"{_BLOCK}gamma4$", r"\1.windows.gamma2"),
        (r"^levels\.(\d)\.blocks\.", r"stages.\1.blocks."),
        (r"\.pos_emb_funct\.", ".rel_pos_bias."),
        (r"\.cpb_mlp\.0\.", ".fc1."),
        (r"\.cpb_mlp\.2\.", ".fc2."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
        *[(rf"^norm{i}\.", f"out_norms.{i}.") for i in range(4)],
    ],
}

register_backbones(__name__, FasterViT, VARIANTS, WEIGHTS, KEY_RULES)

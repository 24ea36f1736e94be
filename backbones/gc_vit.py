"""GC ViT: windows that attend to themselves and, every other block, to a query of the whole map.

Ali Hatamizadeh, Hongxu Yin, Greg Heinrich, Jan Kautz, Pavlo Molchanov. Global Context Vision
Transformers. ICML 2023, arXiv:2206.09959.

- Stem and downsamplers: LayerNorm, a residual convolution block with squeeze and excitation, a
  3x3 convolution of stride 2, LayerNorm.
- A stage computes one query for each position of a window, of the whole map, by convolution blocks
  and max pools. In its even blocks the tokens of a window attend to each other, in its odd ones
  that query attends to the tokens of every window; a relative position bias in both.

Any image size works by the rule of the official detection backbone, which at the trained size is
the official classifier: after the first LayerNorm of a block the map is padded with zeros at the
bottom and right to whole windows, padding is attended to as any token is, and the query, which
comes from the unpadded map, is resized to the window by bicubic interpolation. A window larger
than the map works by the same padding. Bias tables of a checkpoint for other windows are resized.

The official detection backbone differs from the classifier in more than windows of 24 x 24: its
third stage pools the query unless the window is 14 x 14. `is_dense` stands for that, and
``features_only=True`` sets it (`GCViT.dense_arguments`). Where the window of the third stage is 14,
the two are the same function.

Training: rates of stochastic depth grow linearly over all blocks. Bias tables are exempt from
weight decay, as the official code means (the keyword that it declares matches no parameter).

The official code (github.com/NVlabs/GCVit) is under the NVIDIA Source Code License-NC (research and
evaluation only) and was not used here; its weights, and those that timm converted, are under
CC-BY-NC-SA 4.0.

Legend: B batch, C channels, H and W height and width of the map; B' windows of all images, N tokens
of a window. Maps are NCHW between stages and NHWC within, on the same memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm2d, calculate_drop_path_rates
from torch import nn
from torch.nn import functional as F

from ..layers.arguments import check_flag, check_number, check_whole_number, is_whole_number
from ..layers.attention_maps import AttentionMaps, Point
from ..layers.conv import PointwiseConv, SqueezeExcite
from ..layers.linear import Linear
from ..layers.mlp import Mlp
from ..layers.rel_pos import RelPosBias, resize_rel_pos_bias
from ..layers.tracing import is_open
from ..layers.weight_init import trunc_normal_
from ..layers.window_attention import WindowAttention, attend, weights_of_tokens
from ..layers.window_places import WindowPlaces
from ..layers.windows import merge, partition
from .base import ChannelsLastStage, ClassifierHead, HierarchicalBackbone, check_arguments
from .registry import Published, Weights, register_backbones

# Convolution blocks of each stage's query, and how many of them a max pool follows.
_QUERY_BLOCKS, _QUERY_POOLS = (3, 2, 1, 1), (3, 2, 0, 0)

# The window of the third stage at 224 pixels, with which the detection backbone pools no more.
_WINDOW_OF_224 = 14


class ConvBlock(nn.Module):
    """Residual depthwise 3x3, exact GELU, squeeze and excitation, 1x1. NCHW.

    (B, C, H, W) -> (B, C, H, W), C = `dim`.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.se = SqueezeExcite(dim, dim // 4, bias=False, activation="gelu")
        self.conv_pw = PointwiseConv(dim, dim, bias=False)
        for conv in (self.se.fc1, self.se.fc2):  # the authors' are linear layers
            trunc_normal_(conv.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv_pw(self.se(F.gelu(self.conv_dw(x))))


class Downsample(nn.Module):
    """LayerNorm, `ConvBlock`, 3x3 convolution of stride 2, LayerNorm. NCHW.

    (B, in_dim, H, W) -> (B, dim, ceil(H / 2), ceil(W / 2)).
    """

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm2d(in_dim, eps=1e-5)
        self.conv_block = ConvBlock(in_dim)
        self.reduction = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1, bias=False)
        self.norm2 = LayerNorm2d(dim, eps=1e-5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm2(self.reduction(self.conv_block(self.norm1(x))))


class Stem(nn.Module):
    """3x3 convolution of stride 2, then `Downsample`. NCHW.

    (B, in_chans, H, W) -> (B, dim, ceil(H / 4), ceil(W / 4)).
    """

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim, 3, stride=2, padding=1)
        self.down = Downsample(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.conv1(x))


class GlobalQuery(nn.Module):
    """Query of a window's positions, of the whole map, scaled for attention. NCHW to tokens.

    (B, C, H, W) -> (B, N, heads, head_dim), N = P_r * P_c positions row by row: convolution
    blocks, 3x3 max pools of stride 2, then bicubic interpolation to the window's size
    (``align_corners=False``), which changes nothing where the map has that size.

    Args:
        dim: channels C.
        num_heads: heads; divides `dim`.
        window_size: rows and columns of tokens in a window, (P_r, P_c).
        num_blocks: convolution blocks.
        num_pools: how many of them, from the first, a pool follows.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: tuple[int, int],
        num_blocks: int,
        num_pools: int,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.num_pools = num_pools
        self.scale = (dim // num_heads) ** -0.5
        self.blocks = nn.ModuleList(ConvBlock(dim) for _ in range(num_blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i < self.num_pools:
                x = F.max_pool2d(x, 3, stride=2, padding=1)
        if is_open(x.shape[2]) or is_open(x.shape[3]) or x.shape[2:] != self.window_size:
            x = F.interpolate(x, size=self.window_size, mode="bicubic", align_corners=False)
        x = x.permute(0, 2, 3, 1).flatten(1, 2) * self.scale
        return x.unflatten(-1, (self.num_heads, -1))

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, window_size={self.window_size}, "
            f"num_pools={self.num_pools}"
        )


class GlobalAttention(nn.Module):
    """Attention of the stage's query to the tokens of each window.

    (B', N, C) windows -> (B', N, C), N = P_r * P_c; the query's position p is that of the window's
    token p in the relative position bias.

    Args:
        dim: channels C.
        num_heads: heads; divides `dim`.
        window_size: rows and columns of tokens in a window, (P_r, P_c).
    """

    def __init__(self, dim: int, num_heads: int, window_size: tuple[int, int]) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.kv = Linear(dim, 2 * dim)
        self.rel_pos_bias = RelPosBias(num_heads, window_size)
        self.proj = Linear(dim, dim)

    def forward(self, windows: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """Attend to the tokens of windows.

        Args:
            windows: (B', N, C), all windows of an image before the next image's.
            query: (B, N, heads, head_dim), scaled.

        Returns:
            (B', N, C).
        """
        key, value = self._project(windows)
        images = query.shape[0]
        times = windows.shape[0] // images if images != 0 else 0
        if is_open(times) or images > 1:
            image = torch.arange(windows.shape[0], device=windows.device) // times
            query = query.index_select(0, image)
        else:
            query = query.expand(times, -1, -1, -1)  # no copy
        return self.proj(attend(query.to(key.dtype), key, value, self.rel_pos_bias(), scale=1.0))

    def attention_weights(
        self, windows: torch.Tensor, tokens: torch.Tensor, query: torch.Tensor
    ) -> torch.Tensor:
        """Find what one query of each window attends to, for windows of one image.

        Args:
            windows: (B', N, C).
            tokens: (B',), the query's position in each window.
            query: (1, N, heads, head_dim), scaled.

        Returns:
            (B', N, heads): the weights of the window's tokens.
        """
        key, value = self._project(windows)
        query = query.expand(len(windows), -1, -1, -1).to(key.dtype)
        return weights_of_tokens(query, key, value, self.rel_pos_bias(), tokens, scale=1.0)

    def _project(self, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Give key and value: (B', N, heads, head_dim) each."""
        return self.kv(windows).unflatten(-1, (2, self.num_heads, -1)).unbind(2)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"


class Block(nn.Module):
    """Residual attention in windows and MLP, each after a LayerNorm; layer scale on demand. NHWC.

    (B, H, W, C) -> (B, H, W, C), or the windows that a map divides into, (B, windows, P_r, P_c, C),
    to the same.

    Args:
        dim: channels C.
        num_heads: heads; divides `dim`.
        window_size: rows and columns of tokens in a window, (P_r, P_c).
        is_global: whether the stage's query attends to the windows, or they to themselves.
        mlp_ratio: hidden channels of the MLP over C.
        layer_scale: first value of the factors of both branches; None for no factors.
        rate: of stochastic depth.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: tuple[int, int],
        *,
        is_global: bool,
        mlp_ratio: float,
        layer_scale: float | None,
        rate: float,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.is_global = is_global
        self.norm1 = nn.LayerNorm(dim)
        attention = GlobalAttention if is_global else WindowAttention
        self.attn = attention(dim, num_heads, window_size)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(rate)
        for name in ("gamma1", "gamma2"):
            gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
            self.register_parameter(name, gamma)

    def forward(self, x: torch.Tensor, query: torch.Tensor | None = None) -> torch.Tensor:
        """Apply the block.

        Args:
            x: (B, H, W, C) or (B, windows, P_r, P_c, C).
            query: (B, N, heads, head_dim), scaled; a block that `is_global` takes it.

        Returns:
            As `x`.
        """
        x = x + self.drop_path(self._scale(self._attend(self.norm1(x), query), self.gamma1))
        return x + self.drop_path(self._scale(self.mlp(self.norm2(x)), self.gamma2))

    def attention_maps(
        self,
        x: torch.Tensor,
        query: torch.Tensor | None = None,
        *,
        size: tuple[int, int],
        points: Sequence[Point],
    ) -> dict[str, AttentionMaps]:
        """Show what positions of a map attend to; as `NeighborhoodAttention` does.

        `x` and `query` are as in the forward pass, of one image.
        """
        sides, x = self.window_size, self.norm1(x)
        if x.ndim == 5:
            windows = x.flatten(0, 1).flatten(1, 2)
        else:
            windows = partition(x, sides)
        found = WindowPlaces.find(points, size, sides, device=x.device)
        inputs = (query,) if self.is_global else ()
        weights = self.attn.attention_weights(windows[found.windows], found.tokens, *inputs)
        kind = f"window {sides[0]}x{sides[1]}" + (", query of all" if self.is_global else "")
        return {kind: found.maps(weights)}

    def _attend(self, x: torch.Tensor, query: torch.Tensor | None) -> torch.Tensor:
        inputs = (query,) if self.is_global else ()
        if x.ndim == 5:
            return self.attn(x.flatten(0, 1).flatten(1, 2), *inputs).reshape(x.shape)
        windows = self.attn(partition(x, self.window_size), *inputs)
        return merge(windows, self.window_size, *x.shape[1:3])

    def _scale(self, x: torch.Tensor, gamma: torch.Tensor | None) -> torch.Tensor:
        return x if gamma is None else x * gamma


class GCViTStage(ChannelsLastStage):
    """Stage whose blocks share windows and a query of the whole map. NCHW in and out.

    Args:
        downsample: as `Stage` takes it.
        global_query: from the map that the blocks get; None where no block is global.
        blocks: `Block`s of one window size.
    """

    def __init__(
        self, downsample: nn.Module, global_query: GlobalQuery | None, blocks: Sequence[Block]
    ) -> None:
        super().__init__(downsample, blocks)
        self.global_query = global_query

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.downsample(x)
        queries = () if self.global_query is None else (self.global_query(x),)
        x = x.permute(0, 2, 3, 1)
        images, height, width = x.shape[:3]
        rows, columns = size = self.blocks[0].window_size
        # Windows that need no padding are cut once for all blocks.
        are_whole = not (is_open(height) or is_open(width) or height % rows or width % columns)
        if are_whole:
            windows = (height // rows) * (width // columns)
            x = partition(x, size).unflatten(1, size).unflatten(0, (images, windows))
        x = self.run_blocks(x, *queries)
        if are_whole:
            x = merge(x.flatten(0, 1).flatten(1, 2), size, height, width)
        return x.permute(0, 3, 1, 2)


def check_windows(window_size: int | Sequence[int]) -> tuple[int, ...]:
    """Give each stage the side of its windows, tokens.

    Raises:
        ValueError: it is neither a whole number of at least 1 nor four of them.
    """
    sides = (window_size,) * 4 if is_whole_number(window_size) else window_size
    is_list = isinstance(sides, Sequence) and not isinstance(sides, str)
    if not is_list or len(sides) != 4 or not all(is_whole_number(n) and n > 0 for n in sides):
        raise ValueError(
            f"window_size is {window_size!r}: a whole number of at least 1, or four (one a stage), "
            "tokens, is taken"
        )
    return tuple(sides)


class GCViT(HierarchicalBackbone):
    """GC ViT at any image size.

    Args:
        depths: blocks per stage.
        dims: channels per stage.
        num_heads: heads per stage; each divides its number of `dims`.
        window_size: side of the windows, tokens, one for all stages or four. Bias tables of a
            checkpoint for others are resized. A window larger than the map works by padding.
        mlp_ratio: hidden channels of the MLP over its input's.
        layer_scale: first value of the factors of every branch; None for no factors.
        is_dense: whether the third stage's query is pooled unless its window is 14, as in the
            official detection backbone. ``features_only=True`` and `DenseBackbone` set it, and
            windows of 24, unless they are given others.
        num_classes: classes of the head; 0 gives pooled features (B, dims[-1]).
        in_chans: channels of the image.
        global_pool: "avg", or "" for the unpooled map with num_classes=0.
        drop_rate: dropout rate before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
    """

    dense_norm = "layer_norm"
    dense_arguments = {"is_dense": True, "window_size": 24}

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        num_heads: Sequence[int],
        window_size: int | Sequence[int] = (7, 7, 14, 7),
        mlp_ratio: float = 3.0,
        layer_scale: float | None = None,
        *,
        is_dense: bool = False,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        check_arguments(depths, dims, in_chans, drop_path_rate)
        check_whole_number("dims[0]", dims[0], 4)  # squeeze and excitation takes a quarter
        sides = check_windows(window_size)
        is_list = isinstance(num_heads, Sequence) and len(num_heads) == len(dims)
        if not is_list or not all(is_whole_number(n) and n > 0 for n in num_heads):
            raise ValueError(f"num_heads is {num_heads!r}: four whole numbers of at least 1")
        if any(dim % heads for dim, heads in zip(dims, num_heads, strict=True)):
            raise ValueError(f"num_heads is {num_heads!r}: divisors of dims {dims} are taken")
        check_number("mlp_ratio", mlp_ratio, 1 / min(dims))
        if layer_scale is not None:
            check_number("layer_scale", layer_scale, 0)
        check_flag("is_dense", is_dense)
        check_number("drop_rate", drop_rate, 0, 1)
        pools = list(_QUERY_POOLS)
        pools[2] = int(is_dense and sides[2] != _WINDOW_OF_224)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, (dim, heads, side) in enumerate(zip(dims, num_heads, sides, strict=True)):
            size = (side, side)
            blocks = [
                Block(
                    dim, heads, size, is_global=j % 2 == 1, mlp_ratio=mlp_ratio,
                    layer_scale=layer_scale, rate=rate,
                )
                for j, rate in enumerate(rates[i])
            ]  # fmt: skip
            downsample = Downsample(dims[i - 1], dim) if i else nn.Identity()
            # Of one block none is global, and the query's parameters would get no gradient.
            has_query = depths[i] > 1
            query = GlobalQuery(dim, heads, size, _QUERY_BLOCKS[i], pools[i]) if has_query else None
            stages.append(GCViTStage(downsample, query, blocks))
        super().__init__(
            Stem(in_chans, dims[0]),
            stages,
            LayerNorm2d(dims[-1], eps=1e-5),
            ClassifierHead(dims[-1], num_classes, global_pool, drop_rate),
            dims=dims,
            in_chans=in_chans,
        )

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {n for n, _ in self.named_parameters() if n.endswith(".rel_pos_bias.table")}

    def adapt_checkpoint(self, state_dict: dict[str, torch.Tensor]) -> list[str]:
        for key in [k for k in state_dict if k.endswith(".relative_position_index")]:
            del state_dict[key]  # follows from the window
        resized = {}
        for key, own in self.state_dict().items():
            given = state_dict.get(key)
            if given is None:
                continue
            if ".se." in key and given.ndim == 2:  # the authors' linear layers
                state_dict[key] = given[:, :, None, None]
            if not key.endswith(".rel_pos_bias.table"):
                continue
            side = isqrt(len(given))
            if given.ndim == 2 and side**2 == len(given):
                # Offsets of query minus key, an axis for both, and heads.
                given = given.unflatten(0, (side, side)).permute(2, 0, 1).flip(1, 2)
                state_dict[key] = given
            is_square = given.ndim == 3 and given.shape[1] == given.shape[2]
            if is_square and given.shape[0] == own.shape[0] and given.shape != own.shape:
                state_dict[key] = resize_rel_pos_bias(given, own.shape[1:])
                windows = tuple((table.shape[1] + 1) // 2 for table in (given, own))
                resized[windows] = resized.get(windows, 0) + 1
        return [
            f"{count} tables of relative position bias from window_size {given} to {own} by "
            "bicubic interpolation"
            for (given, own), count in resized.items()
        ]


def _variant(depths: Sequence[int], dim: int, **arguments: Any) -> dict[str, Any]:
    """Arguments of a variant of `dim` channels in its first stage, 32 a head."""
    dims = tuple(dim * 2**i for i in range(4))
    return dict(depths=depths, dims=dims, num_heads=tuple(d // 32 for d in dims), **arguments)


_TINY = (3, 4, 19, 5)
_BASE = dict(mlp_ratio=2.0, layer_scale=1e-5)

VARIANTS = {
    "gc_vit_xxtiny": _variant((2, 2, 6, 2), 64),
    "gc_vit_xtiny": _variant((3, 4, 6, 5), 64),
    "gc_vit_tiny": _variant(_TINY, 64),
    "gc_vit_tiny2": _variant((3, 4, 29, 5), 64),
    "gc_vit_small": _variant(_TINY, 96, **_BASE),
    "gc_vit_small2": _variant((3, 4, 23, 5), 96, layer_scale=1e-5),
    "gc_vit_base": _variant(_TINY, 128, **_BASE),
    "gc_vit_large": _variant(_TINY, 192, **_BASE),
}

_HUB = "https://huggingface.co/nvidia/GCViT/resolve/main"
_OF_TIMM = (
    "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-weights-morevit"
)


def weights_of(
    file: str, params: float, gmacs: float, top1: float, *more: str, **metadata: Any
) -> Weights:
    """A file of the authors, further ones of the same shapes, and its results.

    Parameters and GMACs are the published ones where they are those of the published code; those
    of the other variants were counted on it.
    """
    url = None if file.startswith("https://drive") else f"{_HUB}/{file}"
    files = (url or file, *(f"{_OF_TIMM}/{name}" for name in more))
    return Weights(
        page="https://github.com/NVlabs/GCVit",
        files=files,
        url=url,
        license="cc-by-nc-sa-4.0",
        paper_name="Global Context Vision Transformers",
        paper_ids="arXiv:2206.09959",
        published=Published(params=params, gmacs=gmacs, top1=(top1,)),
        **metadata,
    )


_WHOLE = dict(crop_pct=1.0)
_SQUASHED = dict(crop_pct=1.0, crop_mode="squash")

WEIGHTS = {
    "gc_vit_xxtiny": weights_of(
        "gcvit_1k_xxtiny.pth.tar", 12, 2.1, 79.9, "gcvit_xxtiny_224_nvidia-d1d86009.pth", **_WHOLE
    ),
    "gc_vit_xtiny": weights_of(
        "gcvit_1k_xtiny.pth.tar", 20, 2.9, 82.0, "gcvit_xtiny_224_nvidia-274b92b7.pth"
    ),
    "gc_vit_tiny": weights_of(
        "gcvit_1k_tiny.pth.tar", 28, 4.8, 83.5, "gcvit_tiny_224_nvidia-ac783954.pth", **_WHOLE
    ),
    "gc_vit_tiny2": weights_of("gcvit_1k_tiny2.pth.tar", 34.5, 6.2, 83.7),
    "gc_vit_small": weights_of(
        "gcvit_1k_small.pth.tar", 51, 8.6, 84.3, "gcvit_small_224_nvidia-4e98afa2.pth"
    ),
    "gc_vit_small2": weights_of("gcvit_1k_small2.pth.tar", 68.6, 11.6, 84.8),
    "gc_vit_base": weights_of(
        "gcvit_1k_base.pth.tar", 90, 14.9, 85.0, "gcvit_base_224_nvidia-f009139b.pth", **_WHOLE
    ),
    "gc_vit_large": {
        "in1k": weights_of("gcvit_1k_large.pth.tar", 202.1, 32.6, 85.7, **_WHOLE),
        "in21k_ft_in1k": weights_of(
            "https://drive.google.com/uc?id=1maGDr6mJkLyRTUkspMzCgSlhDzNRFGEf",
            202.1, 32.6, 86.6, **_WHOLE,
        ),
        "in21k_ft_in1k_384": weights_of(
            "gcvit_21k_large_384.pth.tar", 202.9, 104.2, 87.4, input_size=(3, 384, 384),
            arguments=dict(window_size=(12, 12, 24, 12)), **_SQUASHED,
        ),
        "in21k_ft_in1k_512": weights_of(
            "gcvit_21k_large_512.pth.tar", 203.8, 202.6, 87.6, input_size=(3, 512, 512),
            arguments=dict(window_size=(16, 16, 32, 16)), **_SQUASHED,
        ),
    },
}  # fmt: skip

# Names that the official layout and timm's have in common, after those of their own.
_SHARED_RULES = [
    (r"\.blocks\.(\d*[13579])\.attn\.qkv\.", r".blocks.\1.attn.kv."),
    (r"\.attn\.(rel_pos\.)?relative_position_bias_table$", ".attn.rel_pos_bias.table"),
]
# The dense backbone's norms belong to the adapter.
KEY_RULES = {
    "official": [
        (r"^patch_embed\.proj\.", "stem.conv1."),
        (r"^patch_embed\.conv_down\.", "stem.down."),
        *[(rf"^levels\.{i}\.downsample\.", f"stages.{i + 1}.downsample.") for i in range(3)],
        (r"^levels\.(\d)\.q_global_gen\.to_q_global\.", r"stages.\1.global_query.blocks."),
        (r"^levels\.", "stages."),
        (r"\.(down|downsample)\.conv\.", r".\1.conv_block.conv."),
        (r"\.conv\.0\.", ".conv_dw."),
        (r"\.conv\.2\.fc\.0\.", ".se.fc1."),
        (r"\.conv\.2\.fc\.2\.", ".se.fc2."),
        (r"\.conv\.3\.", ".conv_pw."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
        *[(rf"^norm{i}\.", f"out_norms.{i}.") for i in range(4)],
        *_SHARED_RULES,
    ],
    "timm": [
        *[
            (rf"\.global_block\.blocks\.conv{i + 1}\.", f".global_query.blocks.{i}.")
            for i in range(3)
        ],
        (r"\.ls([12])\.gamma$", r".gamma\1"),
        (r"^stages\.3\.norm\.", "norm."),
        *_SHARED_RULES,
    ],
}
register_backbones(__name__, GCViT, VARIANTS, WEIGHTS, KEY_RULES)

"""MaxViT: multi-axis vision transformers.

Zhengzhong Tu, Hossein Talebi, Han Zhang, Feng Yang, Peyman Milanfar, Alan Bovik, Yinxiao Li.
ECCV 2022, arXiv:2204.01697.

Every block of every stage is an inverted residual (MBConv), then attention inside windows of
adjacent tokens (block attention), then attention inside windows of as many tokens spread evenly
over the map (grid attention), each attention with a relative position bias and followed by an MLP.
The first block of a stage halves the resolution. The head normalises after pooling and has a
hidden layer with tanh.

Any image size works, and equals the official network where windows divide the maps. Elsewhere an
attention pads its map with zeros at the bottom and right, to whole windows, and its padded tokens
are attended to by none: a real token sees the real tokens of its window alone. Windows keep the
side of the weights (7, 12 or 16 tokens) at every image size; `set_window_size`, and the argument
``window_size="fit:HxW"``, make them an image's 32nd part, which is what timm and the authors'
detectors do.

Where this differs from the official code: average pooling of an odd side divides by the positions
that there are, as TensorFlow does and timm does not; the last block has the full rate of
stochastic depth, where the official code gives block b of n the rate b / n of it.

The official code and weights (github.com/google-research/maxvit) are under the Apache 2.0 licence,
and so are timm's conversions of the weights, which are those that are loaded.

Legend: B batch, C channels, H and W height and width of the map. Maps are NCHW between stages and
NHWC in attention, on the same memory.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from timm.layers import DropPath, calculate_drop_path_rates
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers.arguments import check_number, check_whole_number, is_whole_number
from ..layers.attention_maps import AttentionMaps, Point
from ..layers.conv import (
    PointwiseConv,
    SqueezeExcite,
    fold_norm_into_next,
    fold_norm_into_previous,
    linear_on_cpu,
    prefers_channels_last,
    scale_and_shift,
)
from ..layers.mlp import Mlp
from ..layers.rel_pos import resize_rel_pos_bias
from ..layers.tracing import is_open
from ..layers.window_attention import WindowAttention, attend_to_real_tokens
from ..layers.window_places import WindowPlaces
from ..layers.windows import partition
from .base import (
    ChannelsLastStage,
    ClassifierHead,
    HierarchicalBackbone,
    check_arguments,
    init_linear,
)
from .registry import Published, Weights, register_backbones

# A window's rows and columns, one for both, or "fit:HxW" for those that fit an image in pixels.
WindowSize = int | Sequence[int] | str

_EXPANSION = 4  # of MBConv and of the MLPs


def resolve_window_size(name: str, value: WindowSize) -> tuple[int, int]:
    """Give the rows and columns of tokens in a window that the argument `name` asks for.

    Raises:
        ValueError: it is no whole number of at least 1, no pair of them and no "fit:HxW".
    """
    fit = re.fullmatch(r"fit:(\d+)x(\d+)", value) if isinstance(value, str) else None
    if fit:
        # At least one window a side in the last stage, whose stride is 32.
        sides = [-(-int(pixels) // 32) for pixels in fit.groups()]
    else:
        sides = [value, value] if is_whole_number(value) else value
    is_pair = isinstance(sides, Sequence) and not isinstance(sides, str) and len(sides) == 2
    if not is_pair or not all(is_whole_number(side) and side > 0 for side in sides):
        raise ValueError(
            f"{name} is {value!r}: tokens per side of a window, one whole number or two of at "
            'least 1, or "fit:HxW" for an image size in pixels, are taken'
        )
    return int(sides[0]), int(sides[1])


def make_norm(dim: int) -> nn.BatchNorm2d:
    """Make a BatchNorm as the official network has them."""
    return nn.BatchNorm2d(dim, eps=1e-3, momentum=0.01)


class SameConv(nn.Conv2d):
    """3x3 convolution with TensorFlow's SAME padding, by zeros. NCHW.

    (B, in_chans, H, W) -> (B, out_chans, ceil(H / stride), ceil(W / stride)). At stride 2 an even
    side is padded after its end alone, an odd one before its beginning too.
    """

    def __init__(
        self, in_chans: int, out_chans: int, stride: int = 1, groups: int = 1, bias: bool = True
    ) -> None:
        super().__init__(
            in_chans, out_chans, 3, stride, padding=2 - stride, groups=groups, bias=bias
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.stride == (2, 2):
            height, width = x.shape[2:]
            if is_open(height) or is_open(width):
                # One program for even and odd sides, and one formula for the size of its result.
                x = F.pad(x, (1, 1, 1, 1))
                for axis, side in ((2, height), (3, width)):
                    positions = torch.arange(side + 2, device=x.device) + (1 - side % 2)
                    x = x.index_select(axis, positions.clamp(max=side + 1))
            else:
                x = F.pad(x, (width % 2, 1, height % 2, 1))
        return super().forward(x)

    def forward_with_norm_and_gelu(self, x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        """Compute gelu(norm(self(x))) in one pass over memory; where `is_foldable` alone."""
        weight, bias = fold(self, after=norm)
        if self.stride == (2, 2):
            # An even side starts a position later than padding of 1 would have it. A column and
            # row of zeros before the kernel do so without a copy of the map.
            weight = F.pad(weight, (1 - x.shape[3] % 2, 0, 1 - x.shape[2] % 2, 0))
        weight = weight.contiguous(memory_format=torch.channels_last)
        return torch.ops.mkldnn._convolution_pointwise(
            x, weight, bias, [1, 1], self.stride, [1, 1], self.groups, "gelu", [], "tanh"
        )


_FOLDABLE = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.Identity, PointwiseConv, SameConv)


def is_foldable(x: torch.Tensor, *modules: nn.Module) -> bool:
    """Whether convolutions and norms of inference on `x` may be computed as one, by oneDNN.

    Not where a norm takes the statistics of the batch, where hooks are to see what a module
    returns, or where a module was exchanged.
    """
    return prefers_channels_last(x) and not any(
        type(module) not in _FOLDABLE
        or module.training
        or module._forward_hooks
        or module._forward_pre_hooks
        for module in modules
    )


def fold(
    conv: nn.Conv2d, before: nn.Module | None = None, after: nn.Module | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of after(conv(before(x))) in evaluation, the norms BatchNorm or identities.

    Folding for a call costs a pass over the weights and saves one over the map; keeping the result
    would be keeping weights twice. `before` goes with a 1x1 convolution alone.
    """
    weight, bias = conv.weight, conv.bias
    if isinstance(before, _BatchNorm):
        scale, shift = (t.to(weight.dtype) for t in scale_and_shift(before))
        addition = weight[:, :, 0, 0] @ shift
        bias = addition if bias is None else bias + addition
        weight = weight * scale[:, None, None]
    if isinstance(after, _BatchNorm):
        scale, shift = (t.to(weight.dtype) for t in scale_and_shift(after))
        bias = shift if bias is None else torch.addcmul(shift, bias, scale)
        weight = weight * scale[:, None, None, None]
    return weight, bias


class Stem(nn.Module):
    """3x3 convolution of stride 2, BatchNorm, GELU, 3x3 convolution. NCHW.

    (B, in_chans, H, W) -> (B, dim, ceil(H / 2), ceil(W / 2)).
    """

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv1 = SameConv(in_chans, dim, stride=2)
        self.norm1 = make_norm(dim)
        self.conv2 = SameConv(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Channels-last memory from here on, which attention needs and convolutions keep.
        x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        if is_foldable(x, self.conv1, self.norm1):
            return self.conv2(self.conv1.forward_with_norm_and_gelu(x, self.norm1))
        return self.conv2(F.gelu(self.norm1(self.conv1(x)), approximate="tanh"))

    def fuse(self) -> Stem:
        """Fold the norm into the convolution before it, in place, and return itself."""
        self.norm1 = fold_norm_into_previous(self.conv1, self.norm1)
        return self


class AvgPool(nn.Module):
    """Average of 2x2 positions, of those that there are at the end of an odd side. NCHW.

    (B, C, H, W) -> (B, C, ceil(H / 2), ceil(W / 2)).
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for axis in (2, 3):
            length = x.shape[axis]
            if is_open(length) or length % 2:
                # A copy of the last position changes no mean, and is dropped where the side is
                # even. (Not F.pad: inductor mistakes the strides of its gradient.)
                x = torch.cat([x, x.narrow(axis, length - 1, 1)], axis)
        return F.avg_pool2d(x, 2)


class MBConv(nn.Module):
    """Inverted residual with squeeze-and-excitation; changes resolution at stride 2. NCHW.

    (B, in_dim, H, W) -> (B, dim, ceil(H / stride), ceil(W / stride)): BatchNorm, 1x1 convolution to
    4 dim channels, BatchNorm, GELU, depthwise 3x3, BatchNorm, GELU, gates of dim / 4 hidden
    channels, 1x1 convolution; plus the input, pooled and projected where the shape changes.
    """

    def __init__(self, in_dim: int, dim: int, stride: int, drop_path: float) -> None:
        super().__init__()
        hidden_dim = _EXPANSION * dim
        self.pool = AvgPool() if stride == 2 else nn.Identity()
        self.shortcut = PointwiseConv(in_dim, dim) if in_dim != dim else nn.Identity()
        self.pre_norm = make_norm(in_dim)
        self.conv1 = PointwiseConv(in_dim, hidden_dim, bias=False)
        self.norm1 = make_norm(hidden_dim)
        self.conv2 = SameConv(hidden_dim, hidden_dim, stride, groups=hidden_dim, bias=False)
        self.norm2 = make_norm(hidden_dim)
        self.se = SqueezeExcite(hidden_dim, dim // 4, bias=True, activation="silu")
        self.conv3 = PointwiseConv(hidden_dim, dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = self.shortcut(self.pool(x))
        parts = (self.pre_norm, self.conv1, self.norm1, self.conv2, self.norm2)
        if is_foldable(x, *parts):
            weight, bias = fold(self.conv1, self.pre_norm, self.norm1)
            x = linear_on_cpu(x.permute(0, 2, 3, 1), weight[:, :, 0, 0], bias, gelu="tanh")
            x = self.conv2.forward_with_norm_and_gelu(x.permute(0, 3, 1, 2), self.norm2)
            return shortcut + self.drop_path(self.conv3(self.se(x)))
        x = F.gelu(self.norm1(self.conv1(self.pre_norm(x))), approximate="tanh")
        x = F.gelu(self.norm2(self.conv2(x)), approximate="tanh")
        return shortcut + self.drop_path(self.conv3(self.se(x)))

    def fuse(self) -> MBConv:
        """Fold the norms into the convolutions beside them, in place, and return itself."""
        self.pre_norm = fold_norm_into_next(self.pre_norm, self.conv1)
        self.norm1 = fold_norm_into_previous(self.conv1, self.norm1)
        self.norm2 = fold_norm_into_previous(self.conv2, self.norm2)
        return self


class PartitionAttention(nn.Module):
    """Residual attention inside windows or grids, then a residual MLP. NHWC.

    (B, H, W, C) -> (B, H, W, C), each branch after a LayerNorm.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: tuple[int, int],
        drop_path: float,
        *,
        is_grid: bool,
    ) -> None:
        super().__init__()
        self.is_grid = is_grid
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window_size)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, _EXPANSION * dim, gelu="tanh")
        self.drop_path = DropPath(drop_path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = attend_to_real_tokens(self.norm1(x), self.attn, is_grid=self.is_grid)
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def attention_maps(
        self, x: torch.Tensor, *, size: tuple[int, int], points: Sequence[Point]
    ) -> dict[str, AttentionMaps]:
        """Show what positions of a map attend to; as `NeighborhoodAttention` does."""
        sides = self.attn.window_size
        found = WindowPlaces.find(points, size, sides, is_grid=self.is_grid, device=x.device)
        windows = partition(self.norm1(x), sides, is_grid=self.is_grid)
        weights = self.attn.attention_weights(
            windows[found.windows], found.tokens, mask=found.places >= 0
        )
        kind = "grid" if self.is_grid else "window"
        return {f"{kind} {sides[0]}x{sides[1]}": found.maps(weights)}

    def set_window_size(self, size: tuple[int, int]) -> None:
        """Change the window, and resize the table of bias to it."""
        bias = self.attn.rel_pos_bias
        sides = tuple(2 * side - 1 for side in size)
        table = resize_rel_pos_bias(bias.table.detach(), sides, "bilinear")
        bias.table = nn.Parameter(table, bias.table.requires_grad)
        bias.window_size = size

    def extra_repr(self) -> str:
        return f"is_grid={self.is_grid}"


class Block(nn.Module):
    """MBConv, block attention, grid attention. NHWC.

    (B, H, W, in_dim) -> (B, ceil(H / stride), ceil(W / stride), dim).
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        stride: int,
        num_heads: int,
        window_size: tuple[int, int],
        grid_size: tuple[int, int],
        drop_path: float,
    ) -> None:
        super().__init__()
        self.conv = MBConv(in_dim, dim, stride, drop_path)
        self.block_attn = PartitionAttention(dim, num_heads, window_size, drop_path, is_grid=False)
        self.grid_attn = PartitionAttention(dim, num_heads, grid_size, drop_path, is_grid=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.grid_attn(self.block_attn(x))


class Head(ClassifierHead):
    """Global pooling, LayerNorm, a hidden layer with tanh, dropout and a linear classifier.

    (B, C, H, W) -> (B, num_classes). Features before the classifier are those after tanh. Without
    pooling, which the norm follows, there are neither norm nor hidden layer.
    """

    def reset(
        self, num_classes: int, pool_type: str | None = None, like: torch.Tensor | None = None
    ) -> None:
        """Replace the classifier, and the pooling unless `pool_type` is None.

        Norm and hidden layer stay as they are unless the pooling gives another number of channels,
        or none. Arguments and errors are those of `ClassifierHead.reset`.
        """
        super().reset(num_classes, pool_type, like)
        is_pooled = bool(self.global_pool.pool_type)
        hidden = getattr(self, "hidden", None)
        if not is_pooled:
            self.norm = self.hidden = nn.Identity()
        elif getattr(hidden, "in_features", None) != self.num_features:
            self.norm = nn.LayerNorm(self.num_features)
            self.hidden = nn.Linear(self.num_features, self.num_features)
            init_linear(self.hidden)
            if like is not None:
                self.norm.to(like)
                self.hidden.to(like)
            self.train(self.training)

    def forward(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.global_pool(x)
        if self.global_pool.pool_type:
            x = self.hidden(self.norm(x)).tanh()
        x = self.drop(x)
        return x if pre_logits else self.fc(x)


class MaxViT(HierarchicalBackbone):
    """MaxViT at any image size.

    Args:
        depths: blocks per stage.
        dims: channels per stage, at least 4.
        stem_dim: channels of the stem.
        head_dim: channels of an attention head; divides all of `dims`.
        window_size: rows and columns of tokens in a window of block attention, one for both, or
            "fit:HxW" for a 32nd of an image's height and width, pixels, rounded up. It may be
            larger than a map. Bias tables of a checkpoint for another one are resized.
        grid_size: the same for grid attention; `window_size` if None.
        num_classes: classes of the head; 0 gives pooled features (B, dims[-1]).
        in_chans: channels of the image.
        global_pool: "avg", or "" for the unpooled map with num_classes=0.
        drop_rate: dropout rate before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.

    Attributes:
        window_size: rows and columns of tokens in a window of block attention.
        grid_size: the same of grid attention.
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 5, 2),
        dims: Sequence[int] = (64, 128, 256, 512),
        stem_dim: int = 64,
        head_dim: int = 32,
        window_size: WindowSize = 7,
        grid_size: WindowSize | None = None,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        check_arguments(depths, dims, in_chans, drop_path_rate)
        check_whole_number("the least of dims", min(dims), 4)  # a quarter is in the gates
        check_whole_number("stem_dim", stem_dim, 1)
        check_whole_number("head_dim", head_dim, 1)
        if any(dim % head_dim for dim in dims):
            raise ValueError(f"head_dim is {head_dim}: a divisor of all of dims {dims} is taken")
        window, grid = self._resolve_sizes(window_size, grid_size)
        check_number("drop_rate", drop_rate, 0, 1)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, dim in enumerate(dims):
            in_dims = [dims[i - 1] if i else stem_dim, *[dim] * (depths[i] - 1)]
            blocks = [
                Block(in_dim, dim, 1 if j else 2, dim // head_dim, window, grid, rate)
                for j, (in_dim, rate) in enumerate(zip(in_dims, rates[i], strict=True))
            ]
            stages.append(ChannelsLastStage(nn.Identity(), blocks))
        super().__init__(
            Stem(in_chans, stem_dim),
            stages,
            nn.Identity(),  # the head's comes after pooling
            Head(dims[-1], num_classes, global_pool, drop_rate),
            dims=dims,
            in_chans=in_chans,
        )
        self.window_size, self.grid_size = window, grid
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @staticmethod
    def _resolve_sizes(
        window_size: WindowSize, grid_size: WindowSize | None
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        window = resolve_window_size("window_size", window_size)
        return window, window if grid_size is None else resolve_window_size("grid_size", grid_size)

    def set_window_size(self, window_size: WindowSize, grid_size: WindowSize | None = None) -> None:
        """Change windows and grids in place, bias tables resized by bilinear interpolation.

        The tables are new parameters: an optimizer of the old ones is to be made anew.

        Args:
            window_size: as the constructor takes it.
            grid_size: the same; `window_size` if None.

        Raises:
            ValueError: one is not what the constructor takes.
        """
        self.window_size, self.grid_size = self._resolve_sizes(window_size, grid_size)
        for stage in self.stages:
            for block in stage.blocks:
                block.block_attn.set_window_size(self.window_size)
                block.grid_attn.set_window_size(self.grid_size)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(".rel_pos_bias.table")}

    def classifier_names(self) -> str | None:
        return "head.fc" if isinstance(self.head.fc, nn.Linear) else None

    def adapt_checkpoint(self, state_dict: dict[str, torch.Tensor]) -> list[str]:
        """Fit the tables of bias of another window, in place, and say so."""
        resized: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
        for key, own in self.state_dict().items():
            given = state_dict.get(key)
            if not key.endswith(".rel_pos_bias.table") or given is None or given.ndim != 3:
                continue
            is_resizable = given.shape[0] == own.shape[0] and all(n % 2 for n in given.shape[1:])
            if given.shape != own.shape and is_resizable:
                state_dict[key] = resize_rel_pos_bias(given, tuple(own.shape[1:]), "bilinear")
                windows = tuple(
                    tuple((n + 1) // 2 for n in table.shape[1:]) for table in (given, own)
                )
                resized[windows] = resized.get(windows, 0) + 1
        return [
            f"{count} tables of relative position bias from windows of {given[0]}x{given[1]} to "
            f"{own[0]}x{own[1]} tokens by bilinear interpolation"
            for (given, own), count in resized.items()
        ]


def _dims(dim: int) -> tuple[int, ...]:
    return dim, 2 * dim, 4 * dim, 8 * dim


_DEEP = (2, 6, 14, 2)
VARIANTS = {
    "maxvit_tiny": dict(depths=(2, 2, 5, 2), dims=_dims(64), stem_dim=64),
    "maxvit_small": dict(depths=(2, 2, 5, 2), dims=_dims(96), stem_dim=64),
    "maxvit_base": dict(depths=_DEEP, dims=_dims(96), stem_dim=64),
    "maxvit_large": dict(depths=_DEEP, dims=_dims(128), stem_dim=128),
    "maxvit_xlarge": dict(depths=_DEEP, dims=_dims(192), stem_dim=192),
}


def _weights(
    variant: str, size: int, data: str, params: float, gmacs: float, top1: float | None = None
) -> Weights:
    """The file of timm's hub for a variant, an image size in pixels and its training data."""
    hub_id = f"timm/maxvit_{variant}_tf_{size}.{data}"
    is_legacy = (size, data) == (224, "in1k")  # all others scale images to -1 ... 1
    mean_and_std = {} if is_legacy else dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    crop = dict(crop_pct=0.95) if size == 224 else dict(crop_pct=1.0, crop_mode="squash")
    return Weights(
        page="https://huggingface.co/timm",
        files=(f"https://huggingface.co/{hub_id}",),
        hf_hub_id=hub_id,
        license="apache-2.0",
        paper_name="MaxViT: Multi-Axis Vision Transformer",
        paper_ids="arXiv:2204.01697",
        input_size=(3, size, size),
        num_classes=21843 if data == "in21k" else 1000,
        arguments={} if size == 224 else dict(window_size=size // 32),
        published=Published(params, gmacs, () if top1 is None else (top1,)),
        **mean_and_std,
        **crop,
    )


def _tagged(variant: str, *files: tuple) -> dict[str, Weights]:
    return {
        data if size == 224 else f"{data}_{size}": _weights(variant, size, data, *results)
        for size, data, *results in files
    }


# Accuracies are the authors'. So are millions of parameters and GMACs of tiny and small at 224; the
# others are counted here, where the authors' are larger (base 24.2 GMACs, large 43.9 and xlarge
# 97.8 at 224; tiny 33.7 at 512), round the parameters of other windows down, or are not given.
_TUNED = "in21k_ft_in1k"
WEIGHTS = {
    "maxvit_tiny": _tagged(
        "tiny",
        (224, "in1k", 31, 5.6, 83.62),
        (384, "in1k", 31, 17.5, 85.24),
        (512, "in1k", 31, 33.1, 85.72),
    ),
    "maxvit_small": _tagged(
        "small",
        (224, "in1k", 69, 11.7, 84.45),
        (384, "in1k", 69, 35.8, 85.74),
        (512, "in1k", 69, 66.7, 86.19),
    ),
    "maxvit_base": _tagged(
        "base",
        (224, "in1k", 119, 24.0, 84.95),
        (384, "in1k", 119.653, 73.5, 86.34),
        (512, "in1k", 119.876, 136.9, 86.66),
        (224, "in21k", 135.496, 24.0),
        (384, _TUNED, 119.653, 73.5, 88.24),
        (512, _TUNED, 119.876, 136.9, 88.38),
    ),
    "maxvit_large": _tagged(
        "large",
        (224, "in1k", 212, 43.7, 85.17),
        (384, "in1k", 212, 132.2, 86.40),
        (512, "in1k", 212, 243.3, 86.70),
        (224, "in21k", 233.150, 43.7),
        (384, _TUNED, 212, 132.2, 88.32),
        (512, _TUNED, 212, 243.3, 88.46),
    ),
    "maxvit_xlarge": _tagged(
        "xlarge",
        (224, "in21k", 506.988, 97.5),
        (384, _TUNED, 475, 292.3, 88.51),
        (512, _TUNED, 475.769, 531.9, 88.70),
    ),
}

_PARTS = {"block": "block_attn", "grid": "grid_attn"}
KEY_RULES = {
    "timm": [
        *[(rf"\.attn_{part}\.", f".{own}.") for part, own in _PARTS.items()],
        (r"\.attn\.rel_pos\.relative_position_bias_table$", ".attn.rel_pos_bias.table"),
        (r"\.conv\.shortcut\.expand\.", ".conv.shortcut."),
        (r"\.conv\.conv1_1x1\.", ".conv.conv1."),
        (r"\.conv\.conv2_kxk\.", ".conv.conv2."),
        (r"\.conv\.conv3_1x1\.", ".conv.conv3."),
        (r"^head\.pre_logits\.fc\.", "head.hidden."),
    ],
}

register_backbones(__name__, MaxViT, VARIANTS, WEIGHTS, KEY_RULES)

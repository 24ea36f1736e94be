"""BiFormer: attention of each region of a map to the few regions that suit it best.

Lei Zhu, Xinjiang Wang, Zhanghan Ke, Wayne Zhang, Rynson Lau. BiFormer: Vision Transformer with
Bi-Level Routing Attention. CVPR 2023, arXiv:2303.08810.

- A block is a depthwise 3x3 convolution (`BiFormer` alone), routing attention and an MLP, each
  added to its input, the latter two after a LayerNorm.
- Maps are cut into num_regions x num_regions regions: 7 for ImageNet, 8 for ADE20K, 16 for COCO.
  No weight depends on that, on topk or on the size of the image.
- The last stage attends to the whole map. As in the official code, and other than in the paper, it
  has 8 heads, no bias in its projection, and LePE of its input.

`BiFormerSTL` is the authors' study of attention alone, in Swin's layout. It comes twice, with
different attention: that of `BiFormer`, and one whose regions are ragged at the edge
(`layers/routing_attention.py`) and whose last stage has LePE of the values.

Any image size works: attention pads as the official detection backbone does. The stem and the
downsamplers of `BiFormerSTL`, whose official ones drop what is left at the edge, pad with zeros.
The official code fails on maps smaller than num_regions in the ragged design; here regions have
one token at least.

Training: rates of stochastic depth grow linearly over all blocks.

The official code and weights (github.com/rayleizhu/BiFormer) are under the MIT licence.

Legend: B batch, C channels, H and W height and width of the map. Maps are NCHW between stages and
NHWC within, on the same memory.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from timm.layers import DropPath, calculate_drop_path_rates
from torch import nn
from torch.nn import functional as F

from ..layers.arguments import check_flag, check_number, check_whole_number, is_whole_number
from ..layers.attention_maps import AttentionMaps, Point, maps_of_all
from ..layers.conv import (
    Conv,
    ConvNorm,
    fold_norm_into_previous,
    scale_and_shift,
)
from ..layers.depthwise import ResidualDepthwise, depthwise
from ..layers.linear import Linear
from ..layers.mlp import Mlp
from ..layers.routing_attention import RoutingAttention
from ..layers.tracing import is_open
from ..layers.window_attention import attend, weights_of_tokens
from .base import ChannelsLastStage, ClassifierHead, HierarchicalBackbone, check_arguments
from .registry import Published, Weights, register_backbones

# Heads of the attention to the whole map, in the last stage of every published model.
_GLOBAL_HEADS = 8


class ConvStem(nn.Module):
    """Two 3x3 convolutions of stride 2 with BatchNorm, exact GELU between them. NCHW.

    (B, in_chans, H, W) -> (B, dim, ceil(H / 4), ceil(W / 4)).
    """

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_chans, dim // 2, 3, stride=2)
        self.conv2 = ConvNorm(dim // 2, dim, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2(F.gelu(self.conv1(x)))


def _pad_patches(x: torch.Tensor, side: int) -> torch.Tensor:
    """Pad an NCHW map with zeros at the bottom and right, so that whole patches cover it."""
    height, width = x.shape[2:]
    if is_open(height) or is_open(width) or height % side or width % side:
        return F.pad(x, (0, side - 1, 0, side - 1))  # a convolution drops what is too much
    return x


class PatchStem(nn.Module):
    """4x4 convolution of stride 4, zeros where a patch is beyond the image, and BatchNorm. NCHW.

    (B, in_chans, H, W) -> (B, dim, ceil(H / 4), ceil(W / 4)).
    """

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv = Conv(in_chans, dim, 4, stride=4)
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(_pad_patches(x, 4)))

    def fuse(self) -> PatchStem:
        """Fold the norm into the convolution, in place; exact in evaluation mode."""
        self.norm = fold_norm_into_previous(self.conv, self.norm)
        return self


class PatchDownsample(nn.Module):
    """BatchNorm, then a 2x2 convolution of stride 2, zeros where it is beyond the map. NCHW.

    (B, in_dim, H, W) -> (B, dim, ceil(H / 2), ceil(W / 2)).
    """

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_dim)
        self.conv = Conv(in_dim, dim, 2, stride=2)
        self.shift: nn.Conv2d | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(_pad_patches(self.norm(x), 2))
        if self.shift is None:
            return y
        return y + self.shift(_pad_patches(x.new_ones(1, 1, *x.shape[2:]), 2))

    @torch.no_grad()
    def fuse(self) -> PatchDownsample:
        """Fold the norm into the convolution, in place; exact in evaluation mode.

        What the norm adds does not reach padding, so it is a convolution of its own, of ones.
        """
        if isinstance(self.norm, nn.Identity):
            return self
        scale, shift = scale_and_shift(self.norm)
        weight = self.conv.weight.double()
        self.shift = nn.Conv2d(1, weight.shape[0], 2, stride=2, bias=False).to(self.conv.weight)
        self.shift.weight.copy_((weight * shift[:, None, None]).sum(1, keepdim=True))
        self.shift.requires_grad_(self.conv.weight.requires_grad)
        self.conv.weight.copy_(weight * scale[:, None, None])
        self.norm = nn.Identity()
        return self


class GlobalAttention(nn.Module):
    """Multi-head attention of all tokens of a map to each other. NHWC.

    (B, H, W, C) -> (B, H, W, C). A depthwise 5x5 convolution is added to the heads' results.

    Args:
        dim: channels C.
        num_heads: heads; divides `dim`.
        lepe_of_values: whether that is LePE, of the values, or a convolution of the layer's input.
            The two have names of their own, so that weights are not taken for the other's.
    """

    def __init__(self, dim: int, num_heads: int, *, lepe_of_values: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.lepe_of_values = lepe_of_values
        self.qkv = Linear(dim, 3 * dim, bias=False)
        conv = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.add_module("lepe" if lepe_of_values else "pos_embed", conv)
        self.proj = Linear(dim, dim)

    def forward(self, x: torch.Tensor, norm: nn.Module | None = None) -> torch.Tensor:
        """Attend; arguments as those of `RoutingAttention`."""
        x = x if norm is None else norm(x)
        qkv = self.qkv(x)
        out = attend(*self._split(qkv)).unflatten(1, x.shape[1:3])
        if self.lepe_of_values:
            return self.proj(out + depthwise(self.lepe, qkv[..., -x.shape[-1] :]))
        return self.proj(out + depthwise(self.pos_embed, x))

    def attention_maps(
        self,
        x: torch.Tensor,
        norm: nn.Module | None = None,
        *,
        size: tuple[int, int],
        points: Sequence[Point],
    ) -> dict[str, AttentionMaps]:
        """Show what positions of a map attend to; as `NeighborhoodAttention` does."""
        x = x if norm is None else norm(x)
        tokens = [row * size[1] + column for row, column in points]
        parts = [part.expand(len(points), -1, -1, -1) for part in self._split(self.qkv(x))]
        return {
            "all positions": maps_of_all(
                weights_of_tokens(*parts, None, torch.tensor(tokens, device=x.device)), size
            )
        }

    def _split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Give query, key and value: (B, H * W, heads, head_dim) each."""
        return qkv.flatten(1, 2).unflatten(-1, (3, self.num_heads, -1)).unbind(2)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, lepe_of_values={self.lepe_of_values}"


class Block(nn.Module):
    """Position encoding if asked for, attention and MLP, each residual. NHWC.

    (B, H, W, C) -> (B, H, W, C).

    Args:
        dim: channels C.
        attn: attention, NHWC.
        mlp_ratio: hidden channels of the MLP over C.
        has_pos_embed: whether a depthwise convolution comes first.
        rate: of stochastic depth, of attention and of the MLP.
    """

    def __init__(
        self, dim: int, attn: nn.Module, mlp_ratio: float, has_pos_embed: bool, rate: float
    ) -> None:
        super().__init__()
        self.pos_embed = ResidualDepthwise(dim) if has_pos_embed else nn.Identity()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pos_embed(x)
        x = x + self.drop_path(self.attn(x, self.norm1))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def _per_stage(name: str, value: int | Sequence[int]) -> tuple[int, ...]:
    """Give each of the three stages that route its number.

    Raises:
        ValueError: it is neither a whole number of at least 1 nor three of them.
    """
    numbers = (value,) * 3 if is_whole_number(value) else value
    is_list = isinstance(numbers, Sequence) and not isinstance(numbers, str)
    if not is_list or len(numbers) != 3 or not all(is_whole_number(n) and n > 0 for n in numbers):
        raise ValueError(
            f"{name} is {value!r}: a whole number of at least 1, or three (of the first three "
            "stages), is taken"
        )
    return tuple(numbers)


class BiFormer(HierarchicalBackbone):
    """BiFormer at any image size.

    Args:
        depths: blocks per stage.
        dims: channels per stage.
        num_regions: regions per side into which attention cuts the map, one number for the first
            three stages or three. Weights do not depend on it.
        topk: regions that a region attends to, one number for the first three stages or three; at
            most num_regions**2.
        head_dim: channels of a head in the first three stages; divides their `dims`.
        mlp_ratio: hidden channels of the MLP over its input's.
        is_ragged: whether attention is that of `biformer_stl_nchw`: regions ragged at the edge
            where others pad, and LePE of the values in the last stage.
        num_classes: classes of the head; 0 gives pooled features (B, dims[-1]).
        in_chans: channels of the image.
        global_pool: "avg", or "" for the unpooled map with num_classes=0.
        drop_rate: dropout rate before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
    """

    dense_norm = "layer_norm"
    dense_norm_eps = 1e-6
    # Published results are of the raw weights; the average that files may hold beside is not.
    checkpoint_nests = ("model",)
    has_pos_embed = True

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        num_regions: int | Sequence[int] = 7,
        topk: int | Sequence[int] = (1, 4, 16),
        head_dim: int = 32,
        mlp_ratio: float = 3.0,
        is_ragged: bool = False,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        check_arguments(depths, dims, in_chans, drop_path_rate)
        check_whole_number("dims[0]", dims[0], 2)  # a stem of two convolutions halves it
        num_regions = _per_stage("num_regions", num_regions)
        topk = _per_stage("topk", topk)
        check_whole_number("head_dim", head_dim, 1)
        if any(dim % head_dim for dim in dims[:3]):
            raise ValueError(
                f"head_dim is {head_dim}: a divisor of the first three of dims {dims} is taken"
            )
        if dims[3] % _GLOBAL_HEADS:
            raise ValueError(
                f"dims[3] is {dims[3]}: a multiple of {_GLOBAL_HEADS}, the last stage's heads, is "
                "taken"
            )
        check_number("mlp_ratio", mlp_ratio, 1 / min(dims))
        check_flag("is_ragged", is_ragged)
        check_number("drop_rate", drop_rate, 0, 1)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, dim in enumerate(dims):
            blocks = []
            for rate in rates[i]:
                if i < 3:
                    attn = RoutingAttention(
                        dim, dim // head_dim, num_regions[i], topk[i], is_ragged=is_ragged
                    )
                else:
                    attn = GlobalAttention(dim, _GLOBAL_HEADS, lepe_of_values=is_ragged)
                blocks.append(Block(dim, attn, mlp_ratio, self.has_pos_embed, rate))
            downsample = self.make_downsample(dims[i - 1], dim) if i else nn.Identity()
            stages.append(ChannelsLastStage(downsample, blocks))
        super().__init__(
            self.make_stem(in_chans, dims[0]),
            stages,
            nn.BatchNorm2d(dims[-1]),
            ClassifierHead(dims[-1], num_classes, global_pool, drop_rate),
            dims=dims,
            in_chans=in_chans,
        )
        self.is_ragged = is_ragged
        if is_ragged:  # the authors' linear layers are 1x1 convolutions there, begun as such
            for module in self.stages.modules():
                if isinstance(module, nn.Linear):
                    module.reset_parameters()

    def make_stem(self, in_chans: int, dim: int) -> nn.Module:
        """Make the module from image to the first stage's map."""
        return ConvStem(in_chans, dim)

    def make_downsample(self, in_dim: int, dim: int) -> nn.Module:
        """Make the module from a stage's map to the next one's, of half the size."""
        return ConvNorm(in_dim, dim, 3, stride=2)

    def adapt_checkpoint(self, state_dict: dict[str, torch.Tensor]) -> list[str]:
        of_other = [r"\.attn\.qkv_linear\.", r"stages\.3\..*\.attn\.lepe\."]
        if self.is_ragged:
            of_other = [r"\.attn\.qkv\.qkv\.", r"\.attn\.pos_embed\."]
        # Official files call the last stage's convolutions alike.
        is_ours = any(".attn.proj." in k for k in state_dict if k.startswith("stages.0."))
        if any(re.search(name, k) for name in of_other[: 1 + is_ours] for k in state_dict):
            design = "padded" if self.is_ragged else "ragged"
            raise ValueError(
                f"the checkpoint is of a model with {design} regions, whose attention is another "
                "function of weights of the same shapes (biformer_stl_nchw alone has ragged ones)"
            )
        for key, own in self.state_dict().items():
            given = state_dict.get(key)
            if own.ndim == 2 and given is not None and given.shape == (*own.shape, 1, 1):
                state_dict[key] = given[:, :, 0, 0]
        return []


class BiFormerSTL(BiFormer):
    """The authors' baseline in Swin's layout, at any image size.

    Arguments are those of `BiFormer`. Patches that do not overlap are projected, and blocks have
    no convolution.
    """

    has_pos_embed = False

    def make_stem(self, in_chans: int, dim: int) -> nn.Module:
        return PatchStem(in_chans, dim)

    def make_downsample(self, in_dim: int, dim: int) -> nn.Module:
        return PatchDownsample(in_dim, dim)


_SMALL = (4, 4, 18, 4)
_STL = dict(depths=(2, 2, 6, 2), dims=(96, 192, 384, 768), mlp_ratio=4.0)

VARIANTS = {
    "biformer_tiny": dict(depths=(2, 2, 8, 2), dims=(64, 128, 256, 512)),
    "biformer_small": dict(depths=_SMALL, dims=(64, 128, 256, 512)),
    "biformer_base": dict(depths=_SMALL, dims=(96, 192, 384, 768)),
}
VARIANTS_STL = {
    "biformer_stl": _STL,
    "biformer_stl_nchw": dict(_STL, is_ragged=True),
}


def weights_of(key: str, published: Published, first_conv: str) -> Weights:
    """The file that the authors call `key`, which is in a folder that no program can read."""
    return Weights(
        page="https://github.com/rayleizhu/BiFormer",
        files=(f"{key} of https://1drv.ms/u/s!AkBbczdRlZvChGsXFqAA-PVnA-R8?e=IPlOCG",),
        license="mit",
        paper_name="BiFormer: Vision Transformer with Bi-Level Routing Attention",
        paper_ids="arXiv:2303.08810",
        first_conv=first_conv,
        published=published,
    )


# COCO figures are the paper's; the authors' second run of biformer_small gave 47.3 with RetinaNet
# and 48.1 / 43.6 with Mask R-CNN.
_PUBLISHED = {
    "biformer_tiny": Published(params=13.1, gmacs=2.2, top1=(81.4,)),
    "biformer_small": Published(
        params=25.5, gmacs=4.5, top1=(83.8,), retinanet=45.9, mask_rcnn=(47.8, 43.2),
        semantic_fpn=48.9,
    ),
    "biformer_base": Published(
        params=56.8, gmacs=9.8, top1=(84.3,), retinanet=47.1, mask_rcnn=(48.6, 43.7),
        semantic_fpn=49.9,
    ),
}  # fmt: skip
_PUBLISHED_STL = {
    "biformer_stl": Published(params=28.4, gmacs=4.6, top1=(82.7,)),
    "biformer_stl_nchw": Published(params=28.4, gmacs=4.6, top1=(82.7,)),
}
WEIGHTS = {
    name: weights_of(f"{name}_in1k", published, "stem.conv1.conv")
    for name, published in _PUBLISHED.items()
}
WEIGHTS_STL = {
    name: weights_of(f"{name}_in1k", published, "stem.conv")
    for name, published in _PUBLISHED_STL.items()
}

# Official names -> ours; the dense backbone's out norms belong to the adapter.
_OF_INPUT = (r"^stages\.3\.blocks\.(\d+)\.attn\.lepe\.", r"stages.3.blocks.\1.attn.pos_embed.")
_BLOCK_RULES = [
    (r"\.attn\.qkv\.qkv\.", ".attn.qkv."),
    (r"\.attn\.wo\.", ".attn.proj."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.[23]\.", ".mlp.fc2."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
    (r"^extra_norms\.", "out_norms."),
]
KEY_RULES = {
    "official": [
        *[(rf"^downsample_layers\.0\.{3 * i}\.", f"stem.conv{i + 1}.conv.") for i in (0, 1)],
        *[(rf"^downsample_layers\.0\.{3 * i + 1}\.", f"stem.conv{i + 1}.norm.") for i in (0, 1)],
        (r"^downsample_layers\.(\d)\.0\.", r"stages.\1.downsample.conv."),
        (r"^downsample_layers\.(\d)\.1\.", r"stages.\1.downsample.norm."),
        (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
        _OF_INPUT,
        *_BLOCK_RULES,
    ],
}
_RULES_STL = [
    (r"^downsample_layers\.0\.0\.", "stem.conv."),
    (r"^downsample_layers\.0\.1\.", "stem.norm."),
    (r"^downsample_layers\.(\d)\.0\.", r"stages.\1.downsample.norm."),
    (r"^downsample_layers\.(\d)\.1\.", r"stages.\1.downsample.conv."),
]
KEY_RULES_STL = {
    "official": [*_RULES_STL, _OF_INPUT, *_BLOCK_RULES],
    "official, channels first": [
        *_RULES_STL,
        (r"\.attn\.qkv_linear\.", ".attn.qkv."),
        (r"\.attn\.output_linear\.", ".attn.proj."),
        *_BLOCK_RULES[2:],
    ],
}
register_backbones(__name__, BiFormer, VARIANTS, WEIGHTS, KEY_RULES)
register_backbones(__name__, BiFormerSTL, VARIANTS_STL, WEIGHTS_STL, KEY_RULES_STL)

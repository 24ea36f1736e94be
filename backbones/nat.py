"""NAT, DiNAT and DiNAT_s: transformers of neighborhood attention, plain and dilated.

Ali Hassani, Steven Walton, Jiachen Li, Shen Li, Humphrey Shi. Neighborhood Attention Transformer.
CVPR 2023, arXiv:2204.07143.
Ali Hassani, Humphrey Shi. Dilated Neighborhood Attention Transformer. arXiv:2209.15001.

Every position attends to the kernel_size x kernel_size positions around it; in DiNAT every other
block dilates that neighborhood, which then spans the map. Two macro designs:

- NAT and DiNAT (`NAT`): a stem and downsamplers of overlapping 3x3 convolutions;
- DiNAT_s (`DiNATS`): those of Swin, non-overlapping patches and their merging.

The isotropic models, of one map, are in `nat_isotropic.py`.

A block adds two residual branches, neighborhood attention with a relative position bias and an
MLP, each after a LayerNorm. Any image size works: attention pads maps that are smaller than
kernel_size * dilation (`NeighborhoodAttention`). Weights do not depend on dilations, which are
part of a recipe: the detectors and segmenters of the paper have others than the classifiers.

Training: rates of stochastic depth grow linearly over all blocks. ImageNet training decays the
bias tables as any matrix; the detectors' and segmenters' recipes do not.

The official code and weights (github.com/SHI-Labs/Neighborhood-Attention-Transformer) are under
the MIT licence.

Legend: B batch, C channels, H and W height and width of the map. Maps are NCHW between stages and
NHWC within, on the same memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm2d, calculate_drop_path_rates
from torch import nn
from torch.nn import functional as F

from ..layers.arguments import check_number, check_whole_number, is_whole_number
from ..layers.linear import Linear
from ..layers.mlp import Mlp
from ..layers.neighborhood_attention import NeighborhoodAttention
from ..layers.rel_pos import resize_rel_pos_bias
from .base import ChannelsLastStage, ClassifierHead, HierarchicalBackbone, check_arguments
from .registry import Published, Weights, register_backbones

# Dilations of a stage's blocks in turn, over and over.
Patterns = tuple[tuple[int, ...], ...]
Dilations = int | str | Sequence[Sequence[int]]

_LONG_640 = (1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5)
_LONG_MASK2FORMER = (1, 2, 1, 3, 1, 2, 1, 3, 1, 2, 1, 3, 1, 2, 1, 3, 1, 3)

# The dilations of the published models by what they are for; sizes are of images, pixels.
PRESETS: dict[str, Patterns] = {
    "imagenet": ((1, 8), (1, 4), (1, 2), (1,)),
    "imagenet_384": ((1, 13), (1, 6), (1, 3), (1,)),
    "coco": ((1, 28), (1, 7, 1, 14), (1, 3, 1, 5, 1, 7), (1, 3)),
    "ade20k": ((1, 16), (1, 4, 1, 8), (1, 2, 1, 3, 1, 4), (1, 2)),
    "ade20k_640": ((1, 20), (1, 5, 1, 10), _LONG_640, (1, 2)),
    "mask2former": ((1, 14), (1, 4, 1, 7), _LONG_MASK2FORMER, (1,)),
}
# DiNAT_s has two blocks in its second stage, where those above have four.
PRESETS_S: dict[str, Patterns] = {
    "imagenet": PRESETS["imagenet"],
    "imagenet_384": PRESETS["imagenet_384"],
    "coco": ((1, 28), (1, 14), (1, 3, 1, 5, 1, 7), (1, 3)),
    "ade20k": ((1, 16), (1, 8), (1, 2, 1, 3, 1, 4), (1, 2)),
    "ade20k_640": ((1, 20), (1, 10), _LONG_640, (1, 2)),
}


def fitting_dilations(
    image_size: int | tuple[int, int],
    depths: Sequence[int],
    kernel_size: int = 7,
    *,
    strides: Sequence[int] = (4, 8, 16, 32),
) -> tuple[tuple[int, ...], ...]:
    """Alternate 1 and the largest dilation whose neighborhood fits the maps of an image.

    That is floor(shorter side of the map / kernel_size), at least 1: at 224 and 384 pixels, the
    dilations of the published classifiers.

    Args:
        image_size: height and width, or one for both, pixels.
        depths: blocks per stage.
        kernel_size: neighbours per axis.
        strides: stride of each stage's map, pixels.

    Returns:
        A dilation a block, by stage.

    Raises:
        ValueError: a size is no whole number of at least 1, or there are not two sides.
    """
    sides = (image_size, image_size) if is_whole_number(image_size) else image_size
    if not isinstance(sides, Sequence) or isinstance(sides, str) or len(sides) != 2:
        raise ValueError(f"image_size is {image_size!r}: height and width, or one for both, pixels")
    for side in sides:
        check_whole_number("a side of image_size", side, 1)
    check_whole_number("kernel_size", kernel_size, 1)
    largest = [max(1, -(-min(sides) // stride) // kernel_size) for stride in strides]
    return _repeat([(1, dilation) for dilation in largest], depths)


def _repeat(patterns: Sequence[Sequence[int]], depths: Sequence[int]) -> Patterns:
    """Go through each stage's pattern, over and over, for as many blocks as it has."""
    return tuple(
        tuple(pattern[i % len(pattern)] for i in range(depth))
        for pattern, depth in zip(patterns, depths, strict=True)
    )


def resolve_dilations(
    dilations: Dilations,
    depths: Sequence[int],
    kernel_size: int,
    presets: Mapping[str, Patterns],
    strides: Sequence[int],
) -> Patterns:
    """Give each block its dilation.

    Args:
        dilations: one for all blocks, one a block by stage, the name of a preset, or "fit:HxW".
        depths: blocks per stage.
        kernel_size: neighbours per axis.
        presets: patterns by name.
        strides: stride of each stage's map, pixels.

    Raises:
        ValueError: none of these, or not one for each block.
    """
    if is_whole_number(dilations) and dilations > 0:
        dilations = [[dilations] * depth for depth in depths]
    if isinstance(dilations, str):
        fit = re.fullmatch(r"fit:(\d+)x(\d+)", dilations)
        if fit:
            size = int(fit[1]), int(fit[2])
            return fitting_dilations(size, depths, kernel_size, strides=strides)
        if dilations in presets:
            return _repeat(presets[dilations], depths)
    is_list = isinstance(dilations, Sequence) and not isinstance(dilations, str)
    is_nested = is_list and all(
        isinstance(stage, Sequence) and all(is_whole_number(d) and d > 0 for d in stage)
        for stage in dilations
    )
    if not is_nested:
        known = ", ".join(f'"{name}"' for name in [*presets, "fit:HxW"])
        raise ValueError(
            f"dilations is {dilations!r}: a whole number of at least 1, one a block (a list for "
            f"each stage) or a name of {known} (an image size, pixels) is taken"
        )
    if [len(stage) for stage in dilations] != list(depths):
        raise ValueError(
            f"dilations is {dilations!r}: one for each block of depths {tuple(depths)} is taken"
        )
    return tuple(map(tuple, dilations))


class ConvStem(nn.Module):
    """Two 3x3 convolutions of stride 2 with nothing between them, then LayerNorm. NCHW.

    (B, in_chans, H, W) -> (B, dim, ceil(H / 4), ceil(W / 4)).
    """

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)
        self.norm = LayerNorm2d(dim, eps=1e-5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv2(self.conv1(x)))


class ConvDownsample(nn.Module):
    """3x3 convolution of stride 2, then LayerNorm. NCHW.

    (B, in_dim, H, W) -> (B, dim, ceil(H / 2), ceil(W / 2)).
    """

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1, bias=False)
        self.norm = LayerNorm2d(dim, eps=1e-5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.reduction(x))


class PatchStem(nn.Module):
    """Projection of patches that do not overlap, then LayerNorm. NCHW.

    (B, in_chans, H, W) -> (B, dim, ceil(H / p), ceil(W / p)), p = `patch_size` pixels; zeros fill
    the patches at the bottom and right.
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)
        self.norm = LayerNorm2d(dim, eps=1e-5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The same for every size, which compilers need: the convolution drops what is too much.
        x = F.pad(x, (0, self.patch_size - 1, 0, self.patch_size - 1))
        return self.norm(self.proj(x))


class PatchMerging(nn.Module):
    """LayerNorm and projection of 2x2 positions, zeros where one is beyond the map. NCHW.

    (B, in_dim, H, W) -> (B, dim, ceil(H / 2), ceil(W / 2)).
    """

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * in_dim)
        self.reduction = Linear(4 * in_dim, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, 1, 0, 1))  # the same for every size
        even, odd = x[:, :-1:2], x[:, 1::2]
        # The order of the published weights: down first, then to the right.
        corners = [even[:, :, :-1:2], odd[:, :, :-1:2], even[:, :, 1::2], odd[:, :, 1::2]]
        return self.reduction(self.norm(torch.cat(corners, dim=-1))).permute(0, 3, 1, 2)


class Block(nn.Module):
    """Residual attention and MLP, each after a LayerNorm; layer scale if asked for. NHWC.

    (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(
        self, attn: nn.Module, dim: int, mlp_ratio: float, layer_scale: float | None, rate: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(rate)
        for name in ("gamma1", "gamma2"):
            gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
            self.register_parameter(name, gamma)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path(self._scale(self.attn(self.norm1(x)), self.gamma1))
        return x + self.drop_path(self._scale(self.mlp(self.norm2(x)), self.gamma2))

    def _scale(self, x: torch.Tensor, gamma: torch.Tensor | None) -> torch.Tensor:
        return x if gamma is None else x * gamma


class NAT(HierarchicalBackbone):
    """NAT or DiNAT at any image size.

    Args:
        depths: blocks per stage.
        dims: channels per stage.
        head_dim: channels of a head; divides all of `dims`.
        kernel_size: neighbours per axis, odd. Bias tables of a checkpoint for another one are
            resized.
        dilations: positions from a neighbour to the next: one for all blocks, one a block (a list
            for each stage), "imagenet", "imagenet_384", "coco", "ade20k", "ade20k_640" or
            "mask2former" for what the paper's models have, or "fit:HxW" for `fitting_dilations`
            of an image size in pixels. It depends on no weight.
        mlp_ratio: hidden channels of the MLP over its input's.
        layer_scale: first value of the factors of every branch; None for no factors.
        num_classes: classes of the head; 0 gives pooled features (B, dims[-1]).
        in_chans: channels of the image.
        global_pool: "avg", or "" for the unpooled map with num_classes=0.
        drop_rate: dropout rate before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.

    Attributes:
        dilations: positions from a neighbour to the next, one a block, by stage.
    """

    dense_norm = "layer_norm"
    dilation_presets: Mapping[str, Patterns] = PRESETS

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        head_dim: int = 32,
        kernel_size: int = 7,
        dilations: Dilations = 1,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        check_arguments(depths, dims, in_chans, drop_path_rate, len(self.strides))
        check_whole_number("dims[0]", dims[0], 2)  # a stem of convolutions halves it
        check_whole_number("head_dim", head_dim, 1)
        if any(dim % head_dim for dim in dims):
            raise ValueError(f"head_dim is {head_dim}: a divisor of all of dims {dims} is taken")
        check_number("mlp_ratio", mlp_ratio, 1 / min(dims))
        if layer_scale is not None:
            check_number("layer_scale", layer_scale, 0)
        check_number("drop_rate", drop_rate, 0, 1)
        dilations = resolve_dilations(
            dilations, depths, kernel_size, self.dilation_presets, self.strides
        )
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, dim in enumerate(dims):
            blocks = [
                Block(
                    self.make_attention(dim, dim // head_dim, kernel_size, dilation),
                    dim, mlp_ratio, layer_scale, rate,
                )
                for dilation, rate in zip(dilations[i], rates[i], strict=True)
            ]  # fmt: skip
            downsample = self.make_downsample(dims[i - 1], dim) if i else nn.Identity()
            stages.append(ChannelsLastStage(downsample, blocks))
        super().__init__(
            self.make_stem(in_chans, dims[0]),
            stages,
            LayerNorm2d(dims[-1], eps=1e-5),
            ClassifierHead(dims[-1], num_classes, global_pool, drop_rate),
            dims=dims,
            in_chans=in_chans,
        )
        self.dilations = dilations

    def make_stem(self, in_chans: int, dim: int) -> nn.Module:
        """Make the module from image to the first stage's map."""
        return ConvStem(in_chans, dim)

    def make_downsample(self, in_dim: int, dim: int) -> nn.Module:
        """Make the module from a stage's map to the next one's, of half the size."""
        return ConvDownsample(in_dim, dim)

    def make_attention(
        self, dim: int, num_heads: int, kernel_size: int, dilation: int
    ) -> nn.Module:
        """Make the attention of a block, NHWC."""
        return NeighborhoodAttention(dim, num_heads, kernel_size, dilation)

    def adapt_checkpoint(self, state_dict: dict[str, torch.Tensor]) -> list[str]:
        for key in [k for k in state_dict if ".attn.query." in k]:
            names = [key.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
            if all(name in state_dict for name in names):
                joined = torch.cat([state_dict.pop(name) for name in names])
                state_dict[key.replace(".query.", ".qkv.")] = joined
        for key in [k for k in state_dict if k.endswith(".layer_scale_parameters")]:
            gammas, prefix = state_dict.pop(key), key.removesuffix("layer_scale_parameters")
            state_dict[f"{prefix}gamma1"], state_dict[f"{prefix}gamma2"] = gammas.unbind()
        return self._resize_tables(state_dict)

    def _resize_tables(self, state_dict: dict[str, torch.Tensor]) -> list[str]:
        """Fit the tables of bias of another kernel size, in place, and say so."""
        resized = {}
        for key, own in self.state_dict().items():
            given = state_dict.get(key)
            if not key.endswith(".rel_pos_bias") or given is None or given.ndim != 3:
                continue
            # A side of 2K - 1, K odd: neighborhoods; others are of full attention.
            is_of_kernel = given.shape[1] == given.shape[2] and given.shape[1] % 4 == 1
            if given.shape != own.shape and given.shape[0] == own.shape[0] and is_of_kernel:
                state_dict[key] = resize_rel_pos_bias(given, own.shape[1:])
                kernels = [(table.shape[1] + 1) // 2 for table in (given, own)]
                resized.setdefault(tuple(kernels), []).append(key)
        return [
            f"{len(keys)} tables of relative position bias from kernel_size {given} to {own} by "
            "bicubic interpolation"
            for (given, own), keys in resized.items()
        ]


class DiNATS(NAT):
    """DiNAT_s at any image size: DiNAT with the stem and the downsamplers of Swin.

    Arguments are those of `NAT`; of the named dilations, "mask2former" is not there.
    """

    dilation_presets = PRESETS_S

    def make_stem(self, in_chans: int, dim: int) -> nn.Module:
        return PatchStem(in_chans, dim, self.strides[0])

    def make_downsample(self, in_dim: int, dim: int) -> nn.Module:
        return PatchMerging(in_dim, dim)


_TINY, _BASE = (3, 4, 18, 5), dict(mlp_ratio=2.0, layer_scale=1e-5)
_DIMS = {n: (n, 2 * n, 4 * n, 8 * n) for n in (64, 96, 128, 192)}
_LARGE = dict(depths=_TINY, dims=_DIMS[192], mlp_ratio=2.0)
_S_LARGE = dict(depths=(2, 2, 18, 2), dims=_DIMS[192])

VARIANTS = {
    "nat_mini": dict(depths=(3, 4, 6, 5), dims=_DIMS[64], mlp_ratio=3.0),
    "nat_tiny": dict(depths=_TINY, dims=_DIMS[64], mlp_ratio=3.0),
    "nat_small": dict(depths=_TINY, dims=_DIMS[96], **_BASE),
    "nat_base": dict(depths=_TINY, dims=_DIMS[128], **_BASE),
    "dinat_mini": dict(depths=(3, 4, 6, 5), dims=_DIMS[64], mlp_ratio=3.0, dilations="imagenet"),
    "dinat_tiny": dict(depths=_TINY, dims=_DIMS[64], mlp_ratio=3.0, dilations="imagenet"),
    "dinat_small": dict(depths=_TINY, dims=_DIMS[96], mlp_ratio=2.0, dilations="imagenet"),
    "dinat_base": dict(depths=_TINY, dims=_DIMS[128], dilations="imagenet", **_BASE),
    "dinat_large": dict(dilations="imagenet", **_LARGE),
    "dinat_large_384": dict(dilations="imagenet_384", **_LARGE),
    "dinat_large_384_11x11": dict(dilations="imagenet", kernel_size=11, **_LARGE),
}
VARIANTS_S = {
    "dinat_s_tiny": dict(depths=(2, 2, 6, 2), dims=_DIMS[96], dilations="imagenet"),
    "dinat_s_small": dict(depths=(2, 2, 18, 2), dims=_DIMS[96], dilations="imagenet"),
    "dinat_s_base": dict(depths=(2, 2, 18, 2), dims=_DIMS[128], dilations="imagenet"),
    "dinat_s_large": dict(dilations="imagenet", **_S_LARGE),
    "dinat_s_large_384": dict(dilations="imagenet_384", **_S_LARGE),
}

_PAGE = "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer"
_FILES = "https://shi-labs.com/projects"
_NAT_PAPER = ("Neighborhood Attention Transformer", "arXiv:2204.07143")
_DINAT_PAPER = ("Dilated Neighborhood Attention Transformer", "arXiv:2209.15001")


def weights_of(
    file: str, params: float, gmacs: float | None, top1: float, *more: str, **metadata: Any
) -> Weights:
    """The file that the authors link for a variant, others of its shapes, and their results.

    GMACs are what the authors call FLOPs, without LayerNorm; that of DiNAT-Large is 30.5 by our
    count. The authors give its 200.9 M parameters (201.1 with kernel 11) as 200.
    """
    paper_name, paper_ids = _NAT_PAPER if file.startswith("nat/") else _DINAT_PAPER
    files = tuple(f"{_FILES}/{name}.pth" for name in (file, *more))
    return Weights(
        page=_PAGE,
        files=files,
        url=files[0],
        license="mit",
        paper_name=paper_name,
        paper_ids=paper_ids,
        published=Published(params=params, gmacs=gmacs, top1=(top1,)),
        **metadata,
    )


_1K, _22K = (f"dinat/checkpoints/{folder}" for folder in ("imagenet1k", "imagenet22k"))
_AT_384 = dict(input_size=(3, 384, 384), crop_pct=1.0)
PATCHES = dict(first_conv="stem.proj")

WEIGHTS = {
    "nat_mini": weights_of("nat/checkpoints/CLS/nat_mini", 20, 2.7, 81.8),
    "nat_tiny": weights_of("nat/checkpoints/CLS/nat_tiny", 28, 4.3, 83.2),
    "nat_small": weights_of("nat/checkpoints/CLS/nat_small", 51, 7.8, 83.7),
    "nat_base": weights_of("nat/checkpoints/CLS/nat_base", 90, 13.7, 84.3),
    "dinat_mini": weights_of(f"{_1K}/dinat_mini_in1k_224", 20, 2.7, 81.8),
    "dinat_tiny": weights_of(f"{_1K}/dinat_tiny_in1k_224", 28, 4.3, 82.7),
    "dinat_small": weights_of(f"{_1K}/dinat_small_in1k_224", 51, 7.8, 83.8),
    "dinat_base": weights_of(f"{_1K}/dinat_base_in1k_224", 90, 13.7, 84.4),
    "dinat_large": weights_of(
        f"{_1K}/dinat_large_in22k_in1k_224", 200, 30.6, 86.6, f"{_22K}/dinat_large_in22k_224"
    ),
    "dinat_large_384": weights_of(
        f"{_1K}/dinat_large_in22k_in1k_384", 200, 89.7, 87.4, **_AT_384
    ),
    "dinat_large_384_11x11": weights_of(
        f"{_1K}/dinat_large_in22k_in1k_384_11x11", 200, 92.4, 87.5,
        f"{_22K}/dinat_large_in22k_224_11x11interp", **_AT_384,
    ),
}  # fmt: skip
WEIGHTS_S = {
    "dinat_s_tiny": weights_of(f"{_1K}/dinat_s_tiny_in1k_224", 28, 4.5, 81.8, **PATCHES),
    "dinat_s_small": weights_of(f"{_1K}/dinat_s_small_in1k_224", 50, 8.7, 83.5, **PATCHES),
    "dinat_s_base": weights_of(f"{_1K}/dinat_s_base_in1k_224", 88, 15.4, 83.8, **PATCHES),
    "dinat_s_large": weights_of(
        f"{_1K}/dinat_s_large_in1k_224", 197, 34.5, 86.5, f"{_22K}/dinat_s_large_in22k_224",
        **PATCHES,
    ),
    "dinat_s_large_384": weights_of(
        f"{_1K}/dinat_s_large_in1k_384", 197, 101.5, 87.4, **PATCHES, **_AT_384
    ),
}  # fmt: skip
# Official names -> ours; the dense backbones' out norms belong to the adapter.
SHARED_RULES = [
    (r"\.attn\.rpb$", ".attn.rel_pos_bias"),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
    *[(rf"^norm{i}\.", f"out_norms.{i}.") for i in range(4)],
]
KEY_RULES = {
    "official": [
        *[(rf"^patch_embed\.proj\.{i}\.", f"stem.conv{i + 1}.") for i in (0, 1)],
        (r"^patch_embed\.norm\.", "stem.norm."),
        (r"^levels\.(\d)\.blocks\.", r"stages.\1.blocks."),
        *[(rf"^levels\.{i}\.downsample\.", f"stages.{i + 1}.downsample.") for i in range(3)],
        *SHARED_RULES,
    ],
    # Nat and Dinat of the Hugging Face library, classifiers and backbones.
    "transformers": [
        (r"^(nat|dinat)\.", ""),
        *[
            (rf"^embeddings\.patch_embeddings\.projection\.{i}\.", f"stem.conv{i + 1}.")
            for i in (0, 1)
        ],
        (r"^embeddings\.norm\.", "stem.norm."),
        (r"^encoder\.levels\.(\d)\.layers\.", r"stages.\1.blocks."),
        *[
            (rf"^encoder\.levels\.{i}\.downsample\.", f"stages.{i + 1}.downsample.")
            for i in range(3)
        ],
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.attention\.self\.rpb$", ".attn.rel_pos_bias"),
        (r"\.attention\.self\.(query|key|value)\.", r".attn.\1."),
        (r"\.attention\.output\.dense\.", ".attn.proj."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
        (r"^layernorm\.", "norm."),
        (r"^classifier\.", "head.fc."),
        *[(rf"^hidden_states_norms\.stage{i + 1}\.", f"out_norms.{i}.") for i in range(4)],
    ],
}
KEY_RULES_S = {
    "official": [
        (r"^patch_embed\.", "stem."),
        (r"^layers\.(\d)\.blocks\.", r"stages.\1.blocks."),
        *[(rf"^layers\.{i}\.downsample\.", f"stages.{i + 1}.downsample.") for i in range(3)],
        *SHARED_RULES,
    ],
}
register_backbones(__name__, NAT, VARIANTS, WEIGHTS, KEY_RULES)
register_backbones(__name__, DiNATS, VARIANTS_S, WEIGHTS_S, KEY_RULES_S)

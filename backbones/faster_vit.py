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
from typing import Any

import torch
from timm.layers import calculate_drop_path_rates
from torch import nn

from ..layers.arguments import (
    check_flag,
    check_number,
    check_whole_number,
    is_whole_number,
)
from .base import ClassifierHead, HierarchicalBackbone, Stage, check_arguments
from .faster_vit_blocks import (
    AttentionStage,
    Block,
    CarrierTokens,
    ConvBlock,
    ConvStage,
    Downsample,
    Stem,
)
from .registry import Published, Weights, register_backbones

# What the detection code pads the maps of convolutional stages to multiples of.
_QUIRKY_SIDE = 7


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

"""Isotropic NAT and DiNAT, and the ViT that the paper compares them with: models of one map.

Ali Hassani, Humphrey Shi. Dilated Neighborhood Attention Transformer. arXiv:2209.15001.

A plain sequence of the blocks of `nat.py` on one map of stride 16, behind a patch embedding. The
ViT has full attention with a table of relative position biases, and so takes images of one size.

The official code and weights (github.com/SHI-Labs/Neighborhood-Attention-Transformer) are under
the MIT licence.

Legend: B batch, C channels, H and W height and width of the map. Maps are NCHW between the parts
of a model and NHWC within the stage, on the same memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import register_notrace_function
from torch import nn
from torch.nn import functional as F

from ..layers.arguments import check_whole_number, is_whole_number
from ..layers.attention_maps import AttentionMaps, Point, attention_weights, maps_of_all
from ..layers.rel_pos import rel_pos_bias_of_pairs
from ..layers.weight_init import trunc_normal_
from .nat import PATCHES, SHARED_RULES, DiNATS, PatchStem, weights_of
from .registry import register_backbones


class FullAttention(nn.Module):
    """Multi-head attention of each position to all of a map of one size. NHWC.

    (B, H, W, C) -> (B, H, W, C), with a relative position bias.

    Args:
        dim: channels C.
        num_heads: heads; divides `dim`.
        size: H and W.
    """

    def __init__(self, dim: int, num_heads: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.rel_pos_bias = nn.Parameter(torch.empty(num_heads, *(2 * side - 1 for side in size)))
        self.proj = nn.Linear(dim, dim)
        trunc_normal_(self.rel_pos_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = x.shape[1:3]
        return self.proj(self._attend(*self._project(x)).flatten(2)).unflatten(1, size)

    def attention_maps(
        self, x: torch.Tensor, *, size: tuple[int, int], points: Sequence[Point]
    ) -> dict[str, AttentionMaps]:
        """Show what positions of a map attend to; as `NeighborhoodAttention` does."""
        query, key, value = self._project(x)
        queries = [(0, row * size[1] + column) for row, column in points]
        weights = attention_weights(lambda value: self._attend(query, key, value), value, queries)
        return {"all positions": maps_of_all(weights[:, 0], size)}

    def _project(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Give query, key and value: (B, H * W, heads, head_dim) each."""
        return self.qkv(x.flatten(1, 2)).unflatten(-1, (3, self.num_heads, -1)).unbind(2)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend to all positions: (B, H * W, heads, head_dim) from as many."""
        bias = rel_pos_bias_of_pairs(self.rel_pos_bias).to(query.dtype)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        x = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return x.transpose(1, 2)


class IsotropicNAT(DiNATS):
    """Isotropic NAT or DiNAT at any image size: one map of stride 16, (B, C, H / 16, W / 16).

    Arguments are those of `NAT`, with one entry in `depths`, `dims` and `dilations`; the named
    dilations are "isotropic", 2 in every other block, and "fit:HxW".
    """

    strides = (16,)
    dilation_presets = {"isotropic": ((1, 2),)}


@register_notrace_function
def _check_size(x: torch.Tensor, size: tuple[int, int]) -> None:
    if not torch.jit.is_tracing() and tuple(x.shape[2:]) != size:
        raise ValueError(
            f"the image batch has shape {tuple(x.shape)}: images of {size[0]}x{size[1]} pixels "
            "alone are taken, whose offsets the table of position biases holds"
        )


class FixedPatchStem(PatchStem):
    """`PatchStem` of images of one size alone, pixels."""

    def __init__(
        self, in_chans: int, dim: int, patch_size: int, image_size: tuple[int, int]
    ) -> None:
        super().__init__(in_chans, dim, patch_size)
        self.image_size = image_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _check_size(x, self.image_size)
        return super().forward(x)


class ViTRPB(IsotropicNAT):
    """ViT with a relative position bias: full attention, on images of one size alone.

    Height and width are fixed, also in exports.

    Args:
        depths: blocks, as the one entry of a list.
        dims: channels, as the one entry of a list.
        img_size: height and width, or one for both, pixels; published weights are for 224.
        others: those of `NAT` but for `kernel_size` and `dilations`.
    """

    unsupported_exports = {"dynamic": "Height and width are fixed, also in exports."}

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        *,
        img_size: int | tuple[int, int] = 224,
        **others: Any,
    ) -> None:
        for name in others.keys() & {"kernel_size", "dilations"}:
            raise ValueError(f"{name} is {others[name]!r}: full attention takes none")
        sides = (img_size, img_size) if is_whole_number(img_size) else tuple(img_size)
        for side in sides:
            check_whole_number("a side of img_size", side, 1)
        self._image_size = sides
        super().__init__(depths, dims, **others)

    def make_stem(self, in_chans: int, dim: int) -> nn.Module:
        return FixedPatchStem(in_chans, dim, self.strides[0], self._image_size)

    def make_attention(
        self, dim: int, num_heads: int, kernel_size: int, dilation: int
    ) -> nn.Module:
        size = tuple(-(-side // self.strides[0]) for side in self._image_size)
        return FullAttention(dim, num_heads, size)

    def adapt_checkpoint(self, state_dict: dict[str, torch.Tensor]) -> list[str]:
        for key in [k for k in state_dict if k.endswith(".attn.relative_position_index")]:
            del state_dict[key]  # follows from the size
        return []


VARIANTS = {
    "nat_isotropic_small": dict(depths=(12,), dims=(384,)),
    "nat_isotropic_base": dict(depths=(12,), dims=(768,)),
    "dinat_isotropic_small": dict(depths=(12,), dims=(384,), dilations="isotropic"),
    "dinat_isotropic_base": dict(depths=(12,), dims=(768,), dilations="isotropic"),
}
VARIANTS_VITRPB = {
    "vitrpb_small": dict(depths=(12,), dims=(384,)),
    "vitrpb_base": dict(depths=(12,), dims=(768,)),
}

_FOLDER = "dinat/checkpoints/isotropic"

WEIGHTS = {
    f"{name}_isotropic_{size}": weights_of(
        f"{_FOLDER}/{name}_isotropic_{size}_in1k_224", params, gmacs, top1, **PATCHES
    )
    for name, size, params, gmacs, top1 in (
        ("nat", "small", 22, 4.3, 80.0),
        ("nat", "base", 86, 16.9, 81.6),
        ("dinat", "small", 22, 4.3, 80.8),
        ("dinat", "base", 86, 16.9, 82.1),
    )
}
WEIGHTS_VITRPB = {
    f"vitrpb_{size}": weights_of(
        f"{_FOLDER}/vitrpb_{size}_in1k_224", params, gmacs, top1, **PATCHES,
        fixed_input_size=True,
    )
    for size, params, gmacs, top1 in (("small", 22, 4.6, 81.2), ("base", 87, 17.5, 82.5))
}  # fmt: skip

KEY_RULES = {
    "official": [
        (r"^patch_embed\.", "stem."),
        (r"^layers\.", "stages.0.blocks."),
        *SHARED_RULES,
    ],
}

register_backbones(__name__, IsotropicNAT, VARIANTS, WEIGHTS, KEY_RULES)
register_backbones(__name__, ViTRPB, VARIANTS_VITRPB, WEIGHTS_VITRPB, KEY_RULES)

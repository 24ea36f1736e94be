"""PPMA: attention to all tokens along polyline paths whose every step decays; RMT beside it.

Zhongchen Zhao, Chaodong Xiao, Hui Lin, Qi Xie, Lei Zhang, Deyu Meng. Polyline Path Masked
Attention for Vision Transformer. NeurIPS 2025, arXiv:2506.15940.
Qihang Fan, Huaibo Huang, Mingrui Chen, Hongmin Liu, Ran He. RMT: Retentive Networks Meet Vision
Transformers. CVPR 2024, arXiv:2309.11523.

- Stem of four 3x3 convolutions, downsamplers of one, with BatchNorm each.
- A block is a depthwise 3x3 convolution, attention and an MLP with a depthwise convolution within,
  each added to its input, the latter two after a LayerNorm.
- Attention of late stages is one softmax over all tokens, that of early ones softmaxes over rows
  and columns. Queries and keys turn with the raster index. In `PPMA` each token has decays of its
  own, and two paths lead from one token to another; in `RMT`, whose trunk this is, decays are
  fixed, and one path does.
- The last map is projected to 1024 channels, normed and activated before it is pooled.

Any image size works: nothing is padded but what convolutions pad, no weight depends on a size.

As in the official code, the rotary embedding is of one coordinate, and its angles are rounded to
float32 (`layers/rotary.py`). Published results are of averaged weights, which are preferred where
a file has both. RMT is as the authors of PPMA trained it, of which there are no files.

Training: rates of stochastic depth grow linearly over all blocks. The official code exempts decays
from weight decay by a mark that its optimizer does not read; here as there they escape it because
they have one dimension. Factors of branches have one dimension too, other than there, where they
are decayed; the recipe here decays them by name.

The official code and weights (github.com/zhongchenzhao/PPMA) are under the Apache 2.0 licence.

Legend: B batch, C channels, H and W height and width of the map. Maps are NCHW between stages and
NHWC within, on the same memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath, calculate_drop_path_rates
from torch import nn
from torch.nn import functional as F

from ..layers.arguments import check_number, check_whole_number, is_whole_number
from ..layers.conv import ConvNorm
from ..layers.depthwise import ResidualDepthwise
from ..layers.linear import Linear
from ..layers.polyline_attention import PolylineAttention
from ..layers.rotary import raster_rotation
from ..layers.weight_init import trunc_normal_
from .base import ChannelsLastStage, ClassifierHead, HierarchicalBackbone, check_arguments
from .registry import Published, Weights, register_backbones

# Channels that the classifier takes, in all published models.
_HEAD_DIM = 1024


class ConvStem(nn.Module):
    """Four 3x3 convolutions, of stride 2, 1, 2 and 1, with BatchNorm, exact GELU between. NCHW.

    (B, in_chans, H, W) -> (B, dim, ceil(H / 4), ceil(W / 4)).
    """

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_chans, dim // 2, 3, stride=2)
        self.conv2 = ConvNorm(dim // 2, dim // 2, 3)
        self.conv3 = ConvNorm(dim // 2, dim, 3, stride=2)
        self.conv4 = ConvNorm(dim, dim, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.gelu(conv(x))
        return self.conv4(x)


class DepthwiseMlp(nn.Module):
    """Two linear layers; between them GELU, then a depthwise 3x3 convolution, residual. NHWC.

    (B, H, W, dim) -> (B, H, W, dim).

    Args:
        dim: channels in and out.
        hidden_dim: channels between.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim, gelu=True)
        self.conv = ResidualDepthwise(hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.conv(self.fc1(x)))


class Block(nn.Module):
    """Depthwise convolution, attention and MLP, each residual. NHWC.

    (B, H, W, C) -> (B, H, W, C).

    Args:
        dim: channels C.
        attn: attention, NHWC.
        mlp_ratio: hidden channels of the MLP over C.
        layer_scale: first value of the factors of attention's and the MLP's channels; None for
            no factors.
        rate: of stochastic depth, of attention and of the MLP.
    """

    def __init__(
        self, dim: int, attn: nn.Module, mlp_ratio: float, layer_scale: float | None, rate: float
    ) -> None:
        super().__init__()
        self.pos_embed = ResidualDepthwise(dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = DepthwiseMlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(rate)
        for name in ("gamma1", "gamma2"):
            gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
            self.register_parameter(name, gamma)

    def forward(self, x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        """Apply the block; `rotation` as `PolylineAttention` takes it."""
        x = self.pos_embed(x)
        x = x + self.drop_path(self._scale(self.attn(self.norm1(x), rotation), self.gamma1))
        return x + self.drop_path(self._scale(self.mlp(self.norm2(x)), self.gamma2))

    def _scale(self, x: torch.Tensor, gamma: torch.Tensor | None) -> torch.Tensor:
        return x if gamma is None else x * gamma


class PPMAStage(ChannelsLastStage):
    """Stage whose blocks share a rotary embedding. NCHW in and out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.downsample(x).permute(0, 2, 3, 1)
        attn = self.blocks[0].attn
        rotation = raster_rotation(*x.shape[1:3], attn.num_heads, attn.head_dim, like=x)
        return self.run_blocks(x, rotation).permute(0, 3, 1, 2)


class Projection(nn.Module):
    """1x1 convolution with BatchNorm, then SiLU: what the classifier pools. NCHW.

    (B, dim, H, W) -> (B, out_dim, H, W).
    """

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.proj = ConvNorm(dim, out_dim)
        # A linear layer in the official code, and begun as such.
        trunc_normal_(self.proj.conv.weight)
        nn.init.zeros_(self.proj.conv.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(self.proj(x))


def _per_stage(name: str, value: Any) -> tuple[Any, ...]:
    """Give each of the four stages its value of an argument that may be one for all.

    Raises:
        ValueError: it is a list of other than four.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        return (value,) * 4
    if len(value) != 4:
        raise ValueError(f"{name} is {value!r}: one value, or four (one a stage), are taken")
    return tuple(value)


class PPMA(HierarchicalBackbone):
    """PPMA at any image size.

    Args:
        depths: blocks per stage.
        dims: channels per stage.
        num_heads: heads per stage; each divides its number of `dims` into even ones.
        form: attention, "axial" or "full", one for all stages or four.
        mlp_ratio: hidden channels of the MLP over its input's, one for all stages or four.
        layer_scale: first value of the factors of every branch, None for no factors, one for all
            stages or four.
        paths: "both" paths between two tokens, or "row_first" alone.
        decay_range: None for decays that depend on the tokens; numbers for fixed ones
            (`PolylineAttention`), one for all stages or four.
        num_classes: classes of the head; 0 gives pooled features (B, 1024).
        in_chans: channels of the image.
        global_pool: "avg", or "" for the unpooled map with num_classes=0.
        drop_rate: dropout rate before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
    """

    dense_norm = "layer_norm"

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        num_heads: Sequence[int],
        form: str | Sequence[str] = ("axial", "axial", "axial", "full"),
        mlp_ratio: float | Sequence[float] = (4.0, 4.0, 3.0, 3.0),
        layer_scale: float | None | Sequence[float | None] = None,
        paths: str = "both",
        decay_range: float | None | Sequence[float | None] = None,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        check_arguments(depths, dims, in_chans, drop_path_rate)
        check_whole_number("dims[0]", dims[0], 2)  # the stem halves it
        is_list = isinstance(num_heads, Sequence) and len(num_heads) == len(dims)
        if not is_list or not all(is_whole_number(n) and n > 0 for n in num_heads):
            raise ValueError(f"num_heads is {num_heads!r}: four whole numbers of at least 1")
        if any(dim % (2 * heads) for dim, heads in zip(dims, num_heads, strict=True)):
            raise ValueError(
                f"num_heads is {num_heads!r}: divisors of dims {dims} that give heads even numbers "
                "of channels are taken"
            )
        forms = _per_stage("form", form)
        ratios = _per_stage("mlp_ratio", mlp_ratio)
        scales = _per_stage("layer_scale", layer_scale)
        ranges = _per_stage("decay_range", decay_range)
        for ratio in ratios:
            check_number("mlp_ratio", ratio, 1 / min(dims))
        for scale in scales:
            if scale is not None:
                check_number("layer_scale", scale, 0)
        check_number("drop_rate", drop_rate, 0, 1)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, dim in enumerate(dims):
            blocks = []
            for rate in rates[i]:
                attn = PolylineAttention(
                    dim, num_heads[i], form=forms[i], paths=paths, decay_range=ranges[i]
                )
                blocks.append(Block(dim, attn, ratios[i], scales[i], rate))
            downsample = ConvNorm(dims[i - 1], dim, 3, stride=2) if i else nn.Identity()
            stages.append(PPMAStage(downsample, blocks))
        super().__init__(
            ConvStem(in_chans, dims[0]),
            stages,
            Projection(dims[-1], _HEAD_DIM),
            ClassifierHead(_HEAD_DIM, num_classes, global_pool, drop_rate),
            dims=dims,
            in_chans=in_chans,
        )
        self.num_features = _HEAD_DIM

    def adapt_checkpoint(self, state_dict: dict[str, torch.Tensor]) -> list[str]:
        for key in [k for k in state_dict if k.endswith((".Relpos.angle", ".Relpos.decay"))]:
            del state_dict[key]  # follows from the arguments
        own = self.state_dict()
        attns = [k for k in own if k.endswith(".attn.proj.weight")]
        if any(k in state_dict for k in attns):
            has_decays = any(".attn.decays." in k for k in state_dict)
            if has_decays != any(".attn.decays." in k for k in own):
                kinds = "decays of its tokens (PPMA)", "fixed decays (RMT)"
                given, wanted = kinds if has_decays else kinds[::-1]
                raise ValueError(
                    f"the checkpoint is of a model with {given}, this one has {wanted}"
                )
        for key, value in own.items():
            given = state_dict.get(key)
            if given is None:
                continue
            is_factor = key.endswith((".gamma1", ".gamma2")) and given.shape[:3] == (1, 1, 1)
            is_linear = key == "norm.proj.conv.weight" and given.ndim == 2
            if (is_factor or is_linear) and given.numel() == value.numel():
                state_dict[key] = given.reshape(value.shape)
        return []


class RMT(PPMA):
    """RMT at any image size, as the authors of PPMA train it; see `PPMA`.

    Its variants have fixed decays and one path.
    """


_WIDTHS = dict(dims=(64, 128, 256, 512), num_heads=(4, 4, 8, 16))
_TINY = dict(
    depths=(2, 2, 8, 2), form=("axial", "axial", "full", "full"), mlp_ratio=3.0, **_WIDTHS
)  # fmt: skip
_SMALL = dict(depths=(3, 4, 18, 4), **_WIDTHS)
_SCALED = dict(depths=(4, 8, 25, 8), layer_scale=(None, None, 1e-6, 1e-6))
_BASE = dict(dims=(80, 160, 320, 512), num_heads=(5, 5, 10, 16), **_SCALED)
_LARGE = dict(dims=(112, 224, 448, 640), num_heads=(7, 7, 14, 20), **_SCALED)

VARIANTS = {"ppma_tiny": _TINY, "ppma_small": _SMALL, "ppma_base": _BASE}
VARIANTS_RMT = {
    f"rmt_{size}": dict(arguments, paths="row_first", decay_range=ranges)
    for size, arguments, ranges in (
        ("tiny", _TINY, (4, 4, 6, 6)),
        ("small", _SMALL, (4, 4, 6, 6)),
        ("base", _BASE, (5, 5, 6, 6)),
        ("large", _LARGE, (6, 6, 6, 6)),
    )
}

_HUB = "https://huggingface.co/ZhongchenZhao/PPMA/resolve/main/checkpoints/classification"


def weights_of(file: str, published: Published) -> Weights:
    """A file of the authors and its results."""
    url = f"{_HUB}/{file}/best.pth"
    return Weights(
        page="https://github.com/zhongchenzhao/PPMA",
        files=(url,),
        url=url,
        license="apache-2.0",
        paper_name="Polyline Path Masked Attention for Vision Transformer",
        paper_ids="arXiv:2506.15940",
        first_conv="stem.conv1.conv",
        published=published,
    )


WEIGHTS = {
    "ppma_tiny": weights_of(
        "PPMA_T_202502251000",
        Published(params=14, gmacs=2.7, top1=(82.6,), mask_rcnn=(47.1, 42.4)),
    ),
    "ppma_small": weights_of(
        "PPMA_S_202504021000",
        Published(params=27, gmacs=4.9, top1=(84.2,), mask_rcnn=(49.2, 43.8)),
    ),
    "ppma_base": weights_of(
        "PPMA_B_202504101400",
        Published(params=54, gmacs=10.6, top1=(85.0,), mask_rcnn=(51.1, 45.5)),
    ),
}
# No files of RMT are published; parameters and GMACs were counted on the published code.
WEIGHTS_RMT = {
    name: Weights(
        page="https://github.com/zhongchenzhao/PPMA",
        license="apache-2.0",
        paper_name="RMT: Retentive Networks Meet Vision Transformers",
        paper_ids="arXiv:2309.11523",
        first_conv="stem.conv1.conv",
        published=Published(params=params, gmacs=gmacs),
    )
    for name, params, gmacs in (
        ("rmt_tiny", 14.334, 2.651),
        ("rmt_small", 26.967, 4.8),
        ("rmt_base", 54.155, 10.414),
        ("rmt_large", 95.465, 19.545),
    )
}

# The dense backbone's norms belong to the adapter.
KEY_RULES = {
    "official": [
        *[(rf"^patch_embed\.proj\.{3 * i}\.", f"stem.conv{i + 1}.conv.") for i in range(4)],
        *[(rf"^patch_embed\.proj\.{3 * i + 1}\.", f"stem.conv{i + 1}.norm.") for i in range(4)],
        *[(rf"^layers\.{i}\.downsample\.", f"stages.{i + 1}.downsample.") for i in range(3)],
        (r"\.downsample\.reduction\.", ".downsample.conv."),
        (r"^layers\.", "stages."),
        (r"\.pos\.conv\.", ".pos_embed."),
        (r"\.retention_layer_norm\.", ".norm1."),
        (r"\.final_layer_norm\.", ".norm2."),
        (r"\.retention\.out_proj\.", ".attn.proj."),
        (r"\.retention\.lepe\.conv\.", ".attn.lepe."),
        (r"\.retention\.path_embed\.dt_linear\.", ".attn.decays.proj."),
        (r"\.retention\.path_embed\.A_log$", ".attn.decays.log_rate"),
        (r"\.retention\.path_embed\.dt_bias$", ".attn.decays.step_bias"),
        (r"\.retention\.", ".attn."),
        (r"\.ffn\.dwconv\.conv\.", ".mlp.conv."),
        (r"\.ffn\.", ".mlp."),
        (r"\.gamma_([12])$", r".gamma\1"),
        (r"^proj\.", "norm.proj.conv."),
        (
            r"^norm\.(weight|bias|running_mean|running_var|num_batches_tracked)$",
            r"norm.proj.norm.\1",
        ),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
        *[(rf"^outnorm{i}\.", f"out_norms.{i}.") for i in range(4)],
    ],
}
register_backbones(__name__, PPMA, VARIANTS, WEIGHTS, KEY_RULES)
register_backbones(__name__, RMT, VARIANTS_RMT, WEIGHTS_RMT, KEY_RULES)

"""CAS-ViT: convolutional additive self-attention vision transformers.

Tianfang Zhang, Lei Li, Yang Zhou, Wentao Liu, Chen Qian, Jenq-Neng Hwang, Xiangyang Ji.
arXiv:2408.03703.

A four-stage network of convolutions alone: no softmax, no position embedding, no LayerNorm. A
block adds three residual branches: local perception, the convolutional additive token mixer,
in which gated queries and keys are added and multiply the values, and an MLP. The gates are a
spatial one per pixel and a channel one from the global mean, so any size works and every output
depends on the whole image.

Where this differs from the official code: the query's and the key's gates are one module of 2C
channels and the values have a projection of their own (checkpoint entries are joined and split on
loading). In training the two heads' logits are averaged, as in evaluation, unless
`set_distilled_training(True)` asks for the pair. A checkpoint with one head loads into two (both
take its weights), and one with two heads into one (their mean), which leaves the published logits
as they are.

The official code and weights (github.com/Tianfang-Zhang/CAS-ViT) are under the MIT licence.

Legend: B batch, C channels, H and W height and width of the map. All maps are NCHW.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers import DropPath, calculate_drop_path_rates
from torch import nn
from torch.nn import functional as F

from ..layers.arguments import check_flag, check_number, check_whole_number
from ..layers.conv import (
    ConvNorm,
    PointwiseConv,
    fold_norm_into_next,
    prefers_channels_last,
    run_channels_last,
)
from ..layers.mlp import ConvMlp
from .base import ClassifierHead, HierarchicalBackbone, Stage, check_arguments
from .registry import Published, Weights, register_backbones


class Stem(nn.Module):
    """Two 3x3 convolutions of stride 2, each with BatchNorm and ReLU. NCHW.

    (B, in_chans, H, W) -> (B, dim, ceil(H / 4), ceil(W / 4)).
    """

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_chans, dim // 2, 3, stride=2)
        self.conv2 = ConvNorm(dim // 2, dim, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return run_channels_last(self._forward, x)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv1(x), inplace=True)
        return F.relu(self.conv2(x), inplace=True)


class LocalPerception(nn.Module):
    """Local mixing of a block: 1x1, BatchNorm, depthwise 3x3, GELU, 1x1. (B, C, H, W)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(dim, dim)
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.conv2 = PointwiseConv(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2(F.gelu(self.depthwise(self.conv1(x))))


class AdditiveGates(nn.Module):
    """Gate queries and keys by position, then by channel, and add them. NCHW.

    (B, 2C, H, W), queries before keys, -> (B, C, H, W). For t = query and t = key, with
    parameters of their own:
    t = t * sigmoid(w . relu(BN(depthwise3x3(t)))), one gate per pixel, then
    t = t * sigmoid(W mean_hw(t)), one gate per channel.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.depthwise = ConvNorm(2 * dim, 2 * dim, 3, groups=2 * dim)
        self.spatial = nn.Conv2d(2 * dim, 2, 1, groups=2, bias=False)
        self.channel = nn.Conv2d(2 * dim, 2 * dim, 1, groups=2, bias=False)

    def forward(self, qk: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(self.depthwise(qk), inplace=True)
        gate = self.spatial(hidden).sigmoid()  # (B, 2, H, W)
        pair = qk.unflatten(1, (2, -1))  # (B, 2, C, H, W)
        if prefers_channels_last(qk):
            # The grouped convolution gives a contiguous map, which would turn the product so.
            gate = gate.contiguous(memory_format=torch.channels_last)
            # Nothing needs `hidden` now, and large maps cost more to allocate than to compute.
            pair = torch.mul(pair, gate.unsqueeze(2), out=hidden.unflatten(1, (2, -1)))
        else:
            pair = pair * gate.unsqueeze(2)
        qk = pair.flatten(1, 2)
        gate = self.channel(qk.mean((2, 3), keepdim=True)).sigmoid()  # (B, 2C, 1, 1)
        (q, k), (gate_q, gate_k) = qk.chunk(2, dim=1), gate.chunk(2, dim=1)
        return torch.addcmul(q * gate_q, k, gate_k)


class AdditiveMixer(nn.Module):
    """Convolutional additive token mixer: dw3x3(dw3x3(q + k) * v). (B, C, H, W), NCHW.

    q and k are gated (`AdditiveGates`). Section 3.2 of the paper. Quadratic in its input: q + k
    multiplies v, so under float16 large activations can overflow.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_key = PointwiseConv(dim, 2 * dim, bias=False)
        self.value = PointwiseConv(dim, dim, bias=False)
        self.gates = AdditiveGates(dim)
        self.mix = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.proj = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.mix(self.gates(self.query_key(x))) * self.value(x))


class Block(nn.Module):
    """Residual local perception, token mixer and MLP; the latter two drop paths. (B, C, H, W)."""

    def __init__(self, dim: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.local = LocalPerception(dim)
        self.norm1 = nn.BatchNorm2d(dim)
        self.mixer = AdditiveMixer(dim)
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.local(x)
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def fuse(self) -> Block:
        """Fold both norms into the 1x1 convolutions that follow them, in place; return itself."""
        self.norm1 = fold_norm_into_next(self.norm1, self.mixer.query_key, self.mixer.value)
        self.norm2 = fold_norm_into_next(self.norm2, self.mlp.fc1)
        return self


class ConvStage(Stage):
    """Stage of convolutional blocks; keeps the memory format of its input. NCHW."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return run_channels_last(super().forward, x)


class PairedLinear(nn.Module):
    """Two linear classifiers of one input: (B, in_features) -> (B, out_features), their mean.

    In training it returns the pair where `distilled_training` is set.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.main = nn.Linear(in_features, out_features)
        self.dist = nn.Linear(in_features, out_features)
        self.distilled_training = False

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        main, dist = self.main(x), self.dist(x)
        if self.training and self.distilled_training:
            return main, dist
        return (main + dist) / 2


class DistilledHead(ClassifierHead):
    """Global pooling and `PairedLinear`: (B, C, H, W) -> (B, num_classes)."""

    def make_classifier(self, num_classes: int) -> nn.Module:
        return PairedLinear(self.num_features, num_classes)


class CASViT(HierarchicalBackbone):
    """CAS-ViT at any image size.

    Args:
        depths: blocks per stage.
        dims: channels per stage.
        mlp_ratio: hidden channels of the MLP over its input's.
        distillation: two linear heads, as the published weights have, rather than one.
        num_classes: classes of the head; 0 gives pooled features (B, dims[-1]).
        in_chans: channels of the image.
        global_pool: "avg", or "" for the unpooled map with num_classes=0.
        drop_rate: dropout rate before the linear heads.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
    """

    dense_norm = "batch_norm"

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 4, 2),
        dims: Sequence[int] = (48, 56, 112, 220),
        mlp_ratio: float = 4.0,
        *,
        distillation: bool = True,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        check_arguments(depths, dims, in_chans, drop_path_rate)
        check_whole_number("dims[0]", dims[0], 2)  # the stem halves it
        check_number("mlp_ratio", mlp_ratio, 1 / min(dims))
        check_flag("distillation", distillation)
        check_number("drop_rate", drop_rate, 0, 1)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = [
            ConvStage(
                ConvNorm(dims[i - 1], dims[i], 3, stride=2) if i else nn.Identity(),
                [Block(dims[i], mlp_ratio, rate) for rate in rates[i]],
            )
            for i in range(len(depths))
        ]
        head = (DistilledHead if distillation else ClassifierHead)(
            dims[-1], num_classes, global_pool, drop_rate
        )
        super().__init__(
            Stem(in_chans, dims[0]),
            stages,
            nn.BatchNorm2d(dims[-1]),
            head,
            dims=dims,
            in_chans=in_chans,
        )

    def set_distilled_training(self, enable: bool = True) -> None:
        """Return the pair of logits in training, for a distillation loss, rather than the mean.

        Raises:
            ValueError: the model has one head, or none.
        """
        check_flag("enable", enable)
        if not isinstance(self.head.fc, PairedLinear):
            raise ValueError(
                "set_distilled_training needs two heads: distillation=True and num_classes > 0"
            )
        self.head.fc.distilled_training = enable

    def adapt_checkpoint(self, state_dict: dict[str, torch.Tensor]) -> list[str]:
        notes = []
        for key in [k for k in state_dict if ".gates_q." in k]:
            partner = key.replace(".gates_q.", ".gates_k.")
            if partner in state_dict:
                pair = state_dict.pop(key), state_dict.pop(partner)
                is_count = key.endswith("num_batches_tracked")
                state_dict[key.replace("_q.", ".")] = pair[0] if is_count else torch.cat(pair)
        for key in [k for k in state_dict if k.endswith(".mixer.qkv.weight")]:
            weight, prefix = state_dict.pop(key), key.removesuffix("qkv.weight")
            dim = weight.shape[0] // 3
            state_dict[prefix + "query_key.weight"] = weight[: 2 * dim].clone()
            state_dict[prefix + "value.weight"] = weight[2 * dim :].clone()
        has_two_heads = isinstance(self.head, DistilledHead)
        for name in ("weight", "bias"):
            main, dist = f"head.fc.main.{name}", f"head.fc.dist.{name}"
            if has_two_heads and f"head.fc.{name}" in state_dict:  # one of ours with one head
                state_dict[main] = state_dict.pop(f"head.fc.{name}")
            if has_two_heads and main in state_dict and dist not in state_dict:
                state_dict[dist] = state_dict[main].clone()
                notes.append(f"{dist} is a copy of {main}: the file has one head")
            elif not has_two_heads and main in state_dict:
                single = state_dict.pop(main)
                if dist in state_dict:
                    single = (single + state_dict.pop(dist)) / 2
                    notes.append(f"head.fc.{name} is the mean of the file's two heads")
                state_dict[f"head.fc.{name}"] = single
        return notes


VARIANTS = {
    "cas_vit_xs": dict(depths=(2, 2, 4, 2), dims=(48, 56, 112, 220)),
    "cas_vit_s": dict(depths=(3, 3, 6, 3), dims=(48, 64, 128, 256)),
    "cas_vit_m": dict(depths=(3, 3, 6, 3), dims=(64, 96, 192, 384)),
    "cas_vit_t": dict(depths=(3, 3, 6, 3), dims=(96, 128, 256, 512)),
}

_PAGE = "https://github.com/Tianfang-Zhang/CAS-ViT/blob/main/MODEL_ZOO.md"


def _weights(drive_ids: tuple[str, str], published: Published) -> Weights:
    """The two files that the authors' page lists for a variant, on Google Drive."""
    return Weights(
        page=_PAGE,
        files=tuple(f"https://drive.google.com/file/d/{i}" for i in drive_ids),
        license="mit",
        paper_name="CAS-ViT: Convolutional Additive Self-attention Vision Transformers",
        paper_ids="arXiv:2408.03703",
        first_conv="stem.conv1.conv",
        classifier=("head.fc.main", "head.fc.dist"),
        published=published,
    )


# The page gives two top-1 figures a variant without saying what they are; 224 and 384 pixels
# are likely. GMACs as fvcore counts the official model.
WEIGHTS = {
    "cas_vit_xs": _weights(
        ("16wKcwF6QMW5w_lyPYnDKjMNuoxQDfrLK", "1kwRPtJ4FdmNeTm2MsiFN7N2DJpou3Pgl"),
        Published(params=3.20, gmacs=0.554, top1=(78.3, 78.7), retinanet=36.5,
                  mask_rcnn=(37.4, 34.9), semantic_fpn=37.1),
    ),
    "cas_vit_s": _weights(
        ("1facFRq8s8oelYUtK1fj3fcfdoWoKDBQQ", "1UagCihMWmNCmYGC1DV5euAvA5TONI818"),
        Published(params=5.76, gmacs=0.923, top1=(80.9, 81.1), retinanet=38.6,
                  mask_rcnn=(39.8, 36.7), semantic_fpn=41.3),
    ),
    "cas_vit_m": _weights(
        ("13sQpSEf0h_uuh0jRy9V0yIW6ZsbDpVGy", "1pTwKKRLPA7vBfk_KTgJ4J1Jq3ttkh3O2"),
        Published(params=12.42, gmacs=1.874, top1=(82.8, 83.0), retinanet=40.9,
                  mask_rcnn=(42.3, 38.9), semantic_fpn=43.6),
    ),
    "cas_vit_t": _weights(
        ("1NqoIUPbwBC91RTjTUvubAbOfGqo1VYT0", "1N5Y81Vcyf2ox41TC3wlRBxgQPYaEndTW"),
        Published(params=21.76, gmacs=3.579, top1=(83.9, 84.1), retinanet=41.9,
                  mask_rcnn=(43.5, 39.6), semantic_fpn=45.0),
    ),
}  # fmt: skip

# Official names -> ours; the dense backbone's out norms belong to the adapter.
KEY_RULES = {
    "official": [
        (r"^patch_embed\.0\.", "stem.conv1.conv."),
        (r"^patch_embed\.1\.", "stem.conv1.norm."),
        (r"^patch_embed\.3\.", "stem.conv2.conv."),
        (r"^patch_embed\.4\.", "stem.conv2.norm."),
        *[(rf"^network\.{2 * i}\.", f"stages.{i}.blocks.") for i in range(4)],
        *[(rf"^network\.{2 * i - 1}\.proj\.", f"stages.{i}.downsample.conv.") for i in (1, 2, 3)],
        *[(rf"^network\.{2 * i - 1}\.norm\.", f"stages.{i}.downsample.norm.") for i in (1, 2, 3)],
        (r"\.local_perception\.network\.0\.", ".local.conv1.conv."),
        (r"\.local_perception\.network\.1\.", ".local.conv1.norm."),
        (r"\.local_perception\.network\.2\.", ".local.depthwise."),
        (r"\.local_perception\.network\.4\.", ".local.conv2."),
        (r"\.attn\.oper_([qk])\.0\.block\.0\.", r".mixer.gates_\1.depthwise.conv."),
        (r"\.attn\.oper_([qk])\.0\.block\.1\.", r".mixer.gates_\1.depthwise.norm."),
        (r"\.attn\.oper_([qk])\.0\.block\.3\.", r".mixer.gates_\1.spatial."),
        (r"\.attn\.oper_([qk])\.1\.block\.1\.", r".mixer.gates_\1.channel."),
        (r"\.attn\.qkv\.", ".mixer.qkv."),
        (r"\.attn\.dwc\.", ".mixer.mix."),
        (r"\.attn\.proj\.", ".mixer.proj."),
        (r"^head\.(weight|bias)$", r"head.fc.main.\1"),
        (r"^dist_head\.(weight|bias)$", r"head.fc.dist.\1"),
        *[(rf"^norm{2 * i}\.", f"out_norms.{i}.") for i in range(4)],
    ],
}

register_backbones(__name__, CASViT, VARIANTS, WEIGHTS, KEY_RULES)

"""BiFormer as its official code computes it: what ``densezoo bench`` compares ours with.

A straight writing of the architecture (Zhu et al., arXiv 2303.08810) that spends what the official
code spends: tokens are copied into region order and back, values for their depthwise convolution
too; kept keys and values are gathered from a view that is expanded to all pairs of regions, whose
gradient is therefore allocated at that expanded size, and are copied once more for the heads;
logits and softmax are both written. Parameters have the names of the published files.

Legend: B images, C channels, (H, W) the map, R regions, T tokens of a region, k kept regions,
h heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .step_memory import OperatorStandIn

HEAD_DIM = 32  # of the routed attentions
GLOBAL_HEADS = 8
VARIANTS: dict[str, dict[str, Any]] = {
    "biformer_tiny": dict(depths=(2, 2, 8, 2), dims=(64, 128, 256, 512)),
    "biformer_small": dict(depths=(4, 4, 18, 4), dims=(64, 128, 256, 512)),
    "biformer_base": dict(depths=(4, 4, 18, 4), dims=(96, 192, 384, 768)),
}


def to_regions(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """View a map (B, H, W, C) as regions (B, rows, columns, H / rows, W / columns, C)."""
    return tokens.unflatten(2, (columns, -1)).unflatten(1, (rows, -1)).transpose(2, 3)


def to_image(regions: Tensor) -> Tensor:
    """View regions (B, rows, columns, height, width, C) as a map: a copy (B, H, W, C)."""
    return regions.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class GatheredAttention(OperatorStandIn):
    """Attention of every region's tokens to those of the regions that it kept.

    Takes query (B, R, T, C), keys and values side by side (B, R, T, 2C) and routes (B, R, k);
    returns (B, R, T, C).
    """

    def __init__(self, num_heads: int, scale: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = scale

    def forward(self, query: Tensor, key_value: Tensor, routes: Tensor) -> Tensor:
        num_regions, num_tokens, channels = key_value.shape[1:]
        expanded = key_value[:, None].expand(-1, num_regions, -1, -1, -1)
        index = routes[..., None, None].expand(-1, -1, -1, num_tokens, channels)
        kept = expanded.gather(2, index)  # (B, R, k, T, 2C)
        query = query.flatten(0, 1).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        # Each kept key and value once more, heads first: (BR, h, D, kT) and (BR, h, kT, D).
        key, value = (
            kept.flatten(0, 1).flatten(1, 2).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        )
        key, value = key.permute(0, 2, 3, 1).contiguous(), value.transpose(1, 2).contiguous()
        weights = ((query * self.scale) @ key).softmax(-1)  # (BR, h, T, kT)
        out = (weights @ value).transpose(1, 2).flatten(2)
        return out.unflatten(0, (-1, num_regions))


class RoutedAttention(nn.Module):
    """Bi-level routing attention of a map (B, H, W, C), padded to whole regions."""

    def __init__(self, dim: int, num_regions: int, topk: int) -> None:
        super().__init__()
        self.num_regions = num_regions
        self.topk = topk
        self.scale = dim**-0.5
        self.qkv = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim)})
        self.attend = GatheredAttention(dim // HEAD_DIM, self.scale)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.wo = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, dim = x.shape
        side = self.num_regions
        x = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
        x = to_regions(x, side, side).contiguous()
        query, key_value = self.qkv["qkv"](x).split([dim, 2 * dim], dim=-1)
        value_map = to_image(key_value[..., dim:]).permute(0, 3, 1, 2).contiguous()
        lepe = self.lepe(value_map).permute(0, 2, 3, 1)
        query, key_value = (
            t.flatten(3, 4).flatten(1, 2) for t in (query, key_value)
        )  # (B, R, T, C)
        routes = self._route(query, key_value[..., :dim])
        out = self.attend(query, key_value, routes)
        out = to_image(out.unflatten(1, (side, side)).unflatten(3, (x.shape[3], x.shape[4])))
        return self.wo(out + lepe)[:, :height, :width].contiguous()

    def _route(self, query: Tensor, key: Tensor) -> Tensor:
        """Choose the regions whose mean keys the mean queries meet best: (B, R, k)."""
        query, key = (t.detach().mean(2) for t in (query, key))
        return ((query * self.scale) @ key.transpose(1, 2)).topk(self.topk, dim=-1).indices


class GlobalAttention(nn.Module):
    """Attention of all tokens of a map (B, H, W, C) to all, positions encoded from its input."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = (dim // GLOBAL_HEADS) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        lepe = self.lepe(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        qkv = self.qkv(x.flatten(1, 2)).unflatten(-1, (3, GLOBAL_HEADS, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (B, h, HW, D)
        weights = ((query * self.scale) @ key.transpose(-2, -1)).softmax(-1)
        return self.proj((weights @ value).transpose(1, 2).reshape(x.shape) + lepe)


class Block(nn.Module):
    """Positions by a depthwise convolution, attention and MLP, each added to a map (B, C, H, W)."""

    def __init__(self, dim: int, attn: nn.Module) -> None:
        super().__init__()
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        # In the published files the layers have the numbers 0 and 3.
        self.mlp = nn.Sequential(
            nn.Linear(dim, 3 * dim), nn.Identity(), nn.GELU(), nn.Linear(3 * dim, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = (x + self.pos_embed(x)).permute(0, 2, 3, 1)
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x.permute(0, 3, 1, 2)


class BiFormerTranscription(nn.Module):
    """BiFormer for images (B, 3, height, width) of any size.

    Args:
        depths: blocks of each stage.
        dims: channels of each stage.
        num_regions: regions along each axis of the first three stages' maps.
        topk: regions that a region attends to in each of these.
        num_classes: of the classifier.
    """

    HEAD = ("norm", "head")

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        *,
        num_regions: int = 7,
        topk: Sequence[int] = (1, 4, 16),
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        half = dims[0] // 2
        stem = [_halve(3, half), nn.BatchNorm2d(half), nn.GELU()]
        stem += [_halve(half, dims[0]), nn.BatchNorm2d(dims[0])]
        self.downsample_layers = nn.ModuleList([nn.Sequential(*stem)])
        for i in range(3):
            unit = [_halve(dims[i], dims[i + 1]), nn.BatchNorm2d(dims[i + 1])]
            self.downsample_layers.append(nn.Sequential(*unit))
        self.stages = nn.ModuleList()
        for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            blocks = []
            for _ in range(depth):
                is_global = i == 3
                attn = (
                    GlobalAttention(dim)
                    if is_global
                    else RoutedAttention(dim, num_regions, topk[i])
                )
                blocks.append(Block(dim, attn))
            self.stages.append(nn.Sequential(*blocks))
        self.norm = nn.BatchNorm2d(dims[-1])
        self.head = nn.Linear(dims[-1], num_classes)

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """Compute the maps (B, C, H, W) of the stages."""
        maps = [images]
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            maps.append(stage(downsample(maps[-1])))
        return maps[1:]

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits (B, num_classes)."""
        return self.head(self.norm(self.forward_features(images)[-1]).mean((2, 3)))


def _halve(in_chans: int, out_chans: int) -> nn.Conv2d:
    return nn.Conv2d(in_chans, out_chans, 3, stride=2, padding=1)

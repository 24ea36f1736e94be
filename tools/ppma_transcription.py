"""PPMA and RMT as their official code computes them: what ``densezoo bench`` compares ours with.

A straight writing of the architecture (Zhao et al., arXiv 2506.15940) that spends what the official
code spends: masks of lines are made of two differences and two triangles filled with zeros; those
of the full form are copied to all pairs of tokens, added and copied once more into the order of
tokens, for each head; logits, masked logits and weights are all written; sines and cosines are
computed anew in every stage, queries, keys and values by three layers. Parameters have the names of
the published files.

Legend: B images, C channels, (H, W) the map, N = H x W tokens, h heads, D channels of a head, L
tokens of a line, which is a row or a column.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.rotary import rotation_speeds
from .step_memory import OperatorStandIn

HEAD_CHANNELS = 1024

_TINY = dict(depths=(2, 2, 8, 2), dims=(64, 128, 256, 512), num_heads=(4, 4, 8, 16))
_TINY |= dict(mlp_ratio=3, form=("axial", "axial", "full", "full"))
_SMALL = dict(depths=(3, 4, 18, 4), dims=(64, 128, 256, 512), num_heads=(4, 4, 8, 16))
_BASE = dict(depths=(4, 8, 25, 8), dims=(80, 160, 320, 512), num_heads=(5, 5, 10, 16))
_BASE |= dict(layer_scale=(None, None, 1e-6, 1e-6))
_LARGE = _BASE | dict(dims=(112, 224, 448, 640), num_heads=(7, 7, 14, 20))
VARIANTS: dict[str, dict[str, Any]] = {
    "ppma_tiny": _TINY,
    "ppma_small": _SMALL,
    "ppma_base": _BASE,
    "rmt_tiny": _TINY | dict(decay_range=(4, 4, 6, 6)),
    "rmt_small": _SMALL | dict(decay_range=(4, 4, 6, 6)),
    "rmt_base": _BASE | dict(decay_range=(5, 5, 6, 6)),
    "rmt_large": _LARGE | dict(decay_range=(6, 6, 6, 6)),
}


def mask_lines(log_decays: Tensor) -> Tensor:
    """Sum the logarithms of decays (..., L) between all tokens of a line: (..., L, L)."""
    sums, length = log_decays.cumsum(-1), log_decays.shape[-1]
    back, ahead = sums[..., None] - sums[..., None, :], sums[..., None, :] - sums[..., None]
    is_ahead = torch.ones(length, length, dtype=torch.bool, device=sums.device).triu()
    is_back = torch.ones(length, length, dtype=torch.bool, device=sums.device).tril()
    return back.masked_fill(is_ahead, 0) + ahead.masked_fill(is_back, 0)


def mask_rows_and_columns(log_alpha: Tensor, log_beta: Tensor) -> tuple[Tensor, Tensor]:
    """Make the masks of rows and of columns of decays (B, H, W, h).

    Returns:
        (B, h, H, W, W) of rows, (B, h, W, H, H) of columns.
    """
    return mask_lines(log_alpha.permute(0, 3, 1, 2)), mask_lines(log_beta.permute(0, 3, 2, 1))


def mask_paths(rows: Tensor, columns: Tensor) -> Tensor:
    """Make the mask of paths along a query's row, then along a key's column.

    Args:
        rows: masks of rows, (B, h, H, W, W).
        columns: masks of columns, (B, h, W, H, H).

    Returns:
        (B, h, N, N); its transpose is that of paths along the query's column first.
    """
    height, width = rows.shape[2:4]
    # Rows of query and key, then columns of query and key.
    rows = rows[:, :, :, None].expand(-1, -1, -1, height, -1, -1).contiguous()
    columns = columns.movedim(2, -1)[..., None, :].expand(-1, -1, -1, -1, width, -1).contiguous()
    return (rows + columns).transpose(3, 4).flatten(4).flatten(2, 3)


class MaskedAttention(OperatorStandIn):
    """Attention of maps (B, H, W, h, D), whose logits are scaled, under masks that are there.

    Weights take the dtype of values, as under autocast.

    Args:
        form: "full", under one mask (1 or B, h, N, N), or "axial", under those of rows and of
            columns (1 or B, h, 1 or H, W, W) and (1 or B, h, 1 or W, H, H).
        paths: "both", or "row_first" for the row of a query and the column of a key alone.
    """

    def __init__(self, form: str, paths: str) -> None:
        super().__init__()
        self.form = form
        self.paths = paths

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *masks: Tensor) -> Tensor:
        maps = (x.permute(0, 3, 1, 2, 4) for x in (query, key, value))  # (B, h, H, W, D)
        attend = self._attend_fully if self.form == "full" else self._attend_axially
        return attend(*maps, *masks).permute(0, 2, 3, 1, 4)

    def _attend_fully(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        size = query.shape[2:4]
        query, key, value = (x.flatten(2, 3) for x in (query, key, value))
        logits = query @ key.transpose(-2, -1)
        weights = (logits + mask).softmax(-1)
        if self.paths == "both":
            weights = (weights + (logits + mask.transpose(-2, -1)).softmax(-1)) / 2
        return (weights.to(value.dtype) @ value).unflatten(2, size)

    def _attend_axially(
        self, query: Tensor, key: Tensor, value: Tensor, row_masks: Tensor, column_masks: Tensor
    ) -> Tensor:
        logits = query @ key.transpose(-2, -1)
        rows = (logits + row_masks).softmax(-1).to(value.dtype)  # (B, h, H, W, W)
        logits = query.transpose(2, 3) @ key.permute(0, 1, 3, 4, 2)
        columns = (logits + column_masks).softmax(-1).to(value.dtype)  # (B, h, W, H, H)
        out = (columns @ (rows @ value).transpose(2, 3)).transpose(2, 3)
        if self.paths == "both":
            out = (out + rows @ (columns @ value.transpose(2, 3)).transpose(2, 3)) / 2
        return out


class DecayedAttention(MaskedAttention):
    """The same, whose masks are made of log decays (B, H, W, h) along rows and along columns."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, log_alpha: Tensor, log_beta: Tensor
    ) -> Tensor:
        masks = mask_rows_and_columns(log_alpha, log_beta)
        if self.form == "full":
            masks = (mask_paths(*masks),)
        return super().forward(query, key, value, *masks)


class Depthwise(nn.Module):
    """A depthwise convolution of maps (B, H, W, C), which the published files call `conv`."""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def rotate(x: Tensor, sines: Tensor, cosines: Tensor) -> Tensor:
    """Turn pairs of neighbouring channels of (B, H, W, h, D) by angles of (H, W, 1, D)."""
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * cosines + turned * sines


class Decays(nn.Module):
    """The logarithms of decays along rows and along columns, (B, H, W, h), of maps (B, H, W, C)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.dt_linear = nn.Linear(dim // num_heads, 2, bias=False)
        self.dt_bias = nn.Parameter(torch.zeros(num_heads))
        self.A_log = nn.Parameter(torch.zeros(num_heads))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        steps = self.dt_linear(x.unflatten(-1, (len(self.A_log), -1)))
        alpha, beta = (-self.A_log.exp() * F.softplus(z + self.dt_bias) for z in steps.unbind(-1))
        return alpha, beta


class Attention(nn.Module):
    """Attention of a map (B, H, W, C) under masks of a stage, or, where there are none, its own."""

    def __init__(self, dim: int, num_heads: int, form: str, *, has_decays: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(dim, dim) for _ in range(4)
        )
        self.lepe = Depthwise(dim, 5)
        self.path_embed = Decays(dim, num_heads) if has_decays else None
        attention, paths = (
            (DecayedAttention, "both") if has_decays else (MaskedAttention, "row_first")
        )
        self.attend = attention(form, paths)

    def forward(
        self, x: Tensor, sines: Tensor, cosines: Tensor, masks: tuple[Tensor, ...]
    ) -> Tensor:
        query, key, value = self.q_proj(x), self.k_proj(x) * self.scale, self.v_proj(x)
        lepe = self.lepe(value)
        query, key, value = (y.unflatten(-1, (self.num_heads, -1)) for y in (query, key, value))
        query, key = (rotate(y, sines, cosines) for y in (query, key))
        others = masks if self.path_embed is None else self.path_embed(x)
        return self.out_proj(self.attend(query, key, value, *others).flatten(3) + lepe)


class FeedForward(nn.Module):
    """Two linear layers with a depthwise convolution between, of a map (B, H, W, C)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.dwconv = Depthwise(hidden_dim, 3)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc1(x))
        return self.fc2(x + self.dwconv(x))


class Block(nn.Module):
    """Positions, attention and MLP, each added to a map (B, H, W, C)."""

    def __init__(
        self, dim: int, attention: Attention, mlp_ratio: float, layer_scale: float | None
    ) -> None:
        super().__init__()
        self.pos = Depthwise(dim, 3)
        self.retention_layer_norm = nn.LayerNorm(dim, eps=1e-6)
        self.retention = attention
        self.final_layer_norm = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = FeedForward(dim, int(mlp_ratio * dim))
        self.gamma_1 = self.gamma_2 = None
        if layer_scale is not None:
            self.gamma_1, self.gamma_2 = (
                nn.Parameter(torch.full((1, 1, 1, dim), layer_scale)) for _ in range(2)
            )

    def forward(
        self, x: Tensor, sines: Tensor, cosines: Tensor, masks: tuple[Tensor, ...]
    ) -> Tensor:
        x = x + self.pos(x)
        out = self.retention(self.retention_layer_norm(x), sines, cosines, masks)
        x = x + (out if self.gamma_1 is None else self.gamma_1 * out)
        out = self.ffn(self.final_layer_norm(x))
        return x + (out if self.gamma_2 is None else self.gamma_2 * out)


class Positions(nn.Module):
    """Sines and cosines of all tokens, and masks of fixed decays where there are such.

    Args:
        head_dim: channels D.
        num_heads: heads h.
        form: of the attention.
        decay_range: how much smaller the last heads' decays are than the first's, in powers of 2;
            None without fixed decays.
    """

    def __init__(self, head_dim: int, num_heads: int, form: str, decay_range: float | None) -> None:
        super().__init__()
        self.form = form
        # Rounded to float32, which they are in models of float64 too.
        speeds = torch.tensor(rotation_speeds(head_dim), dtype=torch.float32)
        self.register_buffer("angle", speeds.repeat_interleave(2), persistent=False)
        decay = None
        if decay_range is not None:
            decay = torch.log(1 - 2 ** (-2 - decay_range * torch.arange(num_heads) / num_heads))
        self.register_buffer("decay", decay, persistent=False)

    def forward(self, size: tuple[int, int]) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        height, width = size
        tokens = torch.arange(height * width, device=self.angle.device).to(self.angle)
        angles = (tokens[:, None] * self.angle).unflatten(0, size)[:, :, None]
        return angles.sin(), angles.cos(), () if self.decay is None else self._make_masks(size)

    def _make_masks(self, size: tuple[int, int]) -> tuple[Tensor, ...]:
        lines = [torch.arange(length, device=self.decay.device) for length in size]
        decay = self.decay[:, None, None]
        if self.form == "axial":
            rows, columns = (
                (decay * (line[:, None] - line).abs())[None, :, None] for line in reversed(lines)
            )
            return rows, columns
        grid = torch.stack(torch.meshgrid(*lines, indexing="ij"), -1).flatten(0, 1)
        return ((decay * (grid[:, None] - grid).abs().sum(-1))[None],)


class Stage(nn.Module):
    """Blocks of a map (B, H, W, C), and the downsampling that follows, if one does."""

    def __init__(self, positions: Positions, blocks: Sequence[Block], next_dim: int | None) -> None:
        super().__init__()
        self.Relpos = positions
        self.blocks = nn.ModuleList(blocks)
        self.downsample = None
        if next_dim is not None:
            dim = blocks[0].pos.conv.out_channels
            self.downsample = nn.ModuleDict(
                {"reduction": _conv(dim, next_dim, 2), "norm": nn.BatchNorm2d(next_dim)}
            )

    def forward(self, x: Tensor) -> Tensor:
        positions = self.Relpos(x.shape[1:3])
        for block in self.blocks:
            x = block(x, *positions)
        return x


class PPMATranscription(nn.Module):
    """PPMA, or RMT where decays are fixed, for images (B, 3, height, width) of any size.

    Args:
        depths: blocks of each stage.
        dims: channels of each stage.
        num_heads: heads of each stage.
        form: "full" or "axial".
        mlp_ratio: hidden channels of the MLPs over their channels.
        layer_scale: first value of the factors of what blocks add; None for no factors.
        decay_range: of fixed decays, as `Positions` takes it; None for learned ones.
        num_classes: of the classifier.

    What is no sequence holds for all stages.
    """

    HEAD = ("proj", "norm", "head")

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        num_heads: Sequence[int],
        *,
        form: str | Sequence[str] = ("axial", "axial", "axial", "full"),
        mlp_ratio: float | Sequence[float] = (4, 4, 3, 3),
        layer_scale: float | None | Sequence[float | None] = None,
        decay_range: float | None | Sequence[float | None] = None,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        form, mlp_ratio, layer_scale, decay_range = (
            x if isinstance(x, Sequence) and not isinstance(x, str) else (x,) * len(dims)
            for x in (form, mlp_ratio, layer_scale, decay_range)
        )
        half = dims[0] // 2
        stem = [_conv(3, half, 2), nn.BatchNorm2d(half), nn.GELU()]
        stem += [_conv(half, half, 1), nn.BatchNorm2d(half), nn.GELU()]
        stem += [_conv(half, dims[0], 2), nn.BatchNorm2d(dims[0]), nn.GELU()]
        stem += [_conv(dims[0], dims[0], 1), nn.BatchNorm2d(dims[0])]
        self.patch_embed = nn.ModuleDict({"proj": nn.Sequential(*stem)})
        self.layers = nn.ModuleList()
        for i, (depth, dim, heads) in enumerate(zip(depths, dims, num_heads, strict=True)):
            blocks = [
                Block(
                    dim,
                    Attention(dim, heads, form[i], has_decays=decay_range[i] is None),
                    mlp_ratio[i],
                    layer_scale[i],
                )
                for _ in range(depth)
            ]
            positions = Positions(dim // heads, heads, form[i], decay_range[i])
            next_dim = dims[i + 1] if i + 1 < len(dims) else None
            self.layers.append(Stage(positions, blocks, next_dim))
        self.proj = nn.Linear(dims[-1], HEAD_CHANNELS)
        self.norm = nn.BatchNorm2d(HEAD_CHANNELS)
        self.head = nn.Linear(HEAD_CHANNELS, num_classes)

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """Compute the maps (B, C, H, W) of the stages."""
        x, maps = self.patch_embed["proj"](images), []
        for stage in self.layers:
            maps.append(stage(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
            if stage.downsample is not None:
                x = stage.downsample["norm"](stage.downsample["reduction"](maps[-1]))
        return maps

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits (B, num_classes)."""
        x = self.proj(self.forward_features(images)[-1].permute(0, 2, 3, 1))
        return self.head(F.silu(self.norm(x.permute(0, 3, 1, 2))).mean((2, 3)))


def _conv(in_chans: int, out_chans: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(in_chans, out_chans, 3, stride=stride, padding=1)

"""Polyline attention as a layer: projections, rotary embedding, decays, LePE.

Legend: B batch, H and W height and width of the map, C channels. All maps are NHWC.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log

import torch
from torch import nn
from torch.nn import functional as F

from ..kernels.polyline_attention.decays import FORMS, PATHS, prefix_sums
from ..kernels.polyline_attention.dispatch import attend_with_decays
from .arguments import check_number, check_whole_number
from .attention_maps import AttentionMaps, Point, attention_weights, maps_of_grid
from .conv import prefers_channels_last
from .depthwise import depthwise
from .linear import Linear
from .rotary import raster_rotation, rotate


class TokenDecays(nn.Module):
    """Log decays of steps between tokens, which each token's channels decide. NHWC.

    (B, H, W, C) -> (2, B, H, W, heads), of steps along rows and along columns, all of them
    negative, in at least float32: -exp(log_rate) * softplus(proj(x) + step_bias). A head has its
    own channels of x; all heads share `proj`, both directions a head's rate and bias.

    Zhao et al., arXiv:2506.15940; the form is that of Mamba's steps, arXiv:2312.00752.

    Args:
        head_dim: channels of a head.
        num_heads: heads.
    """

    def __init__(self, head_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.proj = nn.Linear(head_dim, 2, bias=False)  # too narrow for the faster kernels
        self.log_rate = nn.Parameter(torch.empty(num_heads).uniform_(1, 1.1).log_())
        steps = torch.exp(torch.empty(num_heads).uniform_(log(0.001), log(0.1)))
        # The inverse of softplus, of 0.001 to 0.1.
        self.step_bias = nn.Parameter(steps + torch.log(-torch.expm1(-steps)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # On one axis of tokens: exporters cannot tell how more of them and heads go together.
        steps = self.proj(x.flatten(0, 2).unflatten(-1, (self.num_heads, -1))).flatten(1)
        dtype = torch.promote_types(steps.dtype, torch.float32)
        # Spelled out for both directions, or kernels would go through them two values at a time.
        rate = -self.log_rate.to(dtype).exp().repeat_interleave(2)
        bias = self.step_bias.to(dtype).repeat_interleave(2)
        log_decays = rate * _softplus(steps.to(dtype) + bias)
        by_head = log_decays.unflatten(-1, (self.num_heads, 2)).unflatten(0, x.shape[:3])
        return by_head.movedim(-1, 0)


def _softplus(x: torch.Tensor) -> torch.Tensor:
    """Give log(1 + exp(x)): of PyTorch's kernel for the CPU a value takes 12 ns, of these 3."""
    if not prefers_channels_last(x):
        return F.softplus(x)
    power = x.abs().neg_().exp_()
    total = power + 1
    rounded_off = (total - 1).sub_(power)  # what the sum has too much: a small power, else lost
    return total.log().sub_(rounded_off.div_(total)).add_(x.clamp(min=0))


class FixedDecays(nn.Module):
    """Log decays of steps between tokens, one a head, the same everywhere. NHWC.

    (B, H, W, C) -> (2, B, H, W, heads), in at least float32: log(1 - 2 ** (-2 - b * g / heads))
    of head g, computed in float32 as published models do, along rows and along columns.

    Fan et al., RMT, arXiv:2309.11523.

    Args:
        num_heads: heads.
        decay_range: b.
    """

    def __init__(self, num_heads: int, decay_range: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.decay_range = decay_range

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        head = torch.arange(self.num_heads, dtype=torch.float32, device=x.device)
        decay = torch.log(1 - 2 ** (-2 - self.decay_range * head / self.num_heads))
        decay = decay.to(torch.promote_types(x.dtype, torch.float32))
        return decay.expand(2, *x.shape[:3], self.num_heads)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, decay_range={self.decay_range}"


class PolylineAttention(nn.Module):
    """Multi-head attention of each token to all, along paths whose every step decays. NHWC.

    (B, H, W, C) -> (B, H, W, C). Queries and keys have a rotary embedding of the raster index;
    LePE, a depthwise 5x5 convolution of the values, is added to the heads' results. What attends
    is :func:`densezoo.kernels.polyline_attention`.

    Zhao et al., arXiv:2506.15940; with fixed decays Fan et al., arXiv:2309.11523.

    Args:
        dim: channels C.
        num_heads: heads; divides `dim` into even numbers of channels.
        form: "full" for one softmax over all tokens, "axial" for products of softmaxes over rows
            and over columns.
        paths: "both", or "row_first", as of the operator.
        decay_range: None for decays that depend on the input; a number b for fixed ones,
            log(1 - 2 ** (-2 - b * g / heads)) of head g.

    Raises:
        ValueError: an argument is none of these.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        form: str = "full",
        paths: str = "both",
        decay_range: float | None = None,
    ) -> None:
        super().__init__()
        check_whole_number("dim", dim, 1)
        check_whole_number("num_heads", num_heads, 1)
        if dim % num_heads or dim // num_heads % 2:
            raise ValueError(
                f"num_heads is {num_heads}: a divisor of dim {dim} that gives each head an even "
                "number of channels is taken"
            )
        for name, value, known in (("form", form, FORMS), ("paths", paths, PATHS)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}: one of {', '.join(known)} is taken")
        if decay_range is not None:
            check_number("decay_range", decay_range, 0)
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.form = form
        self.paths = paths
        self.q_proj = Linear(dim, dim)
        self.k_proj = Linear(dim, dim)
        self.v_proj = Linear(dim, dim)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        if decay_range is None:
            self.decays = TokenDecays(self.head_dim, num_heads)
        else:
            self.decays = FixedDecays(num_heads, decay_range)
        self.proj = Linear(dim, dim)

    def forward(self, x: torch.Tensor, rotation: torch.Tensor | None = None) -> torch.Tensor:
        """Attend.

        Args:
            x: (B, H, W, C).
            rotation: (H, W, heads, head_dim / 2, 2), what `raster_rotation` gives for `x`; None to
                compute it here.

        Returns:
            (B, H, W, C).
        """
        decays = self.decays(x).unbind()
        query, key, value = self._project(x, rotation)
        out = self._attend(query, key, value, *decays).flatten(3)
        return self.proj(out + depthwise(self.lepe, value.flatten(3)))

    def attention_maps(
        self,
        x: torch.Tensor,
        rotation: torch.Tensor | None = None,
        *,
        size: tuple[int, int],
        points: Sequence[Point],
    ) -> dict[str, AttentionMaps]:
        """Show what positions of a map attend to; as `NeighborhoodAttention` does."""
        decays = self.decays(x).unbind()
        query, key, value = self._project(x, rotation)
        weights = attention_weights(
            lambda value: self._attend(query, key, value, *decays),
            value,
            [(0, *point) for point in points],
        )
        paths = "both paths" if self.paths == "both" else "one path"
        return {f"{self.form}, {paths}": maps_of_grid(weights[:, 0], size)}

    def polyline_masks(
        self,
        x: torch.Tensor,
        rotation: torch.Tensor | None = None,
        *,
        size: tuple[int, int],
        points: Sequence[Point],
    ) -> torch.Tensor:
        """Give the decay of paths from positions of a map to all of its positions.

        Args:
            x: (1, H, W, C), as in the forward pass.
            rotation: that of the forward pass; masks do not depend on it.
            size: H and W.
            points: rows and columns of the P positions.

        Returns:
            (P, H, W, heads), 1 at the position itself: the product of the decays along the path, or
            the mean of those of both paths.
        """
        decays = self.decays(x).unbind()
        # (H, W, heads): of a path's two lines each log decay is a difference of two of these.
        rows, columns = (sums[0] for sums in prefix_sums(*decays, decays[0].dtype))
        masks = []
        for i, j in points:
            row_first = (rows[i] - rows[i, j]).abs() + (columns - columns[i]).abs()
            at_column = columns[:, j : j + 1]
            column_first = (at_column - columns[i, j]).abs() + (rows - rows[:, j : j + 1]).abs()
            # Weights of rows, applied first, are those of the rows that the column reaches.
            one_path = row_first if self.form == "full" else column_first
            paths = [row_first, column_first] if self.paths == "both" else [one_path]
            masks.append(sum((-path).exp() for path in paths) / len(paths))
        return torch.stack(masks)

    def _project(
        self, x: torch.Tensor, rotation: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Give query and key, turned, and value: (B, H, W, heads, head_dim) each."""
        if rotation is None:
            rotation = raster_rotation(*x.shape[1:3], self.num_heads, self.head_dim, like=x)
        query, key, value = (
            proj(x).unflatten(-1, (self.num_heads, self.head_dim))
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rotate(query, rotation), rotate(key, rotation), value

    def _attend(self, *tensors: torch.Tensor) -> torch.Tensor:
        scale = self.head_dim**-0.5  # a trace would make a rounded number of the operator's own
        return attend_with_decays(*tensors, form=self.form, paths=self.paths, scale=scale)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, form={self.form}, paths={self.paths}"

"""MLPs of blocks."""

from __future__ import annotations

import torch
from torch import nn

from .arguments import check_whole_number
from .conv import PointwiseConv, prefers_channels_last
from .linear import Linear, in_pieces

# Hidden values that an MLP holds at a time in CPU inference: 4 MiB of float32, of the size of
# a core's share of the cache, and small enough for the allocator to keep the pages.
_HIDDEN_VALUES = 2**20

# Hidden values up to which one piece is faster: the allocator gives memory above 32 MiB back,
# and the next call pays for every page anew.
_MOST_HIDDEN_VALUES = 2**22


class ConvMlp(nn.Module):
    """Two 1x1 convolutions with an exact GELU between them. NCHW, (B, dim, H, W) to the same.

    Args:
        dim: channels in and out.
        hidden_dim: channels between.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        check_whole_number("hidden_dim", hidden_dim, 1)
        self.fc1 = PointwiseConv(dim, hidden_dim, gelu=True)
        self.fc2 = PointwiseConv(hidden_dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if prefers_channels_last(x):
            rows = max(1, _HIDDEN_VALUES // (self.fc1.out_channels * x.shape[-1]))
            if rows < x.shape[-2]:
                parts = [self.fc2(self.fc1(part)) for part in x.split(rows, dim=2)]
                return torch.cat(parts, dim=2)
        return self.fc2(self.fc1(x))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them. Channels last, (..., dim) to the same.

    Args:
        dim: channels in and out.
        hidden_dim: channels between.
        gelu: which GELU, "exact" or "tanh" (its approximation by tanh).
    """

    def __init__(self, dim: int, hidden_dim: int, *, gelu: str = "exact") -> None:
        super().__init__()
        check_whole_number("hidden_dim", hidden_dim, 1)
        self.fc1 = Linear(dim, hidden_dim, gelu=gelu)
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not prefers_channels_last(x):
            return self.fc2(self.fc1(x))
        tokens = in_pieces(
            lambda part: self.fc2(self.fc1(part)),
            x.reshape(-1, x.shape[-1]),
            self.fc1.out_features,
            most=_MOST_HIDDEN_VALUES,
            piece=_HIDDEN_VALUES,
        )
        return tokens.view(x.shape)

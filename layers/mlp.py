"""MLPs of blocks."""

from __future__ import annotations

import torch
from torch import nn

from .conv import PointwiseConv


class ConvMlp(nn.Module):
    """Two 1x1 convolutions with an exact GELU between them. NCHW, (B, dim, H, W) to the same.

    Args:
        dim: channels in and out.
        hidden_dim: channels between.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = PointwiseConv(dim, hidden_dim, gelu=True)
        self.fc2 = PointwiseConv(hidden_dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.fc1(x))

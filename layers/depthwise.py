"""Depthwise convolutions of maps whose blocks work on NHWC.

Legend: B batch, H and W height and width of the map, C channels. All maps are NHWC.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .conv import prefers_channels_last


def depthwise(conv: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Apply a convolution to an NHWC map, which is an NCHW one in channels-last memory."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


# What a 3x3 kernel that copies its input is made of.
_COPY = torch.zeros(3, 3, dtype=torch.float32, device="cpu")
_COPY[1, 1] = 1


class ResidualDepthwise(nn.Conv2d):
    """Depthwise 3x3 convolution, added to its input. NHWC, (B, H, W, dim) to the same."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not prefers_channels_last(x):
            return x + depthwise(super().forward, x)
        weight = self.weight + _COPY  # the input itself, without a pass over memory of its own
        return depthwise(lambda x: self._conv_forward(x, weight, self.bias), x)

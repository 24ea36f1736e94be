"""Linear layers that are faster in inference on a CPU than PyTorch's own path to them."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .arguments import check_whole_number
from .conv import linear_on_cpu, prefers_channels_last


class Linear(nn.Linear):
    """Linear layer, optionally followed by an exact GELU.

    (..., in_features) -> (..., out_features).

    Args:
        in_features: channels in.
        out_features: channels out.
        bias: whether a bias is added.
        gelu: whether GELU follows; it costs no pass over memory of its own on the CPU.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, gelu: bool = False
    ) -> None:
        check_whole_number("in_features", in_features, 1)
        check_whole_number("out_features", out_features, 1)
        super().__init__(in_features, out_features, bias)
        self.gelu = gelu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # PyTorch's own layer says what is wrong with the width of an input.
        if prefers_channels_last(x) and x.shape[-1:] == self.weight.shape[1:]:
            return linear_on_cpu(x, self.weight, self.bias, gelu=self.gelu)
        x = super().forward(x)
        return F.gelu(x) if self.gelu else x

    def extra_repr(self) -> str:
        return super().extra_repr() + (", gelu=True" if self.gelu else "")

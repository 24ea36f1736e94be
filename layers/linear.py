"""Linear layers that are faster in inference on a CPU than PyTorch's own path to them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .arguments import check_whole_number
from .conv import apply_gelu, gelu_form, linear_on_cpu, prefers_channels_last


def in_pieces(
    function: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    width: int,
    *,
    most: int,
    piece: int,
) -> torch.Tensor:
    """Apply `function` to `x`, in CPU inference in pieces where it holds much in between.

    The allocator gives memory above 32 MiB back, and the next call pays for every page anew;
    smaller pieces stay in the cache.

    Args:
        function: of the items of the first axis, each by itself.
        x: (items, ...).
        width: values that the function holds for an item.
        most: values up to which one piece is faster.
        piece: values that a piece is to hold.

    Returns:
        function(x).
    """
    if prefers_channels_last(x) and len(x) * width > most:
        parts = x.split(max(1, piece // width))
        return torch.cat([function(part) for part in parts])
    return function(x)


class Linear(nn.Linear):
    """Linear layer, optionally followed by a GELU.

    (..., in_features) -> (..., out_features).

    Args:
        in_features: channels in.
        out_features: channels out.
        bias: whether a bias is added.
        gelu: whether GELU follows; it costs no pass over memory of its own on the CPU. True or
            "exact" for the exact one, "tanh" for its approximation by tanh.

    Raises:
        ValueError: an argument is none of these.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, gelu: bool | str = False
    ) -> None:
        check_whole_number("in_features", in_features, 1)
        check_whole_number("out_features", out_features, 1)
        super().__init__(in_features, out_features, bias)
        self.gelu = gelu_form(gelu)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # PyTorch's own layer says what is wrong with the width of an input.
        if prefers_channels_last(x) and x.shape[-1:] == self.weight.shape[1:]:
            return linear_on_cpu(x, self.weight, self.bias, gelu=self.gelu)
        return apply_gelu(super().forward(x), self.gelu)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", gelu={self.gelu!r}" if self.gelu else "")

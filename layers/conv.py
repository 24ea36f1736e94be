"""Convolutions with their norm, 1x1 convolutions as matrix products, and BatchNorm folding.

Legend: B batch, C channels, H and W height and width. All maps are NCHW; the memory format
(contiguous or channels last) of the input is kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from .arguments import check_whole_number


def prefers_channels_last(x: torch.Tensor) -> bool:
    """Whether convolutional inference on `x` runs faster on channels-last memory.

    True for eager float32 inference on a CPU with oneDNN: there 1x1 convolutions become one
    matrix product over all pixels, and depthwise ones read whole vectors of channels. Never
    under autograd, compilers, exporters or dispatch modes (counters, fake tensors), which are
    to see the plain operators.
    """
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


def run_channels_last(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    """Apply `function` to the NCHW map `x`, on channels-last memory where that is faster.

    The result has the memory format of `x`: converted once on entry and once on exit when `x`
    is contiguous, not at all when it is channels last already.
    """
    if prefers_channels_last(x) and x.is_contiguous():
        return function(x.contiguous(memory_format=torch.channels_last)).contiguous()
    return function(x)


def linear_on_cpu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, gelu: bool = False
) -> torch.Tensor:
    """Compute `x @ weight.T + bias`, then an exact GELU if asked for, by oneDNN.

    Takes half the time or less of the library that PyTorch's own linear layers use on a CPU.
    Where `prefers_channels_last(x)` alone: there is no gradient.

    Args:
        x: (..., in_features), float32.
        weight: (out_features, in_features).
        bias: (out_features,), or None.
        gelu: whether GELU follows.

    Returns:
        (..., out_features).
    """
    post_operation = ("gelu", [], "none") if gelu else ("none", [], "")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *post_operation)


class PointwiseConv(nn.Conv2d):
    """1x1 convolution, optionally followed by an exact GELU. NCHW.

    Args:
        in_chans: channels of the input, (B, in_chans, H, W).
        out_chans: channels of the output, (B, out_chans, H, W).
        bias: whether a bias is added.
        gelu: whether GELU follows; it costs no pass over memory of its own on the CPU.
    """

    def __init__(
        self, in_chans: int, out_chans: int, *, bias: bool = True, gelu: bool = False
    ) -> None:
        check_whole_number("in_chans", in_chans, 1)
        check_whole_number("out_chans", out_chans, 1)
        super().__init__(in_chans, out_chans, 1, bias=bias)
        self.gelu = gelu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if prefers_channels_last(x):
            # PyTorch sends a 1x1 convolution of one image on one thread past oneDNN.
            weight = self.weight[:, :, 0, 0]
            y = linear_on_cpu(x.permute(0, 2, 3, 1), weight, self.bias, gelu=self.gelu)
            return y.permute(0, 3, 1, 2)
        x = super().forward(x)
        return F.gelu(x) if self.gelu else x

    def extra_repr(self) -> str:
        return super().extra_repr() + (", gelu=True" if self.gelu else "")


class ConvNorm(nn.Module):
    """Convolution and BatchNorm; `fuse()` makes one convolution of them. NCHW.

    Args:
        in_chans: channels of the input, (B, in_chans, H, W).
        out_chans: channels of the output, (B, out_chans, ceil(H / stride), ceil(W / stride)).
        kernel_size: odd; zero padding keeps the size at stride 1.
        stride: step in pixels.
        groups: channel groups of the convolution.
    """

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        kernel_size: int = 1,
        *,
        stride: int = 1,
        groups: int = 1,
    ) -> None:
        super().__init__()
        arguments = dict(in_chans=in_chans, out_chans=out_chans, stride=stride, groups=groups)
        for name, value in arguments.items():
            check_whole_number(name, value, 1)
        check_whole_number("kernel_size", kernel_size, 1)
        if kernel_size % 2 == 0 or in_chans % groups or out_chans % groups:
            raise ValueError(
                f"kernel_size is {kernel_size}, groups is {groups}: an odd kernel and groups that "
                f"divide in_chans {in_chans} and out_chans {out_chans} are taken"
            )
        if kernel_size == 1 and stride == 1 and groups == 1:
            self.conv = PointwiseConv(in_chans, out_chans)
        else:
            self.conv = nn.Conv2d(
                in_chans, out_chans, kernel_size, stride, kernel_size // 2, groups=groups
            )
        self.norm = nn.BatchNorm2d(out_chans)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x))

    def fuse(self) -> ConvNorm:
        """Fold the norm into the convolution, in place; exact in evaluation mode.

        Returns itself, as timm's `reparameterize_model` expects of a `fuse`.
        """
        self.norm = fold_norm_into_previous(self.conv, self.norm)
        return self


def _scale_and_shift(norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Evaluation-mode BatchNorm as y = scale * x + shift, two float64 (C,) tensors."""
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale, norm.bias.double() - norm.running_mean.double() * scale


def _assign(conv: nn.Conv2d, weight: torch.Tensor, bias: torch.Tensor) -> None:
    dtype, requires_grad = conv.weight.dtype, conv.weight.requires_grad
    # The layout that inference wants, or it would be copied at every call.
    weight = weight.to(dtype, memory_format=torch.channels_last)
    conv.weight = nn.Parameter(weight, requires_grad)
    conv.bias = nn.Parameter(bias.to(dtype), requires_grad)


@torch.no_grad()
def fold_norm_into_previous(conv: nn.Conv2d, norm: nn.Module) -> nn.Identity:
    """Rewrite `conv` in place so that it equals norm(conv(x)) with the running statistics.

    Returns:
        The identity that takes the norm's place. An identity as `norm` changes nothing.
    """
    if isinstance(norm, nn.Identity):
        return norm
    scale, shift = _scale_and_shift(norm)
    if conv.bias is not None:
        shift = shift + conv.bias.double() * scale
    _assign(conv, conv.weight.double() * scale[:, None, None, None], shift)
    return nn.Identity()


@torch.no_grad()
def fold_norm_into_next(norm: nn.Module, *convs: nn.Conv2d) -> nn.Identity:
    """Rewrite the 1x1 `convs` in place so that each equals conv(norm(x)); they get a bias.

    Exact for 1x1 alone: a larger kernel would see the norm's shift on zero padding too.

    Returns:
        The identity that takes the norm's place. An identity as `norm` changes nothing.

    Raises:
        ValueError: a convolution is not 1x1 with one group.
    """
    for conv in convs:
        if conv.kernel_size != (1, 1) or conv.groups != 1:
            raise ValueError(
                f"conv has kernel_size {conv.kernel_size} and groups {conv.groups}: a norm folds "
                "into a following convolution of kernel_size (1, 1) and groups 1 alone"
            )
    if isinstance(norm, nn.Identity):
        return norm
    scale, shift = _scale_and_shift(norm)
    for conv in convs:
        weight = conv.weight.double()
        bias = weight[:, :, 0, 0] @ shift
        if conv.bias is not None:
            bias = bias + conv.bias.double()
        _assign(conv, weight * scale[None, :, None, None], bias)
    return nn.Identity()

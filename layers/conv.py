"""Convolutions with their norm, 1x1 convolutions as matrix products, and BatchNorm folding.

Legend: B batch, C channels, H and W height and width. All maps are NCHW; the memory format
(contiguous or channels last) of the input is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import nn
from torch.nn import functional as F

from .arguments import check_whole_number
from .tracing import is_plain_inference


def prefers_channels_last(x: torch.Tensor) -> bool:
    """Whether convolutional inference on `x` runs faster on channels-last memory.

    True for eager float32 inference on a CPU with oneDNN: there 1x1 convolutions become one
    matrix product over all pixels, and depthwise ones read whole vectors of channels. Never but
    in `is_plain_inference`.
    """
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and is_plain_inference()  # before those that Dynamo does not trace
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
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


def gelu_form(gelu: bool | str) -> str | None:
    """Name the GELU that an argument asks for: "exact", "tanh", or None for none.

    Raises:
        ValueError: it is none of True, False, "exact" and "tanh".
    """
    if isinstance(gelu, bool):
        return "exact" if gelu else None
    if gelu not in ("exact", "tanh"):
        raise ValueError(f'gelu is {gelu!r}: True, False, "exact" or "tanh" is taken')
    return gelu


def apply_gelu(x: torch.Tensor, form: str | None) -> torch.Tensor:
    """Apply the GELU that `gelu_form` named, if any."""
    if form is None:
        return x
    return F.gelu(x, approximate="tanh" if form == "tanh" else "none")


def linear_on_cpu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, gelu: str | None = None
) -> torch.Tensor:
    """Compute `x @ weight.T + bias`, then a GELU if asked for, by oneDNN.

    Takes half the time or less of the library that PyTorch's own linear layers use on a CPU.
    Where `prefers_channels_last(x)` alone: there is no gradient.

    Args:
        x: (..., in_features), float32.
        weight: (out_features, in_features).
        bias: (out_features,), or None.
        gelu: the GELU that follows, "exact" or "tanh"; None for none.

    Returns:
        (..., out_features).
    """
    post_operation = ("none", [], "")
    if gelu is not None:
        post_operation = ("gelu", [], "tanh" if gelu == "tanh" else "none")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *post_operation)


class PointwiseConv(nn.Conv2d):
    """1x1 convolution, optionally followed by a GELU. NCHW.

    Args:
        in_chans: channels of the input, (B, in_chans, H, W).
        out_chans: channels of the output, (B, out_chans, H, W).
        bias: whether a bias is added.
        gelu: whether GELU follows; it costs no pass over memory of its own on the CPU. True or
            "exact" for the exact one, "tanh" for its approximation by tanh.

    Raises:
        ValueError: an argument is none of these.
    """

    def __init__(
        self, in_chans: int, out_chans: int, *, bias: bool = True, gelu: bool | str = False
    ) -> None:
        check_whole_number("in_chans", in_chans, 1)
        check_whole_number("out_chans", out_chans, 1)
        super().__init__(in_chans, out_chans, 1, bias=bias)
        self.gelu = gelu_form(gelu)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if prefers_channels_last(x):
            # PyTorch sends a 1x1 convolution of one image on one thread past oneDNN.
            weight = self.weight[:, :, 0, 0]
            y = linear_on_cpu(x.permute(0, 2, 3, 1), weight, self.bias, gelu=self.gelu)
            return y.permute(0, 3, 1, 2)
        return apply_gelu(super().forward(x), self.gelu)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", gelu={self.gelu!r}" if self.gelu else "")


class Conv(nn.Conv2d):
    """Convolution that is a matrix product where its weight has more numbers than patches. NCHW.

    oneDNN reorders the weight of a convolution at every call, which on the small maps of late
    stages takes several times as long as the convolution. A product takes it as it is. In CPU
    inference, with one group. Arguments are those of PyTorch's layer, padding as numbers, of zeros.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.groups > 1 or not prefers_channels_last(x):
            return super().forward(x)
        extents = zip(
            x.shape[2:], self.kernel_size, self.stride, self.padding, self.dilation, strict=True
        )
        size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in extents]
        if x[:, 0, 0, 0].numel() * prod(size) >= self.out_channels:
            return super().forward(x)
        patches = F.unfold(x, self.kernel_size, self.dilation, self.padding, self.stride)
        y = linear_on_cpu(patches.transpose(1, 2), self.weight.flatten(1), self.bias)
        return y.unflatten(1, size).permute(0, 3, 1, 2)


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate that the mean of every channel decides. NCHW.

    (B, dim, H, W) -> (B, dim, H, W): x * sigmoid(fc2(activation(fc1(mean of x)))).

    Hu et al., arXiv:1709.01507.

    Args:
        dim: channels in and out.
        hidden_dim: channels between the two 1x1 convolutions.
        bias: whether the convolutions add a bias.
        activation: "silu", or "gelu" for the exact one.

    Raises:
        ValueError: an argument is none of these.
    """

    def __init__(self, dim: int, hidden_dim: int, *, bias: bool, activation: str) -> None:
        super().__init__()
        check_whole_number("dim", dim, 1)
        check_whole_number("hidden_dim", hidden_dim, 1)
        if activation not in ("silu", "gelu"):
            raise ValueError(f'activation is {activation!r}: "silu" or "gelu" is taken')
        self.fc1 = PointwiseConv(dim, hidden_dim, bias=bias, gelu=activation == "gelu")
        self.act = nn.SiLU() if activation == "silu" else nn.Identity()
        self.fc2 = PointwiseConv(hidden_dim, dim, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean((2, 3), keepdim=True)
        return x * self.fc2(self.act(self.fc1(mean))).sigmoid()


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
            self.conv = Conv(
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


def scale_and_shift(norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
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
    scale, shift = scale_and_shift(norm)
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
    scale, shift = scale_and_shift(norm)
    for conv in convs:
        weight = conv.weight.double()
        bias = weight[:, :, 0, 0] @ shift
        if conv.bias is not None:
            bias = bias + conv.bias.double()
        _assign(conv, weight * scale[None, :, None, None], bias)
    return nn.Identity()

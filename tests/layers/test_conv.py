"""The CPU inference paths and the folding of norms equal the plain layers."""

import pytest
import torch
from oracles import relative_error
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from densezoo.layers import mlp
from densezoo.layers.conv import (
    Conv,
    ConvNorm,
    PointwiseConv,
    SqueezeExcite,
    fold_norm_into_next,
    prefers_channels_last,
    run_channels_last,
)
from densezoo.layers.mlp import ConvMlp


def image(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def settled(norm, seed=0):
    """Give a norm statistics and affine parameters that are not trivial."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    norm.running_var.copy_(torch.rand(norm.running_var.shape, generator=generator) + 0.1)
    return norm.eval()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("gelu", [False, True, "tanh"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_pointwise_convolution_is_the_same_with_and_without_autograd(layout, gelu, bias, batch):
    torch.manual_seed(0)
    conv = PointwiseConv(5, 7, bias=bias, gelu=gelu)
    x = image(batch, 5, 9, 4).to(memory_format=layout)
    expected = nn.functional.conv2d(x.double(), conv.weight.double())
    if bias:
        expected = expected + conv.bias.double()[:, None, None]
    if gelu == "tanh":
        inner = (2 / torch.pi) ** 0.5 * (expected + 0.044715 * expected**3)
        expected = expected * 0.5 * (1 + inner.tanh())
    elif gelu:
        expected = expected * 0.5 * (1 + torch.erf(expected / 2**0.5))
    recorded = conv(x)
    with torch.no_grad():
        assert prefers_channels_last(x)
        inferred = conv(x)
    assert recorded.requires_grad and not inferred.requires_grad
    assert relative_error(recorded, expected) < 1e-5
    assert relative_error(inferred, expected) < 1e-5


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("activation, bias", [("silu", True), ("gelu", False)])
def test_squeeze_excite_scales_channels_by_gates_of_all_means(activation, bias, layout):
    torch.manual_seed(0)
    layer = SqueezeExcite(6, 4, bias=bias, activation=activation)
    x = image(2, 6, 5, 7).to(memory_format=layout)
    function = {"silu": nn.functional.silu, "gelu": nn.functional.gelu}[activation]
    gates = x.double().mean((2, 3))
    for fc, act in ((layer.fc1, function), (layer.fc2, torch.sigmoid)):
        gates = gates @ fc.weight.double().flatten(1).T
        gates = act(gates if fc.bias is None else gates + fc.bias.double())
    expected = x * gates[:, :, None, None]
    assert relative_error(layer(x), expected) < 1e-6
    with torch.no_grad():
        result = layer(x)
    assert relative_error(result, expected) < 1e-6
    assert result.is_contiguous(memory_format=layout)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(activation="relu"), "activation is 'relu'"),
        (dict(hidden_dim=0), "hidden_dim is 0"),
        (dict(dim=0), "dim is 0"),
    ],
    ids=str,
)
def test_bad_arguments_of_squeeze_excite_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        SqueezeExcite(
            **{"dim": 6, "hidden_dim": 4, "bias": True, "activation": "silu", **arguments}
        )


def test_other_dtypes_autograd_and_tracing_take_the_plain_operators():
    x = image(1, 3, 4, 4)
    assert not prefers_channels_last(x)  # autograd
    with torch.no_grad():
        assert not prefers_channels_last(x.double())
        assert not prefers_channels_last(x.to("meta"))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not prefers_channels_last(x)
        seen = []

        class Recorder(nn.Module):
            def forward(self, x):
                seen.append(prefers_channels_last(x))
                return x + 1

        torch.jit.trace(Recorder(), x, check_trace=False)
        with FlopCounterMode(display=False):
            Recorder()(x)
        assert seen == [False, False]


def test_the_memory_format_of_the_input_is_kept():
    formats = []

    def function(x):
        formats.append(x.is_contiguous(memory_format=torch.channels_last))
        return 2 * x

    x = image(1, 3, 4, 5)
    with torch.no_grad():
        assert run_channels_last(function, x).is_contiguous()
        last = run_channels_last(function, x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert formats == [True, True]


@pytest.mark.parametrize("size", [(9, 4), (1, 5), (8, 8)])
def test_an_mlp_in_parts_equals_the_whole(size, monkeypatch):
    torch.manual_seed(0)
    layer = ConvMlp(5, 11)
    x = image(2, 5, *size).to(memory_format=torch.channels_last)
    expected = layer(x)
    monkeypatch.setattr(mlp, "_HIDDEN_VALUES", 100)  # 2 rows of 4 pixels, 1 of 5 or 8
    with torch.no_grad():
        parts = layer(x)
    assert relative_error(parts, expected) < 1e-5


@pytest.mark.parametrize("kernel_size, stride, groups", [(1, 1, 1), (3, 1, 4), (3, 2, 1)])
def test_a_norm_folds_into_the_convolution_before_it(kernel_size, stride, groups):
    torch.manual_seed(0)
    layer = ConvNorm(4, 8, kernel_size, stride=stride, groups=groups).double()
    settled(layer.norm)
    x = image(2, 4, 7, 9).double()
    expected = layer(x)
    layer.fuse()
    assert isinstance(layer.norm, nn.Identity)
    assert relative_error(layer(x), expected) < 1e-12


@pytest.mark.parametrize("bias", [False, True])
def test_a_norm_folds_into_every_pointwise_convolution_after_it(bias):
    torch.manual_seed(0)
    norm = settled(nn.BatchNorm2d(4).double())
    convs = [PointwiseConv(4, n, bias=bias).double() for n in (3, 5)]
    x = image(2, 4, 7, 9).double()
    expected = [conv(norm(x)) for conv in convs]
    assert isinstance(fold_norm_into_next(norm, *convs), nn.Identity)
    for conv, e in zip(convs, expected, strict=True):
        assert relative_error(conv(x), e) < 1e-12


@pytest.mark.parametrize("conv", [nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1, groups=2)])
def test_a_norm_folds_into_no_wider_or_grouped_convolution(conv):
    with pytest.raises(ValueError, match="kernel_size"):
        fold_norm_into_next(nn.BatchNorm2d(4), conv)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        dict(kernel_size=3, stride=2, padding=1),
        dict(kernel_size=(2, 3), stride=(2, 1), padding=(0, 1), dilation=(1, 2)),
        dict(kernel_size=4, stride=4, bias=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(4, 8), (5, 9), (40, 44)], ids=str)
def test_a_convolution_is_the_same_as_a_product(size, options, memory_format):
    torch.manual_seed(0)
    conv = Conv(8, 40, **options)
    x = torch.randn(2, 8, *size).to(memory_format=memory_format)
    expected = F.conv2d(
        x.double(),
        conv.weight.double(),
        None if conv.bias is None else conv.bias.double(),
        conv.stride,
        conv.padding,
        conv.dilation,
    )
    with torch.no_grad():
        assert relative_error(conv(x), expected) < 1e-5
    assert relative_error(conv(x), expected) < 1e-5

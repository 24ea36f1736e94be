"""The attention layer: full attention where that is what it is, and padding as NATTEN 0.14 pads."""

import pytest
import torch
from oracles import image, relative_error
from torch.nn import functional as F

from densezoo.kernels import neighborhood_attention
from densezoo.layers.neighborhood_attention import NeighborhoodAttention


def layer(*args, seed=0, **kwargs):
    """A layer in float64 whose every parameter is noise."""
    attn = NeighborhoodAttention(*args, **kwargs).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in attn.parameters():
        parameter.data.normal_(std=0.5, generator=generator)
    return attn


def tokens(*size, dim=8, batch=2, seed=0):
    return image(*size, batch=batch, chans=dim, seed=seed).double().permute(0, 2, 3, 1)


def padded_first(attn, x):
    """What the layer promises, said in another way: pad the input, project all, crop."""
    height, width = x.shape[1:3]
    least = attn.kernel_size * attn.dilation
    x = F.pad(x, (0, 0, 0, max(0, least - width), 0, max(0, least - height)))
    qkv = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).unbind(3)
    out = neighborhood_attention(
        *qkv, attn.kernel_size, dilation=attn.dilation, bias=attn.rel_pos_bias, backend="reference"
    )
    return attn.proj(out.flatten(3))[:, :height, :width]


@pytest.mark.parametrize("size", [(9, 9), (9, 4), (2, 11), (1, 1), (5, 6)], ids=str)
@pytest.mark.parametrize("kernel_size, dilation", [(3, 1), (3, 2), (3, 3), (5, 1)])
def test_padding_is_that_of_a_zero_input_and_is_attended_to(size, kernel_size, dilation):
    attn = layer(8, 2, kernel_size, dilation)
    x = tokens(*size).requires_grad_()
    result, expected = attn(x), padded_first(attn, x)
    assert relative_error(result, expected) < 1e-12
    inputs = [x, *attn.parameters()]
    weight = tokens(*size, seed=1)
    actual = torch.autograd.grad((result * weight).sum(), inputs)
    for a, e in zip(actual, torch.autograd.grad((expected * weight).sum(), inputs), strict=True):
        assert torch.allclose(a, e, atol=1e-10)


def test_a_kernel_as_large_as_the_map_is_full_attention():
    attn = layer(8, 2, 5)
    x = tokens(5, 5)
    query, key, value = attn.qkv(x).reshape(2, 25, 3, 2, 4).permute(2, 0, 3, 1, 4)
    y, position = torch.arange(5), torch.arange(25)
    offset = y[None] - y[:, None] + 4
    rows, columns = position // 5, position % 5
    dy, dx = offset[rows[:, None], rows[None]], offset[columns[:, None], columns[None]]
    bias = attn.rel_pos_bias[:, dy, dx]
    full = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    expected = attn.proj(full.transpose(1, 2).reshape(2, 5, 5, 8))
    assert relative_error(attn(x), expected) < 1e-12


def test_dilation_groups_are_maps_of_their_own():
    dilated, plain = layer(8, 2, 3, 2), layer(8, 2, 3)
    x = tokens(8, 7)
    result = dilated(x)
    for row in (0, 1):
        for column in (0, 1):
            group = slice(row, None, 2), slice(column, None, 2)
            one = result[:, group[0], group[1]]
            assert relative_error(one, plain(x[:, group[0], group[1]])) < 1e-12


@pytest.mark.parametrize("dilation", [1, 2])
def test_compiled_it_is_one_graph_whether_it_pads_or_not(dilation):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    attn = layer(8, 2, 3, dilation)
    compiled = torch.compile(attn, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in [(9, 5), (2, 3), (3, 12), (7, 2), (4, 4)]:
        x = tokens(*size)
        assert relative_error(compiled(x), attn(x)) < 1e-12, size
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_bfloat16_and_autocast_pad_in_their_dtype():
    attn = layer(8, 2, 3, 2).float()
    x = tokens(5, 9).float()
    with torch.autocast("cpu", torch.bfloat16):
        result = attn(x)
    assert result.dtype == attn.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(num_heads=3), "num_heads is 3: a divisor of dim 8"),
        (dict(num_heads=0), "num_heads is 0"),
        (dict(kernel_size=4), "kernel_size is 4: an odd"),
        (dict(kernel_size=1), "kernel_size is 1"),
        (dict(dilation=0), "dilation is 0"),
        (dict(dilation=2.0), r"dilation is 2\.0"),
        (dict(dim=0), "dim is 0"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        NeighborhoodAttention(**{"dim": 8, "num_heads": 2, **arguments})

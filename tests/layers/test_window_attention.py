"""Windows and grids are cut and merged as defined, and attention inside them is attention."""

import copy

import pytest
import torch
from oracles import image, relative_error
from torch.nn import functional as F

from densezoo.layers import window_attention
from densezoo.layers.token_order import gather_map, gather_windows
from densezoo.layers.window_attention import WindowAttention, attend
from densezoo.layers.windows import merge, partition


def tokens(*size, dim=8, batch=2, seed=0):
    return image(*size, batch=batch, chans=dim, seed=seed).double().permute(0, 2, 3, 1)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def layer(*args, seed=0):
    """A layer in float64 whose every parameter is noise."""
    attn = WindowAttention(*args).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in attn.parameters():
        parameter.data.normal_(std=0.5, generator=generator)
    return attn


@pytest.mark.parametrize("is_grid", [False, True], ids=["window", "grid"])
@pytest.mark.parametrize("size", [(2, 3), (1, 4), (3, 1), (6, 12)], ids=str)
def test_a_window_holds_adjacent_tokens_and_a_grid_tokens_evenly_spread(size, is_grid):
    height, width = 6, 12
    x = tokens(height, width)
    windows = partition(x, size, is_grid=is_grid)
    assert windows.shape == (2 * height * width // (size[0] * size[1]), size[0] * size[1], 8)
    down, across = height // size[0], width // size[1]
    for i, window in enumerate(windows):
        a, b = divmod(i % (down * across), across)
        for j, token in enumerate(window):
            r, s = divmod(j, size[1])
            row, column = (
                (r * down + a, s * across + b) if is_grid else (a * size[0] + r, b * size[1] + s)
            )
            assert torch.equal(token, x[i // (down * across), row, column])


@pytest.mark.parametrize("is_grid", [False, True], ids=["window", "grid"])
def test_merging_is_the_inverse_of_cutting(is_grid):
    x = tokens(6, 12, batch=3).requires_grad_()
    merged = merge(partition(x, (2, 3), is_grid=is_grid), (2, 3), 6, 12, is_grid=is_grid)
    assert torch.equal(merged, x)
    weight = tokens(6, 12, batch=3, seed=1)
    assert torch.equal(torch.autograd.grad((merged * weight).sum(), x)[0], weight)


@pytest.mark.parametrize("is_grid", [False, True], ids=["window", "grid"])
@pytest.mark.parametrize("map_size", [(6, 12), (7, 13), (1, 2)], ids=str)
def test_orders_of_tokens_by_arithmetic_are_those_of_views(map_size, is_grid):
    x, size = tokens(*map_size), (2, 3)
    windows = partition(x, size, is_grid=is_grid)
    padded = torch.cat([x.flatten(0, 2), torch.zeros(1, 8)])
    assert torch.equal(gather_windows(padded, x.shape[:3], size, is_grid), windows)
    assert torch.equal(gather_map(windows, size, *map_size, is_grid), x)
    assert torch.equal(merge(windows, size, *map_size, is_grid=is_grid), x)


@pytest.mark.parametrize("is_grid", [False, True], ids=["window", "grid"])
def test_compilers_see_an_order_of_tokens_as_one_operator(is_grid):
    operator, size = torch.ops.densezoo.token_order.default, (2, 3)
    for is_inverse in (False, True):
        arguments = [3, 7, 12], size, is_grid, is_inverse, torch.device("cpu")
        torch.library.opcheck(operator, arguments)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes])
        return graph.forward

    def regroup(x):
        windows = partition(x, size, is_grid=is_grid)
        return windows, merge(windows, size, *x.shape[1:3], is_grid=is_grid)

    compiled = torch.compile(regroup, backend=backend, fullgraph=True, dynamic=True)
    for x in (tokens(7, 12, batch=3), tokens(4, 9), tokens(2, 5)):
        actual, expected = compiled(x), regroup(x)
        assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], x)
    assert len(graphs) == 1 and graphs[0].count(operator) == 2


@pytest.mark.parametrize("scale", [None, 1.0], ids=["own scale", "scale 1"])
@pytest.mark.parametrize("bias_shape", [None, (2, 5, 7), (4, 1, 5, 7), (4, 2, 1, 7)], ids=str)
@pytest.mark.parametrize("head_dim", [3, 32])
def test_attention_is_its_formula_with_every_gradient(head_dim, bias_shape, scale):
    query, key, value = noise(4, 5, 2, head_dim), *noise(2, 4, 7, 2, head_dim, seed=1)
    bias = None if bias_shape is None else noise(*bias_shape, seed=2)
    inputs = [x.requires_grad_() for x in (query, key, value, bias) if x is not None]
    logits = torch.einsum("bnhd,bmhd->bhnm", query, key) * (scale or head_dim**-0.5)
    logits = logits if bias is None else logits + bias
    expected = torch.einsum("bhnm,bmhd->bnhd", logits.softmax(-1), value).flatten(2)
    weight = noise(*expected.shape, seed=3)
    actual = attend(query, key, value, bias, scale=scale)
    assert relative_error(actual, expected) < 1e-12
    gradients = torch.autograd.grad((actual * weight).sum(), inputs)
    for a, e in zip(gradients, torch.autograd.grad((expected * weight).sum(), inputs), strict=True):
        assert torch.allclose(a, e, atol=1e-12)
    with torch.no_grad():
        assert relative_error(attend(query, key, value, bias, scale=scale), expected) < 1e-12


def test_attention_takes_views_of_a_product_and_broadcast_queries():
    qkv = noise(4, 49, 3 * 2 * 32)
    query, key, value = qkv.unflatten(-1, (3, 2, 32)).unbind(2)
    bias = noise(2, 49, 49, seed=1)
    expected = attend(*(x.contiguous() for x in (query, key, value)), bias)
    assert relative_error(attend(query, key, value, bias), expected) < 1e-12
    shared = query[:1].expand(4, -1, -1, -1)
    assert (
        relative_error(
            attend(shared, key, value, bias), attend(shared.contiguous(), key, value, bias)
        )
        < 1e-12
    )


def test_low_precision_attends_in_its_own_dtype_with_a_bias_in_float32():
    inputs = noise(3, 4, 49, 2, 32).bfloat16()
    bias = noise(2, 49, 49, seed=1).float().requires_grad_()
    exact = attend(*inputs.double(), bias.double())
    query, key, value = inputs.transpose(2, 3)
    logits = (query * 32**-0.5) @ key.mT + bias.bfloat16()
    plain = (logits.softmax(-1) @ value).transpose(1, 2).flatten(2)
    result = attend(*inputs, bias)
    assert result.dtype == torch.bfloat16
    assert relative_error(result.double(), exact) < 2 * relative_error(plain.double(), exact)
    assert torch.autograd.grad(result.sum(), bias)[0].isfinite().all()


def test_the_layer_is_self_attention_with_the_bias_of_each_offset():
    attn = layer(8, 2, (2, 3))
    windows = noise(4, 6, 8)
    query, key, value = attn.qkv(windows).reshape(4, 6, 3, 2, 4).permute(2, 0, 3, 1, 4)
    bias = torch.empty(2, 6, 6).double()
    for i in range(6):
        for j in range(6):
            bias[:, i, j] = attn.rel_pos_bias.table[:, j // 3 - i // 3 + 1, j % 3 - i % 3 + 2]
    expected = F.scaled_dot_product_attention(query, key, value, bias)
    expected = attn.proj(expected.transpose(1, 2).reshape(4, 6, 8))
    assert relative_error(attn(windows), expected) < 1e-12


def test_masked_tokens_have_no_influence():
    attn = layer(8, 2, (2, 3))
    windows, mask = noise(4, 6, 8), torch.tensor([True, True, False, True, False, False])
    other = windows.masked_fill(~mask[:, None], 1e6)
    mask = mask.expand(4, 6)
    assert torch.equal(attn(windows, mask)[mask], attn(other, mask)[mask])


def test_smaller_windows_have_the_biases_of_their_offsets():
    attn = layer(8, 2, (3, 4))
    windows = noise(2, 3, 4, 8)
    mask = torch.zeros(2, 3, 4, dtype=torch.bool)
    mask[:, :2, :3] = True
    expected = attn(windows.flatten(1, 2), mask.flatten(1)).view(2, 3, 4, 8)[:, :2, :3]
    smaller = attn(windows[:, :2, :3].flatten(1, 2), size=(2, 3)).view(2, 2, 3, 8)
    assert relative_error(smaller, expected) < 1e-12


def test_many_windows_are_done_in_pieces(monkeypatch):
    attn = layer(8, 2, (2, 3)).float()
    windows = noise(10, 6, 8).float()
    pieces = []
    attn.qkv.register_forward_hook(lambda module, args, output: pieces.append(len(output)))
    with torch.no_grad():
        expected = attn(windows)
        monkeypatch.setattr(window_attention, "_MOST_VALUES", 9 * 6 * 24)
        monkeypatch.setattr(window_attention, "_VALUES_OF_PIECE", 4 * 6 * 24)
        assert relative_error(attn(windows), expected) < 1e-6
    assert pieces == [10, 4, 4, 2]


def test_copies_compute_the_same_and_share_nothing():
    attn = layer(8, 2, (2, 3)).eval()
    windows = noise(4, 6, 8)
    with torch.no_grad():
        expected = attn(windows)
        copied = copy.deepcopy(attn)
        attn.rel_pos_bias.table.data.mul_(2)
        assert torch.equal(copied(windows), expected)
        assert not torch.equal(attn(windows), expected)
    assert set(attn.state_dict()) == {
        "qkv.weight", "qkv.bias", "proj.weight", "proj.bias", "rel_pos_bias.table"
    }  # fmt: skip


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(num_heads=3), "num_heads is 3: a divisor of dim 8"),
        (dict(num_heads=0), "num_heads is 0"),
        (dict(dim=0), "dim is 0"),
        (dict(window_size=(0, 3)), "a side of window_size is 0"),
        (dict(window_size=(2, -3)), "a side of window_size is -3"),
        (dict(window_size=(2, 3, 4)), r"window_size is \(2, 3, 4\)"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        WindowAttention(**{"dim": 8, "num_heads": 2, "window_size": (2, 3), **arguments})

"""Maps of any size: padding and cropping undo each other, and masked padding is seen by none."""

import pytest
import torch
from oracles import image, relative_error
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from densezoo.layers.resolution import crop, num_windows, pad_to_windows
from densezoo.layers.window_attention import WindowAttention, attend_to_real_tokens
from densezoo.layers.windows import merge, partition, real_tokens

WINDOW = (3, 4)
SIZES = [(1, 1), (2, 9), (3, 4), (6, 8), (7, 3), (10, 5), (12, 13)]
KINDS = pytest.mark.parametrize("is_grid", [False, True], ids=["window", "grid"])


def tokens(*size, dim=8, batch=2, seed=0):
    return image(*size, batch=batch, chans=dim, seed=seed).double().permute(0, 2, 3, 1)


def layer(seed=0):
    """A layer in float64 whose every parameter is noise."""
    attn = WindowAttention(8, 2, WINDOW).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in attn.parameters():
        parameter.data.normal_(std=0.5, generator=generator)
    return attn


def without_padding(x, attn, is_grid):
    """The definition: each token attends to the tokens of the map that are in its window."""
    height, width = x.shape[1:3]
    windows, places = [], []
    for length, side in zip((height, width), WINDOW, strict=True):
        position, count = torch.arange(length), -(-length // side)
        windows.append(position % count if is_grid else position // side)
        places.append(position // count if is_grid else position % side)
    rows, columns = (
        i.flatten() for i in torch.meshgrid(*map(torch.arange, (height, width)), indexing="ij")
    )
    together = torch.ones(height * width, height * width, dtype=torch.bool)
    offsets = []
    for axis, index in enumerate((rows, columns)):
        together &= windows[axis][index][:, None] == windows[axis][index]
        offsets.append(places[axis][index] - places[axis][index][:, None] + WINDOW[axis] - 1)
    bias = attn.rel_pos_bias.table[:, offsets[0], offsets[1]].masked_fill(~together, -torch.inf)
    query, key, value = attn.qkv(x.flatten(1, 2)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(query, key, value, bias)
    return attn.proj(out.transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_padding_is_zeros_at_the_bottom_and_right_and_is_cropped_away(size):
    x = tokens(*size)
    padded = pad_to_windows(x, WINDOW)
    down, across = (num_windows(n, side) for n, side in zip(size, WINDOW, strict=True))
    assert padded.shape[1:3] == (3 * down, 4 * across)
    assert 0 <= 3 * down - size[0] < 3 and 0 <= 4 * across - size[1] < 4
    assert torch.equal(crop(padded, *size), x)
    assert padded.sum() == pytest.approx(x.sum()) and (padded is x) == (size in [(3, 4), (6, 8)])


@KINDS
def test_real_tokens_are_those_that_padding_did_not_add(is_grid):
    marked = partition(pad_to_windows(torch.ones(2, 7, 9, 1), WINDOW), WINDOW, is_grid=is_grid)
    assert torch.equal(real_tokens(2, 7, 9, WINDOW, is_grid=is_grid), marked[:, :, 0] == 1)


@KINDS
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tokens_attend_to_the_real_tokens_of_their_window(size, is_grid):
    attn, x = layer(), tokens(*size).requires_grad_()
    inputs, weight = [x, *attn.parameters()], tokens(*size, seed=1)
    expected = without_padding(x, attn, is_grid)
    recorded = attend_to_real_tokens(x, attn, is_grid=is_grid)
    assert relative_error(recorded, expected) < 1e-12
    actual = torch.autograd.grad((recorded * weight).sum(), inputs)
    for a, e in zip(actual, torch.autograd.grad((expected * weight).sum(), inputs), strict=True):
        assert torch.allclose(a, e, atol=1e-10)
    with torch.no_grad():
        assert relative_error(attend_to_real_tokens(x, attn, is_grid=is_grid), expected) < 1e-12


@KINDS
def test_whole_windows_are_cut_and_merged_alone(is_grid):
    attn, x = layer(), tokens(6, 8)
    expected = attn(partition(x, WINDOW, is_grid=is_grid))
    expected = merge(expected, WINDOW, 6, 8, is_grid=is_grid)
    assert torch.equal(attend_to_real_tokens(x, attn, is_grid=is_grid), expected)


@KINDS
def test_maps_of_any_strides_are_taken(is_grid):
    attn, x = layer(), tokens(7, 9)
    with torch.no_grad():
        expected = attend_to_real_tokens(x.contiguous(), attn, is_grid=is_grid)
        part = tokens(9, 11)
        part[:, 1:8, 2:] = x
        for strided in (x, part[:, 1:8, 2:], x.transpose(1, 2).contiguous().transpose(1, 2)):
            actual = attend_to_real_tokens(strided, attn, is_grid=is_grid)
            assert relative_error(actual, expected) < 1e-12


def test_inference_spends_nothing_on_padding():
    """The tokens that each product saw, once padded and masked, once in the windows' own sizes."""
    attn, x = layer(), tokens(7, 9)
    seen = []
    attn.qkv.register_forward_hook(
        lambda module, args, output: seen.append(args[0][..., 0].numel())
    )
    attend_to_real_tokens(x, attn)
    assert seen == [2 * 9 * 12]
    with torch.no_grad():
        attend_to_real_tokens(x, attn)
        assert sum(seen[1:]) == 2 * 7 * 9
        with FlopCounterMode(display=False):  # counts what compilers and exporters get
            attend_to_real_tokens(x, attn)
    assert seen[-1] == 2 * 9 * 12


class Masked(torch.nn.Module):
    """Attention of real tokens to real tokens."""

    def __init__(self, is_grid):
        super().__init__()
        self.attn, self.is_grid = layer(), is_grid

    def forward(self, x):
        return attend_to_real_tokens(x, self.attn, is_grid=self.is_grid)


class Padded(torch.nn.Module):
    """Attention to padding too."""

    def __init__(self):
        super().__init__()
        self.attn = layer()

    def forward(self, x):
        height, width = x.shape[1:3]
        x = pad_to_windows(x, WINDOW)
        windows = self.attn(partition(x, WINDOW))
        return crop(merge(windows, WINDOW, *x.shape[1:3]), height, width)


# One window, several along one axis, along both; whole ones and others.
OPEN_SIZES = [(9, 5), (3, 4), (6, 8), (2, 3), (3, 12), (7, 2)]


@pytest.mark.parametrize("module", [Masked(True), Padded()], ids=["masked grid", "padded"])
def test_compiled_for_open_sizes_it_is_one_graph_whether_it_pads_or_not(module):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in OPEN_SIZES:
        x = tokens(*size)
        assert relative_error(compiled(x), module(x)) < 1e-12, size
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@KINDS
def test_exported_for_open_sizes_it_serves_them_all(is_grid):
    module = Masked(is_grid)
    shapes = {axis: torch.export.Dim.DYNAMIC for axis in range(3)}
    arguments = dict(dynamic_shapes=(shapes,), strict=False)
    program = torch.export.export(module, (tokens(9, 5),), **arguments).module()
    for size in OPEN_SIZES:
        for batch in (1, 3):
            x = tokens(*size, batch=batch)
            assert relative_error(program(x), module(x)) < 1e-12, (size, batch)


@pytest.mark.skipif(
    not hasattr(torch.fx.experimental.symbolic_shapes, "has_static_value"),
    reason="Dynamo of torch < 2.8 does not tell lengths that it knows",
)
def test_compiled_for_one_size_it_has_no_padding_and_no_mask_that_it_does_not_need():
    torch._dynamo.reset()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.print_readable(print_output=False))
        return graph.forward

    module = Masked(False)
    torch.compile(module, fullgraph=True, dynamic=False, backend=keep)(tokens(6, 8))
    torch.compile(module, fullgraph=True, dynamic=False, backend=keep)(tokens(7, 8))
    assert [("index_select" in g, "masked_fill" in g) for g in graphs] == [
        (True, False),
        (True, True),
    ]

"""The CPU path of neighborhood attention: every layout and cut, memory, masks that are kept."""

import gc
import math

import pytest
import torch
from neighborhood_cases import (
    ODD_CASES,
    Case,
    make_inputs,
    random_cases,
    run_case,
    run_oracle,
)
from operator_cases import assert_within_budget
from oracles import PeakMemory

from densezoo.kernels import neighborhood_attention
from densezoo.kernels.neighborhood_attention import cpu, cpu_plan, cpu_tiles
from densezoo.kernels.neighborhood_attention.cpu_tiles import Bands, Chunk, Tiles
from densezoo.kernels.neighborhood_attention.windows import Neighborhood

# Shapes of published models: 7x7 and 14x14 maps, dilation that fills the grid, dilation that does
# not divide it, a kernel of 11 on an odd map.
PUBLISHED_CASES = [
    Case((7, 7), (7, 7), has_bias=True, heads=4, head_dim=32, batch=2),
    Case((14, 14), (7, 7), has_bias=True, heads=2, head_dim=32, batch=2),
    Case((14, 14), (7, 7), (2, 2), has_bias=True, heads=2, head_dim=32),
    Case((25, 42), (7, 7), (3, 3), has_bias=True, heads=1, head_dim=32),
    Case((21, 24), (11, 11), has_bias=True, heads=1, head_dim=32),
]
# One of each kind of window, large enough for tiles inside and at both borders.
KINDS = {
    "bias": Case((23, 26), (5, 7), has_bias=True, batch=2, heads=3),
    "dilated": Case((23, 31), (3, 5), (2, 3), has_bias=True, batch=2),
    "even": Case((17, 22), (4, 6)),
    "strided": Case((22, 25), (5, 4), stride=(3, 2), batch=2),
    "causal": Case((19, 20), (5, 4), stride=(2, 1), is_causal=(True, True)),
    "extra": Case((18, 21), (5, 5), has_bias=True, num_extra=3, batch=2),
    "1-D": Case((61,), (7,), has_bias=True, batch=2),
    "1-D wide": Case((111,), (61,), has_bias=True),
    "1-D dilated": Case((61,), (7,), (3,), has_bias=True, num_extra=1, batch=2),
    "1-D causal": Case((50,), (6,), stride=(4,), is_causal=(True,)),
}
NO_TENSORS = dict(bias=None, extra_key=None, extra_value=None)


def assert_equal_but_for_rounding(actual, expected):
    """Hold float64 results to 1000 roundings of the largest value of each."""
    assert actual.keys() == expected.keys()
    for name, truth in expected.items():
        truth = torch.as_tensor(truth)
        assert actual[name].dtype == truth.dtype == torch.float64, name
        error = (actual[name] - truth).abs().max()
        assert error <= 1000 * torch.finfo(torch.float64).eps * truth.abs().max(), name


@pytest.fixture
def force(monkeypatch):
    """A function that makes the path take a layout, a size of tiles, one tile at a time."""

    def clear():
        cpu_plan.forward_plan.cache_clear()
        cpu_plan.backward_plan.cache_clear()
        cpu_tiles._blocks.cache_clear()
        cpu._known_masks.clear()

    def force(layout=None, tile=None, one_by_one=False):
        if layout is not None:
            other = "_tiles_cost" if layout is Bands else "_bands_cost"
            monkeypatch.setattr(cpu_plan, other, lambda *_: math.inf)
        if tile is not None:
            monkeypatch.setattr(cpu_plan, "TILE_SIZES", (tile,))
        if one_by_one:
            monkeypatch.setattr(cpu_tiles, "TILES_CHUNK", 1)
            monkeypatch.setattr(cpu_plan, "BANDS_CHUNK", 1)
        clear()

    yield force
    clear()


def as_2d(case):
    """Grid and windows as the path sees them."""
    neighborhood = Neighborhood(case.kernel_size, case.dilation, case.stride, case.is_causal)
    return (*case.grid, 1)[:2], cpu._as_2d(neighborhood)


def forward_plan_of(case):
    sizes = case.batch, case.heads, case.head_dim
    return cpu_plan.forward_plan(*as_2d(case), *sizes, case.num_extra > 0)


def backward_plan_of(case):
    return cpu_plan.backward_plan(*as_2d(case), case.batch, case.heads, case.head_dim)


@pytest.mark.parametrize(
    "case", ODD_CASES + random_cases(25, 2, num_axes=(1, 2)), ids=lambda case: case.id
)
def test_odd_cases_equal_loops_over_queries_and_keys(case):
    inputs = make_inputs(case)
    assert_equal_but_for_rounding(run_case(case, inputs, "cpu"), run_oracle(case, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ODD_CASES + PUBLISHED_CASES, ids=lambda case: case.id)
def test_error_is_at_most_twice_that_of_plain_pytorch(case, dtype):
    inputs = make_inputs(case)
    rounded = make_inputs(case, dtype)
    assert_within_budget(
        run_case(case, rounded, "cpu"),
        run_case(case, rounded, "reference"),
        run_case(case, inputs, "reference"),
    )


@pytest.mark.parametrize("one_by_one", [False, True], ids=["together", "one_by_one"])
@pytest.mark.parametrize("tile", [2, 3, 5, 64])
@pytest.mark.parametrize("layout", [Tiles, Bands], ids=["tiles", "bands"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_and_cut_gives_the_same(force, kind, layout, tile, one_by_one):
    case = KINDS[kind]
    if layout is Bands and (case.num_extra or max(case.dilation) > 1):
        layout = Tiles
    force(layout, tile, one_by_one)
    plan = forward_plan_of(case)
    assert {type(tiles) for tiles in plan} == {layout}
    if tile < 64:
        assert max(tiles.num_queries for tiles in plan) <= 16**2
        assert len(plan) > 1
        assert len(backward_plan_of(case)) > 1
    inputs = make_inputs(case)
    assert_equal_but_for_rounding(
        run_case(case, inputs, "cpu"), run_case(case, inputs, "reference")
    )


@pytest.mark.parametrize("kind", ["bias", "dilated", "strided", "1-D"])
def test_tiles_of_keys_that_threads_may_add_to_at_once_do_not_overlap(force, monkeypatch, kind):
    force(tile=3)
    number = 0
    view = Chunk.view

    def checked_view(chunk, tensor, **arguments):
        nonlocal number
        part = view(chunk, tensor, **arguments)
        if arguments.get("is_key") and "extent" in arguments:  # sums of gradients
            places = torch.arange(tensor.untyped_storage().nbytes() // tensor.element_size())
            places = places.as_strided(part.shape, part.stride(), part.storage_offset())
            assert places.unique().numel() == places.numel()
            number += 1
        return part

    monkeypatch.setattr(Chunk, "view", checked_view)
    run_case(KINDS[kind], make_inputs(KINDS[kind]), "cpu")
    assert number > 0


def test_published_shapes_take_both_layouts():
    layouts = {
        (side, dilation): type(
            forward_plan_of(
                Case((side, side), (7, 7), (dilation,) * 2, heads=112 // side, head_dim=32)
            )[0]
        )
        for side, dilation in [(56, 1), (28, 1), (56, 8), (28, 4)]
    }
    assert layouts == {(56, 1): Bands, (28, 1): Bands, (56, 8): Tiles, (28, 4): Tiles}


def test_dilation_that_fills_the_grid_is_one_class_of_whole_groups_without_mask():
    (tiles,) = forward_plan_of(Case((56, 56), (7, 7), (8, 8), head_dim=32))
    assert tiles.is_full
    assert (tiles.y.num_groups, tiles.x.num_groups) == (8, 8)
    assert (tiles.num_queries, tiles.num_keys) == (49, 49)


def test_keys_hidden_before_those_seen_do_no_harm(force):
    # Flash attention goes over the keys in blocks of 512: the last queries see none of the first.
    force(tile=64)
    case = Case((60, 12), (3, 3), has_bias=True, heads=1, head_dim=4)
    assert forward_plan_of(case)[0].num_keys == 720
    inputs = make_inputs(case)
    assert_equal_but_for_rounding(
        run_case(case, inputs, "cpu"), run_case(case, inputs, "reference")
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_of_thousands_stay_finite(dtype):
    case = Case((12, 13), (5, 5), has_bias=True, scale=100.0)
    inputs = make_inputs(case, dtype)
    inputs["bias"] = inputs["bias"] * 1000
    results = run_case(case, inputs, "cpu")
    assert all(tensor.isfinite().all() for tensor in results.values())


@pytest.mark.parametrize("kind", ["bias", "dilated", "extra", "1-D"])
@pytest.mark.parametrize(
    "relayout",
    [
        lambda t: t.clone(),
        lambda t: t.movedim(-2, 1).clone().movedim(1, -2),
        lambda t: t.movedim(-1, 0).clone().movedim(0, -1),
        lambda t: torch.stack([t, t], dim=-1)[..., 1],
        lambda t: t.transpose(0, 1).clone().transpose(0, 1),
        lambda t: torch.cat([t, t], dim=1)[:, : t.shape[1]],
    ],
    ids=["contiguous", "heads_first", "channels_outermost", "every_other", "rows_first", "sliced"],
)
def test_any_strides_give_the_same(kind, relayout):
    case = KINDS[kind]
    inputs = make_inputs(case)
    others = {name: None if t is None else relayout(t) for name, t in inputs.items()}
    others["bias"] = inputs["bias"]
    assert_equal_but_for_rounding(
        run_case(case, others, "cpu"), run_case(case, inputs, "reference")
    )


def test_expanded_inputs_give_the_same():
    case = Case((9, 12), (5, 5), batch=2, heads=3)
    inputs = make_inputs(case)
    for name in ("query", "key", "value", "grad_out"):
        inputs[name] = inputs[name][:1, :, :1, :, :].expand(*inputs[name].shape)
    assert_equal_but_for_rounding(
        run_case(case, inputs, "cpu"), run_case(case, inputs, "reference")
    )


def test_heads_of_one_channel_in_any_strides():
    case = Case((9, 12), (3, 3), has_bias=True, head_dim=1)
    inputs = make_inputs(case)
    inputs["key"] = torch.stack([inputs["key"], inputs["key"]], dim=-2)[..., 0, :]
    assert_equal_but_for_rounding(
        run_case(case, inputs, "cpu"), run_case(case, inputs, "reference")
    )


def test_an_empty_batch_gives_empty_results():
    tensor, neighborhood = torch.zeros(0, 9, 9, 2, 4), Neighborhood((3, 3), (2, 1), (1, 1), (0, 0))
    bias = torch.ones(2, 5, 5)
    out, lse = cpu.forward(tensor, tensor, tensor, bias, None, None, neighborhood, 1.0)
    assert out.shape == tensor.shape and lse.shape == tensor.shape[:-1]
    grads = cpu.backward(
        tensor, None, tensor, tensor, tensor, bias, None, None, out, lse, neighborhood, 1.0
    )
    assert [None if g is None else g.shape for g in grads[:4]] == [tensor.shape] * 3 + [bias.shape]
    assert not grads[3].any()


@pytest.mark.parametrize("kind", KINDS)
def test_results_do_not_change_from_run_to_run(kind):
    inputs = make_inputs(KINDS[kind], torch.float32)
    first, second = (run_case(KINDS[kind], inputs, "cpu") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_images_of_a_batch_do_not_affect_each_other():
    case = KINDS["bias"]
    inputs = make_inputs(case)
    alone = {name: t if name == "bias" or t is None else t[1:] for name, t in inputs.items()}
    together, single = run_case(case, inputs, "cpu"), run_case(case, alone, "cpu")
    for name in ("out", "lse", "grad_query", "grad_key", "grad_value"):
        torch.testing.assert_close(together[name][1:], single[name])


def peaks(grid, kernel_size, dilation, with_bias=True):
    """Peak bytes of forward and of backward beside inputs, in those of query."""
    case = Case(grid, kernel_size, dilation, has_bias=with_bias, heads=2, head_dim=32)
    inputs = make_inputs(case, torch.float32)
    tensors = [inputs[name] for name in ("query", "key", "value", "bias")] + [None, None]
    neighborhood = Neighborhood(case.kernel_size, case.dilation, case.stride, case.is_causal)
    cpu._known_masks.clear()
    with torch.no_grad(), PeakMemory() as forward:
        out, lse = cpu.forward(*tensors, neighborhood, 1.0)
    with torch.no_grad(), PeakMemory() as backward:
        cpu.backward(inputs["grad_out"], inputs["grad_lse"], *tensors, out, lse, neighborhood, 1.0)
    unit = inputs["query"].numel() * 4
    return forward.peak / unit, backward.peak / unit


@pytest.mark.parametrize("dilation", [1, 3])
def test_memory_grows_with_the_map_and_not_with_its_square(dilation):
    small = peaks((64, 64), (7, 7), (dilation,) * 2)
    large = peaks((256, 256), (7, 7), (dilation,) * 2)
    for per_token_small, per_token_large in zip(small, large, strict=True):
        assert per_token_large <= per_token_small
    # Output and lse; gradients of query, key and value, and the output times its cotangent.
    assert large[0] < 2 and large[1] < 4.5


@pytest.mark.parametrize("dilation", [1, 2])
def test_memory_of_a_long_sequence_grows_with_its_length(dilation):
    small, large = (peaks((length,), (13,), (dilation,)) for length in (4096, 65536))
    assert large[0] <= small[0] and large[1] <= small[1]
    assert large[0] < 2 and large[1] < 4.5


def test_what_is_kept_of_a_grid_is_small_whatever_the_kernel():
    case = Case((60, 64), (31, 31), has_bias=True, heads=1)
    run_case(case, make_inputs(case, torch.float32), "cpu")
    for tiles in (*forward_plan_of(case), *backward_plan_of(case)):
        kept = [value for value in vars(tiles).values() if isinstance(value, torch.Tensor)]
        assert sum(tensor.nbytes for tensor in kept) <= 2**20


class TestMasksThatAreKept:
    case = Case((14, 14), (7, 7), has_bias=True, heads=2, head_dim=8)

    def run(self, inputs, bias):
        names = ("query", "key", "value")
        return neighborhood_attention(*(inputs[n] for n in names), 7, bias=bias, backend="cpu")

    def expected(self, inputs, bias):
        names = ("query", "key", "value")
        return neighborhood_attention(
            *(inputs[n] for n in names), 7, bias=bias.clone(), backend="reference"
        )

    def kept(self, bias):
        return cpu._known_masks[bias][-1]

    def test_a_table_that_has_not_changed_is_not_spread_again(self):
        inputs = make_inputs(self.case)
        with torch.no_grad():
            self.run(inputs, inputs["bias"])
            first = self.kept(inputs["bias"])
            self.run(inputs, inputs["bias"])
        assert self.kept(inputs["bias"]) is first

    @pytest.mark.parametrize(
        "change",
        [
            lambda bias: bias.mul_(2),
            lambda bias: bias.data.mul_(2),
            lambda bias: setattr(bias, "data", bias * 2),
            lambda bias: bias[0, 0].fill_(9),
        ],
        ids=["in_place", "through_data", "replaced_data", "through_a_view"],
    )
    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_a_change_of_the_table_is_noticed(self, mode, change):
        inputs = make_inputs(self.case)
        with mode():
            bias = torch.nn.Parameter(inputs["bias"].clone())
            self.run(inputs, bias)
            change(bias)
            torch.testing.assert_close(self.run(inputs, bias), self.expected(inputs, bias))

    def test_every_grid_gets_its_own(self):
        bias = make_inputs(self.case)["bias"]
        for grid in ((14, 14), (15, 9), (14, 14)):
            inputs = make_inputs(Case(grid, (7, 7), heads=2))
            torch.testing.assert_close(self.run(inputs, bias), self.expected(inputs, bias))

    def test_those_of_inference_serve_training(self):
        inputs = make_inputs(self.case)
        with torch.inference_mode():
            self.run(inputs, inputs["bias"])
        assert_equal_but_for_rounding(
            run_case(self.case, inputs, "cpu"), run_case(self.case, inputs, "reference")
        )

    def test_they_go_with_the_table(self):
        inputs = make_inputs(self.case)
        bias = inputs.pop("bias").clone()
        number = len(cpu._known_masks)
        self.run(inputs, bias)
        assert len(cpu._known_masks) == number + 1
        del bias
        gc.collect()
        assert len(cpu._known_masks) == number

    def test_large_ones_are_not_kept(self):
        inputs = make_inputs(Case((40, 400), (7, 7), has_bias=True, heads=8, head_dim=2))
        self.run(inputs, inputs["bias"])
        assert inputs["bias"] not in cpu._known_masks


@pytest.mark.parametrize(
    ("shape", "dtype", "device", "reason"),
    [
        ((1, 4, 4, 4, 1, 2), torch.float32, "cpu", "1-D and 2-D"),
        ((1, 4, 4, 1, 2), torch.float8_e4m3fn, "cpu", "float8_e4m3fn"),
        ((1, 4, 4, 1, 2), torch.float32, "meta", "meta"),
    ],
)
def test_it_says_why_it_cannot(shape, dtype, device, reason):
    tensor = torch.empty(shape, dtype=dtype, device=device)
    axes = len(shape) - 3
    neighborhood = Neighborhood((3,) * axes, (1,) * axes, (1,) * axes, (False,) * axes)
    assert reason in cpu.why_not(tensor, tensor, tensor, None, None, None, neighborhood)


def test_it_takes_every_dtype_it_names():
    tensor = torch.ones(1, 5, 6, 2, 4)
    neighborhood = Neighborhood((3, 3), (1, 1), (1, 1), (False, False))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        tensors = (tensor.to(dtype),) * 3
        assert cpu.why_not(*tensors, None, None, None, neighborhood) is None
        out, lse = cpu.forward(*tensors, None, None, None, neighborhood, 1.0)
        assert out.dtype == dtype
        assert lse.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(out, tensors[0])

"""The benchmark of operators: its peers compute the definition, its shapes are the models'.

Times themselves are never asserted.
"""

import csv
import dataclasses
import json
import math
import shlex
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.flop_counter import FlopCounterMode

from densezoo.backbones import list_backbones
from densezoo.kernels import neighborhood_attention
from densezoo.tools import bench_kernels, neighborhood_peers, polyline_peers, routing_peers
from densezoo.tools.bench_kernels import OPERATORS, OURS, Ceilings, Plan, measure, select_shapes
from densezoo.tools.bench_setup import Setup
from densezoo.tools.cli import build_parser, main
from densezoo.tools.kernel_shapes import (
    NeighborhoodShape,
    PolylineShape,
    RoutingShape,
    Run,
    list_neighborhood_runs,
    list_neighborhood_shapes,
)
from densezoo.tools.neighborhood_peers import NeighborhoodCase, window_keys
from densezoo.tools.operator_cases import SAMPLES, DeclinedError
from densezoo.tools.polyline_peers import PolylineCase
from densezoo.tools.routing_peers import RoutingCase
from densezoo.tools.step_memory import measure_peak

CASES = Path(__file__).parents[1] / "data" / "parity" / "ops" / "na2d.json"
NAME = "neighborhood_attention"
ROUTING = "routing_attention"
POLYLINE = "polyline_attention"
CEILINGS = Ceilings(flops=1e11, bytes=1e10)

# Maps that are not square, dilations that don't divide them, an axis of two blocks and a bit.
ODD_SHAPES = [
    NeighborhoodShape(size, num_heads=2, head_dim=16, kernel_size=kernel_size, dilation=dilation)
    for size, kernel_size, dilation in [
        ((7, 7), 7, 1),
        ((5, 9), 3, 1),
        ((11, 8), 3, 2),
        ((23, 15), 7, 2),
        ((13, 10), 3, 3),
        ((22, 29), 11, 2),
    ]
]


# Regions that divide the map and that reach beyond it, wholly padded ones among them.
ROUTED_SHAPES = [
    RoutingShape(size, 2, 16, num_regions, region_size, topk)
    for size, num_regions, region_size, topk in [
        ((8, 12), (4, 4), (2, 3), 2),
        ((13, 10), (4, 4), (4, 3), 16),
        ((9, 21), (4, 4), (3, 6), 3),
        ((9, 8), (4, 4), (3, 2), 3),
        ((13, 11), (5, 6), (3, 2), 4),
    ]
]


# All forms, and maps of one row.
MASKED_SHAPES = [
    PolylineShape(size, 2, 16, form, paths)
    for size, form, paths in [
        ((5, 7), "full", "both"),
        ((9, 4), "full", "row_first"),
        ((5, 7), "axial", "both"),
        ((9, 4), "axial", "row_first"),
        ((1, 6), "full", "both"),
        ((1, 6), "axial", "both"),
    ]
]

WAYS = {
    NeighborhoodShape: (NeighborhoodCase, neighborhood_peers),
    RoutingShape: (RoutingCase, routing_peers),
    PolylineShape: (PolylineCase, polyline_peers),
}


def named(shapes):
    return pytest.mark.parametrize("shape", shapes, ids=lambda shape: shape.name)


def make_case(shape, *, batch=2, dtype=torch.float32, has_bias=True, memory_limit=2**30, **kwargs):
    case, _ = WAYS[type(shape)]
    return case(shape, batch, dtype, torch.device("cpu"), has_bias, memory_limit, **kwargs)


def peers_of(shape):
    return WAYS[type(shape)][1]


def list_makers(shape, without=("make_flex", "make_natten")):
    """List what makes the peers of a shape, ours included, but for those that are compiled."""
    operator = next(ways for ways in OPERATORS.values() if ways.make_case is type(make_case(shape)))
    return [make for make in operator.peers.values() if make.__name__ not in without]


def list_windows():
    windows = json.loads(CASES.read_text())["windows"]
    return [case for case in windows if case["stride"] == 1 and not case["causal"]]


def name_window(case):
    return f"{case['length']}-k{case['kernel']}-d{case['dilation']}"


@pytest.mark.parametrize("window", list_windows(), ids=name_window)
def test_windows_and_masks_are_those_of_the_published_examples(window):
    length, kernel_size, dilation = (window[key] for key in ("length", "kernel", "dilation"))
    keys = torch.tensor(window["keys"])
    assert torch.equal(window_keys(length, kernel_size, dilation), keys)
    is_seen = torch.zeros(length, length).scatter(1, keys, 1).bool()
    shape = NeighborhoodShape((length, length), 1, 8, kernel_size, dilation)
    mask = make_dense_mask(shape)
    assert torch.equal(mask, torch.kron(is_seen, is_seen))


def make_dense_mask(shape):
    tokens = torch.arange(shape.num_tokens)
    mask_mod = neighborhood_peers.make_mask_mod(shape)
    zero = torch.zeros((), dtype=torch.long)
    return mask_mod(zero, zero, tokens[:, None], tokens[None])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@named(ODD_SHAPES)
def test_flex_attentions_mask_and_scores_give_the_reference(shape):
    case = make_case(shape, dtype=torch.float64)
    query, key, value, bias = case.inputs
    wanted = neighborhood_attention(
        query,
        key,
        value,
        shape.kernel_size,
        dilation=shape.dilation,
        bias=bias,
        backend="reference",
    )
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (query, key, value))
    block_mask = neighborhood_peers.make_window_blocks(shape, case.device)
    score_mod = neighborhood_peers.make_score_mod(shape, bias)
    out = flex_attention(q, k, v, score_mod=score_mod, block_mask=block_mask)
    out = out.transpose(1, 2).unflatten(1, shape.size)
    assert torch.allclose(out, wanted, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@named(ROUTED_SHAPES + MASKED_SHAPES)
def test_flex_attention_by_regions_and_by_paths_is_the_definition(shape, monkeypatch):
    peers = peers_of(shape)
    monkeypatch.setattr(peers, "compile_flex", lambda case, num_pairs: flex_attention)
    case = make_case(shape, dtype=torch.float64)
    assert case.measure_error(peers.make_flex(case, False), False) < 1e-12


@named([NeighborhoodShape((20, 40), 1, 16, 7, 1), NeighborhoodShape((40, 20), 1, 16, 5, 3),
        NeighborhoodShape((16, 16), 1, 16, 16, 1), RoutingShape((24, 40), 1, 16, (4, 5), (6, 8), 3),
        RoutingShape((64, 64), 1, 16, (4, 4), (16, 16), 1)])  # fmt: skip
def test_block_masks_are_those_that_pytorch_makes_of_all_pairs(shape):
    if isinstance(shape, RoutingShape):
        case = make_case(shape, batch=2)
        block_mask, mask_mod = (
            routing_peers.make_region_blocks(case),
            routing_peers.make_mask_mod(case),
        )
        batch = 2
    else:
        block_mask = neighborhood_peers.make_window_blocks(shape, torch.device("cpu"))
        mask_mod, batch = neighborhood_peers.make_mask_mod(shape), None
    count = shape.num_tokens
    wanted = create_block_mask(mask_mod, batch, None, count, count, device="cpu")
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
        assert torch.equal(getattr(block_mask, name), getattr(wanted, name)), name
    assert block_mask.seq_lengths == wanted.seq_lengths


@named(ODD_SHAPES + ROUTED_SHAPES + MASKED_SHAPES)
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "plain"])
def test_peers_are_the_definition_with_their_gradients(shape, has_bias):
    case = make_case(shape, dtype=torch.float64, has_bias=has_bias)
    makers = list_makers(shape)
    assert len(makers) == 3
    for make in makers:
        for is_training in (False, True):
            error = case.measure_error(make(case, is_training), is_training)
            assert error < 1e-12, make.__name__


@named(MASKED_SHAPES[:4])
def test_decays_stay_in_float32_beside_half_precision(shape):
    case = make_case(shape, dtype=torch.bfloat16)
    decays = case.further_maps or case.fixed_decays
    assert [x.dtype for x in decays] == [torch.float32] * 2
    for make in list_makers(shape):
        for is_training in (False, True):
            assert case.measure_error(make(case, is_training), is_training) < 5e-2


@pytest.mark.slow
@named(ODD_SHAPES[2:4] + ROUTED_SHAPES[2:3] + MASKED_SHAPES[:4])
def test_compiled_flex_attention_is_the_definition(shape):
    case = make_case(shape)
    assert case.measure_error(peers_of(shape).make_flex(case, False), False) < 1e-5


def test_large_maps_are_checked_at_their_corners_and_all_over():
    case = make_case(NeighborhoodShape((40, 50), 1, 8, 3, 2))
    queries = case._exact[0]
    assert len(queries) == SAMPLES
    assert {0, 49, 1950, 1999} <= set(queries.tolist())
    assert queries.float().mean() == pytest.approx(1000, rel=0.1)


def test_wrong_peers_are_reported_and_not_timed(monkeypatch):
    def cut_windows(case, is_training):  # at borders, windows end with the map
        tokens = torch.arange(case.shape.size[0])
        near = (tokens[:, None] - tokens[None]).abs() <= case.shape.kernel_size // 2
        mask = torch.kron(near, near)

        def forward(query, key, value):
            q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (query, key, value))
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
            return out.transpose(1, 2).unflatten(1, case.shape.size)

        return forward

    def forget_keys(case, is_training):
        ours = neighborhood_peers.make_ours(case, is_training)
        return lambda query, key, value: ours(query, key.detach() + 0 * key, value)

    def give_nan(case, is_training):
        return lambda query, key, value: query * math.nan + key + value

    peers = {OURS: neighborhood_peers.make_ours}
    peers |= {"cut": cut_windows, "detached": forget_keys, "nan": give_nan}
    replaced = dataclasses.replace(OPERATORS[NAME], peers=peers)
    monkeypatch.setitem(bench_kernels.OPERATORS, NAME, replaced)
    shapes = {NeighborhoodShape((9, 9), 2, 8, 3, 1): ("none",)}
    forward, training = measure(NAME, shapes, Plan(Setup(), has_bias=False, rounds=3), CEILINGS)
    assert [row["status"][:5] for row in forward] == ["timed", "wrong", "timed", "wrong"]
    assert [row["status"][:5] for row in training] == ["timed", "wrong", "wrong", "wrong"]
    for row in forward + training:
        assert (row["median_ms"] is None) == row["status"].startswith("wrong")


def test_peers_that_need_more_memory_or_have_no_backward_pass_are_declined():
    shapes = (
        NeighborhoodShape((64, 64), 1, 8, 3, 1),
        RoutingShape((64, 64), 1, 8, (8, 8), (8, 8), 9),
        PolylineShape((32, 32), 1, 8, "full", "both"),
        PolylineShape((64, 64), 1, 8, "axial", "row_first"),
    )
    for shape in shapes:
        case, peers = make_case(shape, memory_limit=2**20), peers_of(shape)
        for make in list_makers(shape, without=("make_ours", "make_flex", "make_natten")):
            with pytest.raises(DeclinedError, match="GiB, the limit is"):
                make(case, False)
        with pytest.raises(DeclinedError, match="no backward pass on the CPU"):
            peers.make_flex(case, True)


@named(
    [
        RoutingShape((32, 32), 2, 32, (4, 4), (8, 8), 4),
        PolylineShape((16, 20), 2, 16, "full", "both"),
        PolylineShape((48, 56), 2, 16, "axial", "both"),
    ]
)
def test_memory_that_peers_are_said_to_need_is_about_what_they_take(shape):
    for make in list_makers(shape, without=("make_ours", "make_flex")):
        for is_training in (False, True):
            case = make_case(shape)
            step = bench_kernels._make_step(make(case, is_training), case, is_training)
            step()
            taken = int(2**20 * measure_peak(step, case.device))
            make(make_case(shape, memory_limit=2 * taken), is_training)
            with pytest.raises(DeclinedError, match="GiB, the limit is"):
                make(make_case(shape, memory_limit=taken // 2), is_training)


@pytest.mark.parametrize(
    ("shape", "others", "index", "softmaxes"),
    [
        (NeighborhoodShape((9, 14), 2, 16, 3, 2), 2 * 5 * 5 * 4, 0, 1),
        (RoutingShape((9, 14), 2, 16, (4, 4), (3, 4), 3), 2 * 2 * 16 * 4, 2 * 16 * 3 * 8, 1),
        (PolylineShape((9, 14), 2, 16, "full", "both"), 2 * 2 * 9 * 14 * 2 * 4, 0, 2),
        (PolylineShape((9, 14), 2, 16, "full", "row_first"), 0, 2 * 4, 1),
        (PolylineShape((9, 14), 2, 16, "axial", "both"), 2 * 2 * 9 * 14 * 2 * 4, 0, 2),
        (PolylineShape((9, 14), 2, 16, "axial", "row_first"), 0, 2 * 4, 2),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_flops_are_those_of_pytorchs_counter_and_bytes_those_of_the_tensors(
    shape, others, index, softmaxes
):
    case = make_case(shape, backend="cpu")
    leaves = [x.detach().requires_grad_() for x in case.inputs]
    forward = peers_of(shape).make_ours(case, True)
    for is_training in (False, True):
        with FlopCounterMode(display=False) as counter:
            out = forward(*leaves)
            if is_training:
                torch.autograd.grad(out, leaves, case.grad_out)
        assert case.count_flops(is_training) == counter.get_total_flops()
    tokens, denominators = 2 * 9 * 14 * 32 * 4, softmaxes * 2 * 9 * 14 * 2 * 4
    assert case.count_bytes(False) == 4 * tokens + others + index
    assert case.count_bytes(True) == 12 * tokens + 3 * others + 2 * denominators + 2 * index


@pytest.fixture(scope="module")
def shapes():
    """All published shapes with their runs."""
    return select_shapes([NAME], ["all"])[NAME]


def test_every_model_is_there_at_the_size_of_its_weights_and_at_those_of_dense_recipes(shapes):
    runs = {run for names in shapes.values() for run in names}
    models = [name for name in list_backbones() if name.startswith(("nat_", "dinat_"))]
    assert len(models) == 20  # 4 NAT, 7 DiNAT, 5 DiNAT_s and 4 isotropic
    for name in models:
        side = 384 if "384" in name else 224
        assert f"{name}@{side}x{side}" in runs
        if side == 224 and "isotropic" not in name:
            suffix = ":coco" if name.startswith("dinat") else ""
            assert f"{name}@800x1333{suffix}" in runs
            suffix = ":ade20k" if name.startswith("dinat") else ""
            size = "640x640:ade20k_640" if name.endswith("large") else f"512x512{suffix}"
            assert {f"{name}@{size}", f"{name}@512x672"} <= runs
    assert "dinat_large@640x640:mask2former" in runs


# Of each stage: height, width, heads, dilations.
STAGES = {
    "nat_small@224x224": [
        (56, 56, 3, {1}), (28, 28, 6, {1}), (14, 14, 12, {1}), (7, 7, 24, {1}),
    ],
    "dinat_mini@512x672": [
        (128, 168, 2, {1, 8}), (64, 84, 4, {1, 4}), (32, 42, 8, {1, 2}), (16, 21, 16, {1}),
    ],
    "dinat_base@800x1333:coco": [
        (200, 334, 4, {1, 28}), (100, 167, 8, {1, 7, 14}), (50, 84, 16, {1, 3, 5, 7}),
        (25, 42, 32, {1, 3}),
    ],
    "dinat_s_small@800x1333:coco": [
        (200, 334, 3, {1, 28}), (100, 167, 6, {1, 14}), (50, 84, 12, {1, 3, 5, 7}),
        (25, 42, 24, {1, 3}),
    ],
    "dinat_tiny@512x512:ade20k": [
        (128, 128, 2, {1, 16}), (64, 64, 4, {1, 4, 8}), (32, 32, 8, {1, 2, 3, 4}),
        (16, 16, 16, {1, 2}),
    ],
    "dinat_s_large_384@384x384": [
        (96, 96, 6, {1, 13}), (48, 48, 12, {1, 6}), (24, 24, 24, {1, 3}), (12, 12, 48, {1}),
    ],
    "dinat_isotropic_small@224x224": [(14, 14, 12, {1, 2})],
}  # fmt: skip
STAGES_OF_11 = {
    "dinat_large_384_11x11@384x384": [
        (96, 96, 6, {1, 8}), (48, 48, 12, {1, 4}), (24, 24, 24, {1, 2}), (12, 12, 48, {1}),
    ],
    "dinat_large@640x640:mask2former": [
        (160, 160, 6, {1, 14}), (80, 80, 12, {1, 4, 7}), (40, 40, 24, {1, 2, 3}),
        (20, 20, 48, {1}),
    ],
}  # fmt: skip


@pytest.mark.parametrize("run", [*STAGES, *STAGES_OF_11])
def test_shapes_of_a_run_are_its_stages_with_the_published_dilations(run, shapes):
    kernel_size = 11 if run in STAGES_OF_11 else 7
    wanted = {
        NeighborhoodShape((height, width), heads, 32, kernel_size, dilation)
        for height, width, heads, dilations in {**STAGES, **STAGES_OF_11}[run]
        for dilation in dilations
    }
    assert {shape for shape, names in shapes.items() if run in names} == wanted


def test_maps_that_are_smaller_than_the_windows_are_padded():
    run = next(run for run in list_neighborhood_runs() if run.name == "dinat_mini@224x224")
    small = dataclasses.replace(run, size=(160, 224))
    names = [shape.name for shape in list_neighborhood_shapes([small])]
    assert names[:4] == [
        "40x56-h2x32-k7-d1",
        "56x56-h2x32-k7-d8",
        "20x28-h4x32-k7-d1",
        "28x28-h4x32-k7-d4",
    ]


def test_shapes_are_selected_by_run_and_by_name(shapes):
    by_run = select_shapes([NAME], ["dinat_isotropic_small@*", "nat_isotropic_small@*"])[NAME]
    assert {shape.name: names for shape, names in by_run.items()} == {
        "14x14-h12x32-k7-d1": (
            "dinat_isotropic_small@224x224",
            "nat_isotropic_small@224x224",
        ),
        "14x14-h12x32-k7-d2": ("dinat_isotropic_small@224x224",),
    }
    by_name = select_shapes([NAME], ["14x14-h12x32-*"])[NAME]
    assert {shape.name for shape in by_name} == {shape.name for shape in by_run}
    assert all(names == shapes[shape] for shape, names in by_name.items())


# Of each stage: height, width, regions from top to bottom and left to right, a region's tokens.
ROUTED_STAGES = {
    "biformer_base@224x224": [(56, 56, 7, 7, 8, 8), (28, 28, 7, 7, 4, 4), (14, 14, 7, 7, 2, 2)],
    "biformer_base@800x1216:s16": [
        (200, 304, 16, 16, 13, 19), (100, 152, 16, 16, 7, 10), (50, 76, 16, 16, 4, 5),
    ],
    "biformer_stl_nchw@800x1216:s16": [
        (200, 304, 17, 16, 12, 19), (100, 152, 17, 17, 6, 9), (50, 76, 17, 19, 3, 4),
    ],
}  # fmt: skip


def test_shapes_of_routing_attention_are_the_stages_of_its_runs_in_both_forms():
    shapes = select_shapes([ROUTING], list(ROUTED_STAGES))[ROUTING]
    for run, stages in ROUTED_STAGES.items():
        wanted = [
            RoutingShape(tuple(size), heads, 32, tuple(regions), tuple(region_size), topk)
            for (*size, a, b, c, d), heads, topk in zip(stages, (3, 6, 12), (1, 4, 16), strict=True)
            for regions, region_size in [((a, b), (c, d))]
        ]
        assert [shape for shape, names in shapes.items() if run in names] == wanted


MASKED_STAGES = {
    "ppma_tiny@800x1216": [
        (200, 304, 4, 16, "axial"), (100, 152, 4, 32, "axial"), (50, 76, 8, 32, "full"),
        (25, 38, 16, 32, "full"),
    ],
    "ppma_base@224x224": [
        (56, 56, 5, 16, "axial"), (28, 28, 5, 32, "axial"), (14, 14, 10, 32, "axial"),
        (7, 7, 16, 32, "full"),
    ],
    "rmt_tiny@1024x1024:square": [
        (256, 256, 4, 16, "axial"), (128, 128, 4, 32, "axial"), (64, 64, 8, 32, "full"),
        (32, 32, 16, 32, "full"),
    ],
}  # fmt: skip


def test_shapes_of_polyline_attention_are_the_stages_of_its_runs():
    shapes = select_shapes([POLYLINE], list(MASKED_STAGES))[POLYLINE]
    for run, stages in MASKED_STAGES.items():
        paths = "row_first" if run.startswith("rmt") else "both"
        wanted = [PolylineShape(stage[:2], *stage[2:], paths) for stage in stages]
        assert [shape for shape, names in shapes.items() if run in names] == wanted
    names = {shape.name for shape in shapes}
    assert {"200x304-h4x16-axial-p2", "64x64-h8x32-full-p1"} < names
    squares = select_shapes([POLYLINE], ["ppma_tiny@*:square"])[POLYLINE]
    sides = sorted(shape.size[0] for shape in squares if shape.name.endswith("-h4x16-axial-p2"))
    assert (sides[0], sides[-1]) == (224 // 4, 1024 // 4) and len(sides) == 7


def test_operators_are_selected_by_what_is_asked_for():
    runs = ["dinat_isotropic_small@224x224", "biformer_tiny@224x224"]
    selected = select_shapes([NAME, ROUTING], runs)
    assert {key: [shape.name for shape in shapes] for key, shapes in selected.items()} == {
        NAME: ["14x14-h12x32-k7-d1", "14x14-h12x32-k7-d2"],
        ROUTING: ["56x56-h2x32-s7-k1", "28x28-h4x32-s7-k4", "14x14-h8x32-s7-k16"],
    }
    assert select_shapes([NAME, ROUTING], runs[1:]) == {ROUTING: selected[ROUTING]}
    default = select_shapes([NAME, ROUTING], [])
    assert list(default) == [NAME, ROUTING] and default[ROUTING] == selected[ROUTING]


def read_rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Arguments and rows of one run of the command."""
    path = tmp_path_factory.mktemp("bench") / "rows.csv"
    argv = "bench-kernels neighborhood_attention --shapes dinat_isotropic_small@* --repeats 3"
    argv = f"{argv} --vs sdpa gather natten --device cpu".split()
    threads = torch.get_num_threads()
    assert main([*argv, "--out", str(path)]) == 0
    assert torch.get_num_threads() == threads
    return argv, read_rows(path)


def test_rows_are_ours_then_the_peers_for_each_shape_and_pass(result):
    assert [(row["shape"], row["pass"], row["peer"]) for row in result[1]] == [
        (f"14x14-h12x32-k7-d{dilation}", name, peer)
        for dilation in (1, 2)
        for name in ("forward", "forward+backward")
        for peer in ("ours", "gather", "sdpa", "natten")
    ]
    for row in result[1]:
        assert (row["operator"], row["runs"]) == (NAME, "dinat_isotropic_small@224x224")
        assert row["backend"] == ("cpu" if row["peer"] == OURS else "")


def test_rows_hold_ordered_percentiles_ratios_memory_and_the_share_of_the_floor(result):
    for row in result[1]:
        if row["peer"] == "natten":
            assert row["status"].startswith("declined: ") and row["median_ms"] == ""
            continue
        assert row["status"] == "timed" and float(row["error"]) < 1e-5
        assert (row["rounds"], row["warmup"]) == ("3", "3")
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert float(row["x_ours"]) == 1 or row["peer"] != OURS
        flops, ceiling = int(row["flops"]), float(row["matmul_gflops_per_s"])
        assert float(row["floor_ms"]) >= 0.99 * flops / ceiling / 1e6
        share = float(row["floor_ms"]) / float(row["median_ms"])
        assert float(row["floor_share"]) == pytest.approx(share, rel=0.01, abs=1e-4)
        tokens = 14 * 14 * 12 * 32 * 4 / 2**20
        results = tokens if row["pass"] == "forward" else 4 * tokens
        assert float(row["memory_mib"]) >= 0.99 * results


def test_rows_say_machine_versions_and_the_command_that_repeats_them(result):
    argv, rows = result
    for row in rows:
        assert row["device"] and row["date"] and row["densezoo"]
        assert (row["torch"], row["dtype"], row["layout"]) == (
            torch.__version__,
            "float32",
            "contiguous",
        )
        assert (row["batch"], row["threads"], row["bias"]) == ("1", "1", "True")
        program, *words = shlex.split(row["command"])
        parse = build_parser("bench-kernels").parse_args
        assert program == "densezoo" and parse(words) == parse(argv)


def test_tables_and_a_summary_of_operators_are_printed_in_bfloat16_without_bias_too(capfd):
    shapes = "14x14-h12x32-k7-d2", "14x14-h8x32-s7-k16"
    argv = f"bench-kernels {NAME} {ROUTING} --shapes {' '.join(shapes)} --vs gather sdpa natten"
    argv += " --no-bias --dtype bfloat16 --repeats 3 --device cpu --passes forward"
    assert main(argv.split()) == 0
    lines = capfd.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("shape "))
    legends = [OPERATORS[name].legend for name in (NAME, ROUTING)]
    assert lines[start - 1].split(", ") == legends
    assert lines[start].split() == [name for name, _ in bench_kernels.COLUMNS]
    assert lines[start + 1].split()[:4] == [shapes[0], "fwd", "ours", "(cpu)"]
    assert [line.split()[2] for line in lines[start + 2 : start + 5]] == [
        "gather",
        "sdpa",
        "natten",
    ]
    assert lines[start + 5].split()[:4] == [shapes[1], "fwd", "ours", "(cpu)"]
    assert [line.split()[2] for line in lines[start + 6 : start + 8]] == ["gather", "sdpa"]
    assert [line.split(" takes ")[0] for line in lines[start + 8 :]] == [
        f"{name}, forward: {peer}" for name in (NAME, ROUTING) for peer in ("gather", "sdpa")
    ]


def test_times_are_fitted_to_a_power_of_tokens_over_maps_of_a_shape_pass_and_peer():
    def rows_of(peer, sizes, time):
        return [
            {
                "operator": POLYLINE,
                "shape": f"{size}x{size}-h2x8-full-p2",
                "pass": "forward",
                "peer": peer,
                "tokens": size**2,
                "median_ms": time(size**2),
            }
            for size in sizes
        ]

    rows = rows_of("ours", (5, 10, 20), lambda tokens: 3e-3 * tokens**1.5)
    rows += rows_of("masks", (5, 10, 20, 40), lambda tokens: tokens**2 if tokens < 900 else None)
    rows += rows_of("sdpa", (5, 10), lambda tokens: tokens)
    lines = bench_kernels.fit_times(rows)
    assert [row["exponent"] for row in rows] == [1.5] * 3 + [2.0] * 4 + [None] * 2
    assert lines == [
        f"{POLYLINE} h2x8-full-p2, forward: {peer} takes time as tokens^{power} over 3 maps of 25 "
        "to 400 tokens (each within a factor of 1.00)"
        for peer, power in (("ours", "1.50"), ("masks", "2.00"))
    ]


def test_exponents_of_each_form_are_printed_and_written(tmp_path, capfd, monkeypatch):
    runs = [Run("ppma_tiny", (side, side)) for side in (64, 96, 128)]
    replaced = dataclasses.replace(OPERATORS[POLYLINE], list_runs=lambda: runs)
    monkeypatch.setitem(bench_kernels.OPERATORS, POLYLINE, replaced)
    # What other tests measure, and takes most of the time.
    monkeypatch.setattr(bench_kernels, "measure_ceilings", lambda setup: CEILINGS)
    monkeypatch.setattr(bench_kernels, "measure_peak", lambda step, device: 0.0)
    argv = f"bench-kernels {POLYLINE} --fit --shapes ppma_tiny@* --vs masks --passes forward"
    argv += f" --repeats 3 --device cpu --out {tmp_path / 'rows.csv'}"
    assert main(argv.split()) == 0
    rows = read_rows(tmp_path / "rows.csv")
    assert all("--fit" in shlex.split(row["command"]) for row in rows)
    assert [row["tokens"] for row in rows[:8:2]] == ["256", "64", "16", "4"]
    lines = [line for line in capfd.readouterr().out.splitlines() if "tokens^" in line]
    forms = ("h4x16-axial-p2", "h4x32-axial-p2", "h8x32-full-p2", "h16x32-full-p2")
    groups = [(form, peer) for form in forms for peer in ("ours", "masks")]
    for line, (form, peer) in zip(lines, groups, strict=True):
        (exponent,) = {
            row["exponent"] for row in rows if row["shape"].endswith(form) and row["peer"] == peer
        }
        start, _, rest = line.partition("^")
        assert start == f"{POLYLINE} {form}, forward: {peer} takes time as tokens"
        # Printed with two digits, written with three.
        assert float(rest.split()[0]) == pytest.approx(float(exponent), abs=0.0056)


def test_shapes_are_listed_with_their_runs(capfd):
    assert main("bench-kernels --list --shapes dinat_isotropic_base@*".split()) == 0
    assert capfd.readouterr().out.splitlines() == [
        "14x14-h24x32-k7-d1        dinat_isotropic_base@224x224",
        "14x14-h24x32-k7-d2        dinat_isotropic_base@224x224",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("neighbourhood_attention", "routing_attention, polyline_attention is taken"),
        ("polyline_attention --fit", "--fit takes at least 3 shapes that differ in their maps"),
        ("--shapes dinat_mimi@*", "--shapes 'dinat_mimi@*' matches no shape"),
        ("routing_attention --shapes 56x56-h3x31-k7-d1", "'56x56-h3x31-k7-d1' matches no shape"),
        ("--vs flax", "'flax': one of flex, gather, masks, natten, sdpa is taken"),
        ("--passes backward", "'backward': one of forward, forward+backward is taken"),
        ("--backend cuda", "backend is 'cuda': one of triton, cpu, reference is taken"),
        ("--dtype float64", "float32, bfloat16, float16"),
        ("--device nonsense", "device 'nonsense' cannot be used"),
        ("--batch 0", "batch is 0"),
        ("--threads 0", "threads is 0"),
        ("--repeats 2", "at least 3 alternations"),
        ("--seconds 0", "seconds is 0.0"),
        ("--memory nan", "memory is nan"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_measured_or_written(
    arguments, message, tmp_path, capfd
):
    path = tmp_path / "rows.csv"
    assert main(["bench-kernels", *arguments.split(), "--out", str(path)]) == 1
    out, err = capfd.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and message in err
    assert not path.exists()


def test_a_backend_that_cannot_run_here_is_a_mistake_and_leaves_no_file(
    tmp_path, capfd, monkeypatch
):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    path = tmp_path / "rows.csv"
    argv = "bench-kernels --backend triton --device cpu --repeats 3 --out".split()
    assert main([*argv, str(path)]) == 1
    err = capfd.readouterr().err
    assert "backend='triton' cannot run" in err and len(err.splitlines()) == 1
    assert not path.exists()


def test_a_file_that_is_there_is_left_as_it_was(tmp_path, capfd):
    path = tmp_path / "rows.csv"
    path.write_text("kept")
    assert main(["bench-kernels", "--out", str(path)]) == 1
    assert "is there already" in capfd.readouterr().err
    assert path.read_text() == "kept"


def test_an_unwritable_file_is_found_before_the_measuring(tmp_path, capfd):
    assert main(["bench-kernels", "--out", str(tmp_path / "none" / "rows.csv")]) == 1
    err = capfd.readouterr().err
    assert "cannot be written" in err and len(err.splitlines()) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_all_peers_that_are_there_are_timed_on_a_gpu(tmp_path):
    path = tmp_path / "rows.csv"
    argv = "bench-kernels --shapes dinat_isotropic_small@* --device cuda --dtype float16 --out"
    assert main([*argv.split(), str(path)]) == 0
    for row in read_rows(path):
        assert row["status"] == "timed" or row["peer"] == "natten", row
        assert row["device"] == torch.cuda.get_device_name()
        assert row["backend"] == ("triton" if row["peer"] == OURS else "")

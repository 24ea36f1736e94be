"""The CPU path of polyline attention: every cut into blocks, what is kept, precision, memory."""

import pytest
import torch
from operator_cases import assert_within_budget
from oracles import PeakMemory
from polyline_cases import ODD_CASES, TENSORS, Case, make_inputs, random_cases, run_case, run_oracle

from densezoo.kernels.polyline_attention import cpu, cpu_axial, cpu_full
from densezoo.kernels.polyline_attention.decays import Polyline
from densezoo.kernels.polyline_attention.reference import polyline_attention_reference

# Of published models at 224, with fewer heads: the last two stages and the first.
PUBLISHED_CASES = [
    Case((14, 14), heads=3, head_dim=32, decay=0.1),
    Case((7, 7), heads=4, head_dim=32, batch=2, decay=0.1),
    Case((14, 14), "axial", heads=3, head_dim=32, decay=0.1),
    Case((28, 28), "axial", heads=2, head_dim=16, decay=0.1),
    Case((14, 14), "full", "row_first", heads=2, head_dim=32, decay=0.1),
]
KINDS = {
    "full": Case((7, 9), batch=3, heads=3, value_dim=5),
    "full, row first": Case((9, 7), "full", "row_first", batch=2, heads=3),
    "full, long rows": Case((4, 33), batch=2),
    "axial, wide": Case((7, 19), "axial", batch=3, heads=3, value_dim=5),
    "axial, tall": Case((19, 7), "axial", batch=2),
    "axial, row first": Case((18, 17), "axial", "row_first", batch=2),
    "a row": Case((1, 23), batch=2),
    "a column": Case((23, 1), batch=2),
}


@pytest.fixture
def force(monkeypatch):
    """A function that sets the sizes of blocks, of groups of heads and of what is kept."""

    def force(block=None, group=None, most_kept=None):
        for module, name, size in (
            (cpu_full, "BLOCK", block),
            (cpu_axial, "BLOCK", block),
            (cpu_axial, "GROUP", group),
            (cpu_axial, "MOST_KEPT", most_kept),
        ):
            if size is not None:
                monkeypatch.setattr(module, name, size)

    return force


def run_path(path, case, inputs):
    """Output and log-sum-exp, as a path itself gives them."""
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    return path(*(inputs[name] for name in TENSORS), Polyline(case.form, case.paths), scale)


def assert_equal_but_for_rounding(actual, expected):
    """Hold float64 results to 1000 roundings of the largest value of each, or of the inputs.

    Those are about 1; gradients of queries with a single key are 0.
    """
    assert actual.keys() == expected.keys()
    for name, truth in expected.items():
        truth = torch.as_tensor(truth)
        limit = 1000 * torch.finfo(torch.float64).eps * max(1.0, float(truth.abs().max()))
        torch.testing.assert_close(actual[name], truth, rtol=0, atol=limit, msg=name)


def assert_equals_reference(case, inputs=None):
    """Hold results, gradients and the log-sum-exp to the reference."""
    inputs = make_inputs(case) if inputs is None else inputs
    assert_equal_but_for_rounding(
        run_case(case, inputs, "cpu"), run_case(case, inputs, "reference")
    )
    names = ("out", "lse")
    assert_equal_but_for_rounding(
        dict(zip(names, run_path(cpu.forward, case, inputs), strict=True)),
        dict(zip(names, run_path(polyline_attention_reference, case, inputs), strict=True)),
    )


@pytest.mark.parametrize("case", ODD_CASES + random_cases(12, 3), ids=lambda case: case.id)
def test_odd_cases_equal_walks_along_paths(case):
    inputs = make_inputs(case)
    assert_equal_but_for_rounding(run_case(case, inputs, "cpu"), run_oracle(case, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ODD_CASES + PUBLISHED_CASES, ids=lambda case: case.id)
def test_error_is_at_most_twice_that_of_plain_pytorch(case, dtype):
    inputs, rounded = make_inputs(case), make_inputs(case, dtype)
    assert_within_budget(
        run_case(case, rounded, "cpu"),
        run_case(case, rounded, "reference"),
        run_case(case, inputs, "reference"),
    )


@pytest.mark.parametrize("most_kept", [0, 1 << 22], ids=["none_kept", "kept"])
@pytest.mark.parametrize("block", [30, 150, 1000, 8000])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_any_size_give_the_same(force, kind, block, most_kept):
    force(block, group=block, most_kept=most_kept)
    assert_equals_reference(KINDS[kind])


def test_sizes_of_blocks_cut_heads_rows_and_columns(force):
    case = KINDS["full"]
    shapes = set()
    for block in (30, 150, 1000, 8000):
        force(block)
        sums = make_inputs(case)["log_alpha"]
        for group in cpu_full._groups(make_inputs(case)["query"]):
            part = cpu_full._take(group, sums, torch.float64).contiguous()
            shapes.update(b.shape[:3] for b in cpu_full._blocks(part, part, "both"))
    # One query; columns of a row; rows; all queries of some heads, and of some images.
    assert {(1, 1, 1), (1, 1, 2), (1, 1, 9), (2, 7, 9)} <= shapes


@pytest.mark.parametrize("kind", ["full", "full, row first", "axial, wide", "axial, row first"])
def test_own_weights_that_underflow_leave_the_log_sum_exp_right(kind):
    case = Case(**{**vars(KINDS[kind]), "scale": 1.0})
    inputs = make_inputs(case)
    inputs["query"] = torch.ones_like(inputs["query"])
    inputs["key"] = torch.zeros_like(inputs["key"])
    inputs["key"][:, 1, 2] = -200.0  # logits of -1600 for all, and for this token itself
    assert_equals_reference(case, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["full", "axial, wide"])
def test_logits_of_thousands_stay_finite(kind, dtype):
    case = Case(**{**vars(KINDS[kind]), "scale": 1000.0, "decay": 40.0})
    results = run_case(case, make_inputs(case, dtype), "cpu")
    assert all(tensor.isfinite().all() for tensor in results.values())


@pytest.mark.parametrize("form", ["full", "axial"])
def test_gradients_of_ties_are_those_of_sums_of_decays(form):
    case = Case((5, 6), form, decay=0.0)
    inputs = make_inputs(case)
    results = run_case(case, inputs, "cpu")
    assert_equal_but_for_rounding(results, run_case(case, inputs, "reference"))
    assert results["grad_log_alpha"][:, :, 1:].abs().min() > 0
    assert not results["grad_log_alpha"][:, :, 0].any()
    assert not results["grad_log_beta"][:, 0].any()


@pytest.mark.parametrize(
    "relayout",
    [
        lambda t: t.clone(),
        lambda t: t.movedim(3, 1).clone().movedim(1, 3),
        lambda t: t.movedim(-1, 0).clone().movedim(0, -1),
        lambda t: torch.stack([t, t], dim=-1)[..., 1],
        lambda t: t.transpose(0, 1).clone().transpose(0, 1),
        lambda t: t[:1, :, :1].expand(t.shape),
    ],
    ids=["contiguous", "heads_first", "channels_first", "every_other", "rows_first", "expanded"],
)
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("kind", ["full", "axial, wide"])
def test_any_strides_give_the_same_and_inputs_are_left_as_they_are(kind, heads, relayout):
    case = Case(**{**vars(KINDS[kind]), "heads": heads, "batch": heads})
    others = {name: relayout(tensor) for name, tensor in make_inputs(case).items()}
    before = {name: tensor.clone() for name, tensor in others.items()}
    assert_equals_reference(case, others)
    assert all(torch.equal(others[name], before[name]) for name in others)


@pytest.mark.parametrize("kind", ["full", "axial, wide", "axial, row first"])
def test_gradients_of_decays_can_be_left_out(kind):
    case = KINDS[kind]
    inputs = make_inputs(case)
    tensors = [inputs[name] for name in TENSORS]
    geometry = Polyline(case.form, case.paths)
    out, lse = cpu.forward(*tensors, geometry, 1.0)
    arguments = inputs["grad_out"], *tensors, out, lse, geometry, 1.0
    needed, left_out = cpu.backward(*arguments, True), cpu.backward(*arguments, False)
    assert left_out[3:] == (None, None)
    assert all(torch.equal(one, other) for one, other in zip(needed[:3], left_out[:3], strict=True))


def test_what_is_kept_of_inference_serves_training_on_any_default_device():
    for kind in ("full", "axial, wide"):
        case = KINDS[kind]
        inputs = make_inputs(case)
        with torch.inference_mode(), torch.device("meta"):
            out, _ = run_path(cpu.forward, case, inputs)
        assert torch.equal(run_case(case, inputs, "cpu")["out"], out)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("form", ["full", "axial"])
def test_results_do_not_change_from_run_to_run(form, num_threads):
    case = Case((18, 15), form, heads=4, head_dim=16)
    inputs = make_inputs(case, torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = (run_case(case, inputs, "cpu") for _ in range(3))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(before)
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


@pytest.mark.parametrize("kind", ["full", "axial, wide", "a row"])
def test_images_of_a_batch_do_not_affect_each_other(kind):
    case = Case(**{**vars(KINDS[kind]), "batch": 3})
    inputs = make_inputs(case)
    alone = {name: tensor[1:2] for name, tensor in inputs.items()}
    for name in ("query", "key", "value"):
        inputs[name] = inputs[name].clone()
        inputs[name][::2] = float("nan")
    together, single = (run_case(case, tensors, "cpu") for tensors in (inputs, alone))
    for name in ("out", *(f"grad_{name}" for name in TENSORS)):
        torch.testing.assert_close(together[name][1:2], single[name])


def test_decays_keep_a_dtype_of_their_own():
    case = KINDS["full"]
    inputs = make_inputs(case, torch.bfloat16)
    for name in ("log_alpha", "log_beta"):
        inputs[name] = inputs[name].float()
    results = run_case(case, inputs, "cpu")
    assert results["out"].dtype == results["grad_query"].dtype == torch.bfloat16
    assert results["grad_log_alpha"].dtype == results["grad_log_beta"].dtype == torch.float32


def peaks(case):
    """Peak MiB of forward and of backward, each with its results, in float32."""
    inputs = make_inputs(case, torch.float32)
    tensors = [inputs[name] for name in TENSORS]
    arguments = Polyline(case.form, case.paths), 1.0
    with torch.no_grad(), PeakMemory() as forward:
        out, lse = cpu.forward(*tensors, *arguments)
    with torch.no_grad(), PeakMemory() as backward:
        cpu.backward(inputs["grad_out"], *tensors, out, lse, *arguments)
    return forward.peak / 2**20, backward.peak / 2**20


@pytest.mark.parametrize(
    ("form", "grid"),
    [
        ("full", (20, 31)),
        ("full", (32, 42)),
        ("full", (16, 96)),
        ("axial", (48, 64)),
        ("axial", (96, 64)),
    ],
)
def test_memory_is_that_of_blocks_and_of_the_map(force, form, grid):
    entries = 1 << 16
    force(entries, group=1, most_kept=entries)
    case = Case(grid, form, heads=4, head_dim=16)
    block = entries * 4 / 2**20
    map_size = make_inputs(case, torch.float32)["query"].nbytes / 2**20
    forward, backward = peaks(case)
    # Logits and the weights of two paths, or kept ones; out, lse and some maps of one head.
    assert forward < 5 * block + 3 * map_size
    # Their gradients; three gradients of the map and maps of one head.
    assert backward < 8 * block + 10 * map_size
    if form == "full":
        all_logits = 4 * (grid[0] * grid[1]) ** 2 * 4 / 2**20
        assert max(forward, backward) < all_logits / 2


@pytest.mark.parametrize(
    ("dtype", "device", "reason"),
    [
        (torch.float32, "meta", "it runs on CPU tensors, these are on meta"),
        (torch.complex64, "cpu", "it has no torch.complex64"),
    ],
)
def test_it_says_why_it_cannot(dtype, device, reason):
    tensor = torch.zeros(1, 4, 4, 1, 2, dtype=dtype, device=device)
    decays = tensor[..., 0]
    geometry = Polyline("full", "both")
    assert cpu.why_not(tensor, tensor, tensor, decays, decays, geometry) == reason

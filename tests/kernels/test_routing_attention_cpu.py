"""The CPU path of routing attention: both forms, every chunk, padded tokens, memory."""

import pytest
import torch
from operator_cases import assert_within_budget
from oracles import PeakMemory
from routing_cases import (
    ODD_CASES,
    PADS,
    TENSORS,
    Case,
    make_inputs,
    random_cases,
    run_case,
    run_oracle,
)

from densezoo.kernels.routing_attention import cpu, cpu_chunks
from densezoo.kernels.routing_attention.reference import routing_attention_reference
from densezoo.kernels.routing_attention.regions import cut

# Published models at 224: 14x14 in regions of 2x2, 28x28 in regions of 4x4.
PUBLISHED_CASES = [
    Case((14, 14), (7, 7), 16, heads=3, head_dim=32, batch=2),
    Case((28, 28), (7, 7), 4, heads=2, head_dim=32),
]
KINDS = {
    "whole": Case((12, 20), (4, 5), 4, batch=2),
    "repeats": Case((9, 12), (3, 4), 6, repeats=True),
    "ragged": Case((11, 13), (4, 4), 5, pads=PADS, batch=2, repeats=True),
    "zeros": Case((11, 14), (4, 5), 3, heads=3),
    "outside": Case((9, 10), (4, 7), 6, pads=PADS, batch=2, value_dim=11),
    "all outside": Case((3, 4), (9, 9), 2, pads=PADS, batch=2, value_dim=3),
}
# Regions without a token on the map are in chunks alone.
DENSE_KINDS = ("whole", "repeats", "ragged", "zeros")


@pytest.fixture
def force(monkeypatch):
    """A function that makes the path take a form, and chunks of some size."""

    def force(form=None, chunk=None):
        if form is not None:
            monkeypatch.setattr(cpu, "_is_dense", lambda *_: form == "dense")
        if chunk is not None:
            monkeypatch.setattr(cpu_chunks, "CHUNK", chunk)

    return force


def regions_of(case):
    return cut(case.grid, case.num_regions, case.region_size)


def is_dense(case):
    inputs = make_inputs(case)
    return cpu._is_dense(inputs["query"], inputs["value"], inputs["routes"], regions_of(case))


def run_forward(path, case, inputs):
    """Output and log-sum-exp, as the path itself gives them."""
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    return path(*(inputs[name] for name in TENSORS), regions_of(case), scale)


def assert_equal_but_for_rounding(actual, expected):
    """Hold float64 results to 1000 roundings of the largest value of each, or of the inputs.

    Those are about 1; gradients of queries with a single key are 0.
    """
    assert actual.keys() == expected.keys()
    for name, truth in expected.items():
        truth = torch.as_tensor(truth)
        limit = 1000 * torch.finfo(torch.float64).eps * max(1.0, float(truth.abs().max()))
        torch.testing.assert_close(actual[name], truth, rtol=0, atol=limit, msg=name)


@pytest.mark.parametrize("case", ODD_CASES + random_cases(25, 3), ids=lambda case: case.id)
def test_odd_cases_equal_loops_over_queries_and_keys(case):
    inputs = make_inputs(case)
    assert_equal_but_for_rounding(run_case(case, inputs, "cpu"), run_oracle(case, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ODD_CASES + PUBLISHED_CASES, ids=lambda case: case.id)
def test_error_is_at_most_twice_that_of_plain_pytorch(case, dtype):
    inputs, rounded = make_inputs(case), make_inputs(case, dtype)
    # The backward pass makes the weights from the log-sum-exp in float32 and subtracts the product
    # of cotangent and output: their roundings are in the gradients.
    lse = run_forward(routing_attention_reference, case, inputs)[1]
    slack = float(lse.abs().max()) * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps
    assert_within_budget(
        run_case(case, rounded, "cpu"),
        run_case(case, rounded, "reference"),
        run_case(case, inputs, "reference"),
        slack,
    )


@pytest.mark.parametrize("at_once", [1, 3, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_of_any_size_give_the_same(force, kind, at_once):
    case = KINDS[kind]
    regions = regions_of(case)
    channels = case.heads * (case.head_dim + case.value_dim)
    force("chunks", at_once * channels * case.topk * regions.area)
    routes = make_inputs(case)["routes"]
    counts = [c.count for c in cpu_chunks.chunks(routes, regions, case.grid, channels)]
    assert len(counts) > 1 and (at_once == 1 or max(counts) > 1)
    assert_equals_reference(case)


@pytest.mark.parametrize(
    ("kind", "form"),
    [*((kind, "chunks") for kind in KINDS), *((kind, "dense") for kind in DENSE_KINDS)],
)
def test_every_form_gives_the_same(force, kind, form):
    force(form)
    assert_equals_reference(KINDS[kind])


def assert_equals_reference(case):
    """Hold results, gradients and the log-sum-exp to the reference."""
    inputs = make_inputs(case)
    assert_equal_but_for_rounding(
        run_case(case, inputs, "cpu"), run_case(case, inputs, "reference")
    )
    names = ("out", "lse")
    assert_equal_but_for_rounding(
        dict(zip(names, run_forward(cpu.forward, case, inputs), strict=True)),
        dict(zip(names, run_forward(routing_attention_reference, case, inputs), strict=True)),
    )


@pytest.mark.parametrize(
    ("form", "case"),
    [
        ("dense", Case((14, 14), (7, 7), 16, heads=8, head_dim=32)),
        ("dense", Case((7, 7), (7, 7), 16, heads=12, head_dim=32)),
        ("chunks", Case((56, 56), (7, 7), 1, heads=2, head_dim=32)),
        ("chunks", Case((28, 28), (7, 7), 4, heads=4, head_dim=32)),
        ("chunks", Case((32, 42), (16, 16), 16, heads=8, head_dim=32)),
    ],
    ids=lambda value: value if isinstance(value, str) else value.id,
)
def test_small_maps_of_many_routes_are_dense(form, case):
    assert is_dense(case) == (form == "dense")


def test_regions_outside_of_the_map_and_masks_larger_than_keys_are_never_dense():
    assert is_dense(Case((7, 7), (7, 7), 16, head_dim=32))
    assert not is_dense(Case((7, 7), (7, 8), 16, head_dim=32))
    assert not is_dense(Case((7, 7), (8, 7), 16, head_dim=32))
    assert is_dense(Case((16, 16), (8, 8), 60, head_dim=64))
    assert not is_dense(Case((16, 16), (8, 8), 60, head_dim=63))


@pytest.mark.parametrize("kind", ["ragged", "outside"])
def test_chunks_hold_the_tokens_of_every_route_on_the_map_once(kind):
    case = KINDS[kind]
    regions, routes = regions_of(case), make_inputs(case)["routes"]
    token = torch.full(regions.padded_grid, -1)
    token[: case.grid[0], : case.grid[1]] = torch.arange(case.grid[0] * case.grid[1]).view(
        case.grid
    )
    token = token.unflatten(1, (regions.columns, -1)).unflatten(0, (regions.rows, -1))
    token = token.transpose(1, 2).reshape(regions.count, -1)  # of every region
    seen = {}
    for chunk in cpu_chunks.chunks(routes, regions, case.grid, 1):
        counts = chunk.num_real
        if counts is None:
            counts = torch.full((chunk.count,), chunk.num_keys)
        keys = chunk.keys_at.view(chunk.count, chunk.num_keys)
        for query, key, count in zip(
            chunk.queries_at.view(chunk.count, -1), keys, counts, strict=True
        ):
            seen.update((int(one), sorted(key[:count].tolist())) for one in query)
    num_tokens = case.grid[0] * case.grid[1]
    assert sorted(seen) == list(range(case.batch * num_tokens))
    for image in range(case.batch):
        for region, kept in enumerate(routes[image].tolist()):
            keys = token[kept].flatten()
            keys = sorted((keys[keys >= 0] + image * num_tokens).tolist())
            for query in token[region][token[region] >= 0].tolist():
                assert seen[query + image * num_tokens] == keys


def test_regions_that_attend_to_padded_tokens_alone_get_their_value():
    case = Case((4, 6), (4, 4), 2, pads=PADS, batch=2)
    inputs = make_inputs(case)
    inputs["routes"] = torch.full_like(inputs["routes"], 15)
    results = run_case(case, inputs, "cpu")
    torch.testing.assert_close(results["out"], inputs["pad_value"].expand(results["out"].shape))
    torch.testing.assert_close(results["grad_pad_value"], inputs["grad_out"].sum((0, 1, 2)))
    assert not any(results[f"grad_{name}"].any() for name in ("query", "key", "value", "pad_key"))


@pytest.mark.parametrize("form", ["chunks", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_of_thousands_stay_finite(force, dtype, form):
    force(form)
    case = Case((11, 13), (4, 4), 5, pads=PADS, scale=1000.0)
    results = run_case(case, make_inputs(case, dtype), "cpu")
    assert all(tensor.isfinite().all() for tensor in results.values())


@pytest.mark.parametrize("form", ["chunks", "dense"])
@pytest.mark.parametrize(
    "relayout",
    [
        lambda t: t.clone(),
        lambda t: t.movedim(-2, 1).clone().movedim(1, -2),
        lambda t: t.movedim(-1, 0).clone().movedim(0, -1),
        lambda t: torch.stack([t, t], dim=-1)[..., 1],
        lambda t: t.transpose(0, 1).clone().transpose(0, 1),
        lambda t: t[:1, :, :1].expand(t.shape),
    ],
    ids=[
        "contiguous",
        "heads_first",
        "channels_outermost",
        "every_other",
        "rows_first",
        "expanded",
    ],
)
@pytest.mark.parametrize("kind", ["whole", "ragged"])
def test_any_strides_give_the_same(force, kind, relayout, form):
    force(form)
    case = KINDS[kind]
    inputs = make_inputs(case)
    others = dict(inputs)
    for name in ("query", "key", "value", "grad_out"):
        others[name] = relayout(inputs[name])
    others["routes"] = inputs["routes"].mT.contiguous().mT
    plain = {name: None if t is None else t.contiguous() for name, t in others.items()}
    assert_equal_but_for_rounding(run_case(case, others, "cpu"), run_case(case, plain, "reference"))


def test_what_is_kept_of_inference_serves_training_on_any_default_device(force):
    for form, case in (
        ("chunks", Case((9, 15), (3, 5), 4)),
        ("chunks", Case((11, 15), (3, 4), 4, pads=PADS)),
        ("dense", Case((11, 15), (3, 5), 4, pads=PADS)),
    ):
        force(form)
        inputs = make_inputs(case)
        with torch.inference_mode(), torch.device("meta"):
            out, _ = run_forward(cpu.forward, case, inputs)
        assert torch.equal(run_case(case, inputs, "cpu")["out"], out)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("form", ["chunks", "dense"])
def test_results_do_not_change_from_run_to_run(force, form, num_threads):
    force(form)
    case = Case((21, 30), (5, 5), 7, pads=PADS, repeats=True, batch=2, head_dim=16)
    inputs = make_inputs(case, torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = (run_case(case, inputs, "cpu") for _ in range(4))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(before)
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_a_batch_do_not_affect_each_other(kind):
    case = Case(**{**vars(KINDS[kind]), "batch": 3})
    inputs = make_inputs(case)
    alone = {name: t if name in PADS else t[1:2] for name, t in inputs.items()}
    for name in ("query", "key", "value"):
        inputs[name] = inputs[name].clone()
        inputs[name][::2] = float("nan")
    together, single = (run_case(case, t, "cpu") for t in (inputs, alone))
    for name in ("out", "grad_query", "grad_key", "grad_value"):
        torch.testing.assert_close(together[name][1:2], single[name])


def peaks(case, dtype=torch.float32):
    """Peak bytes of forward, and of backward beside its three gradients, in those of query."""
    inputs = make_inputs(case, dtype)
    tensors = [inputs[name] for name in TENSORS]
    arguments = regions_of(case), 1.0
    with torch.no_grad(), PeakMemory() as forward:
        out, lse = cpu.forward(*tensors, *arguments)
    with torch.no_grad(), PeakMemory() as backward:
        cpu.backward(inputs["grad_out"], *tensors, out, lse, *arguments)
    unit = inputs["query"].nbytes
    return forward.peak / unit, backward.peak / unit - 3


@pytest.mark.parametrize(
    "case",
    [
        Case((112, 168), (8, 8), 1, heads=2, head_dim=32),
        Case((104, 150), (16, 16), 4, heads=4, head_dim=32, pads=PADS),
        Case((50, 76), (16, 16), 16, heads=8, head_dim=32, pads=PADS),
        Case((14, 14), (7, 7), 16, heads=8, head_dim=32, batch=4),
    ],
    ids=lambda case: case.id,
)
def test_neither_pass_copies_the_kept_keys(case):
    forward, backward = peaks(case)
    # The gather alone takes twice topk.
    assert forward < 2.6
    assert backward < min(2.7, 3 * case.topk)


def test_memory_grows_with_the_map_and_not_with_topk():
    few, many = (peaks(Case((96, 96), (12, 12), topk, heads=2, head_dim=32)) for topk in (2, 32))
    # The numbers of tokens that are kept, 8 bytes of each beside 256 of its channels.
    assert many[0] < few[0] + 30 * 8 / 256 + 0.1
    assert many[1] < few[1] + 30 * 8 / 256 + 0.1


@pytest.mark.parametrize(
    ("dtype", "device", "reason"),
    [
        (torch.float32, "meta", "it runs on CPU tensors, these are on meta"),
        (torch.complex64, "cpu", "it has no torch.complex64"),
    ],
)
def test_it_says_why_it_cannot(dtype, device, reason):
    tensor = torch.zeros(1, 4, 4, 1, 2, dtype=dtype, device=device)
    routes = torch.zeros(1, 4, 1, dtype=torch.int64, device=device)
    assert cpu.why_not(tensor, tensor, tensor, routes, None, None, cut((4, 4), (2, 2))) == reason

"""The definition of polyline attention: loops, reference cases, properties."""

import json
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import error
from polyline_cases import (
    DECAYS,
    ODD_CASES,
    TENSORS,
    Case,
    make_inputs,
    random_cases,
    run_case,
    run_oracle,
)
from torch.nn import functional as F

from densezoo.kernels import polyline_attention, use_backend
from densezoo.kernels.polyline_attention import attend_with_decays
from densezoo.kernels.polyline_attention.decays import line_masks, prefix_sums
from densezoo.kernels.polyline_attention.reference import row_first_mask

CASE_FILE = json.loads(
    (Path(__file__).parent.parent / "data" / "parity" / "ops" / "polyline_mask.json").read_text()
)
FORMS = {"polyline_attention": "full", "polyline_attention_axial": "axial"}
NAMES = dict(q="query", k="key", v="value", log_alpha="log_alpha", log_beta="log_beta")


def published(*ops):
    """The reference cases of these operators; those of modules are in tests/layers."""
    return {
        f"{entry['op']}-{i}": entry
        for i, entry in enumerate(CASE_FILE["cases"])
        if entry["op"] in ops
    }


def published_arrays(entry, dtype):
    arrays = {}
    for name, shape in entry["inputs"].items():
        seed = zlib.crc32(f"{entry['op']}:{name}:{entry['seed']}:{shape}".encode())
        numbers = np.random.RandomState(seed).standard_normal(shape).astype(np.float32)
        if name.startswith("log_"):
            numbers = -entry["decay_scale"] * np.abs(numbers)
        arrays[name] = torch.from_numpy(numbers).to(dtype)
    return arrays


def difference(summary, tensor):
    """Error in standard deviations of the reference, or its magnitude where that is zero."""
    return float(tensor.abs().max()) if summary["std"] == 0 else error(summary, tensor)


ATTENTION = published(*FORMS)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", ATTENTION)
def test_reference_cases_hold(name, backend):
    entry = ATTENTION[name]
    for dtype, limit in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
        arrays = published_arrays(entry, dtype)
        leaves = {NAMES[part]: arrays[part].requires_grad_() for part in NAMES}
        out = polyline_attention(**leaves, form=FORMS[entry["op"]], backend=backend)
        grads = torch.autograd.grad(out, list(leaves.values()), arrays["grad"])
        results = dict(out=out)
        results.update((f"d{part}", grad) for part, grad in zip(NAMES, grads, strict=True))
        assert entry["outputs"].keys() == results.keys()
        for part, summary in entry["outputs"].items():
            assert difference(summary, results[part]) < limit, (part, dtype)
        for part, numbers in entry.get("arrays", {}).items():
            expected = torch.tensor(numbers, dtype=dtype).view_as(results[part])
            torch.testing.assert_close(results[part], expected, rtol=limit, atol=limit)


@pytest.mark.parametrize("case", [*ODD_CASES, *random_cases(30, seed=0)], ids=lambda case: case.id)
def test_the_reference_equals_loops_over_tokens(case):
    inputs = make_inputs(case)
    expected = run_oracle(case, inputs)
    actual = run_case(case, inputs, "reference")
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(actual[name], array, rtol=1e-11, atol=1e-11, err_msg=name)


MASKS = published("line_mask", "polyline_mask")


@pytest.mark.parametrize("name", MASKS)
def test_reference_masks_hold(name):
    entry = MASKS[name]
    arrays = published_arrays(entry, torch.float64)
    if entry["op"] == "line_mask":  # two lines, which are taken for rows
        decays = arrays["log_decay"].unsqueeze(-1)
        sums, _ = prefix_sums(decays, decays, torch.float64)
        mask = line_masks(sums.squeeze(-1))
    else:
        sums = prefix_sums(arrays["log_alpha"], arrays["log_beta"], torch.float64)
        mask = row_first_mask(*sums)
    assert difference(entry["outputs"]["out"], mask) < 1e-9
    for numbers in entry.get("arrays", {}).values():
        expected = torch.tensor(numbers, dtype=torch.float64).view_as(mask)
        torch.testing.assert_close(mask, expected, rtol=1e-12, atol=1e-12)


def attend(inputs, case, **arguments):
    tensors = {name: inputs[name] for name in TENSORS}
    return polyline_attention(**{**tensors, **case.arguments, "backend": "reference", **arguments})


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


EVERY_FORM = [(form, paths) for form in ("full", "axial") for paths in ("both", "row_first")]


def plain_attention(query, key, value, mask=None):
    """Plain attention over all tokens of (B, H, W, heads, head_dim)."""
    q, k, v = (tensor.flatten(1, 2).transpose(1, 2) for tensor in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, mask)
    return out.transpose(1, 2).unflatten(1, query.shape[1:3])


@pytest.mark.parametrize("paths", ["both", "row_first"])
def test_without_decay_the_full_form_is_plain_attention(paths):
    case = Case((4, 7), paths=paths, decay=0.0)
    inputs = make_inputs(case)
    maps = (inputs[name] for name in ("query", "key", "value"))
    assert_equal(attend(inputs, case), plain_attention(*maps))


def test_equal_decays_are_a_mask_of_manhattan_distances():
    case = Case((4, 7), paths="row_first")
    inputs = make_inputs(case)
    decay = torch.tensor([-0.5, -0.03], dtype=torch.float64)  # one a head
    row, column = torch.arange(28) // 7, torch.arange(28) % 7
    distance = (row[:, None] - row).abs() + (column[:, None] - column).abs()
    decays = {name: decay.expand(1, 4, 7, 2) for name in DECAYS}
    maps = (inputs[name] for name in ("query", "key", "value"))
    expected = plain_attention(*maps, decay[:, None, None] * distance)
    assert_equal(attend(inputs | decays, case), expected)
    # Both paths are equally long.
    assert_equal(attend(inputs | decays, replace(case, paths="both")), expected)


@pytest.mark.parametrize(("form", "paths"), EVERY_FORM)
def test_where_steps_leave_nothing_tokens_see_themselves_alone(form, paths):
    case = Case((5, 6), form, paths)
    inputs = make_inputs(case)
    decays = {name: torch.full_like(inputs[name], -1e4) for name in DECAYS}
    assert_equal(attend(inputs | decays, case), inputs["value"])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("form", "paths"), EVERY_FORM)
def test_the_strongest_decays_that_are_taken_give_numbers(form, paths, backend):
    """Sums along lines are finite; those of both lines of a path need not be."""
    case = Case((5, 8), form, paths)
    inputs = make_inputs(case, torch.float32)
    strongest = torch.finfo(torch.float32).min / 8
    inputs |= {name: torch.full_like(inputs[name], strongest) for name in DECAYS}
    results = run_case(case, inputs, backend)
    torch.testing.assert_close(results["out"], inputs["value"])
    assert all(result.isfinite().all() for result in results.values())


@pytest.mark.parametrize("paths", ["both", "row_first"])
@pytest.mark.parametrize("grid", [(1, 9), (9, 1)], ids=str)
def test_on_one_line_both_forms_and_paths_are_one(grid, paths):
    inputs = make_inputs(Case(grid))
    expected = attend(inputs, Case(grid))
    for form in ("full", "axial"):
        assert_equal(attend(inputs, Case(grid, form, paths)), expected)


@pytest.mark.parametrize("form", ["full", "axial"])
def test_a_transposed_map_has_transposed_attention_along_both_paths(form):
    case = Case((4, 7), form)
    inputs = make_inputs(case)
    turned = {name: tensor.transpose(1, 2) for name, tensor in inputs.items()}
    turned["log_alpha"], turned["log_beta"] = turned["log_beta"], turned["log_alpha"]
    assert_equal(attend(turned, case), attend(inputs, case).transpose(1, 2))
    one = replace(case, paths="row_first")
    along_rows, along_columns = attend(inputs, one), attend(turned, one).transpose(1, 2)
    assert (along_rows - along_columns).abs().max() > 0.01
    assert_equal((along_rows + along_columns) / 2, attend(inputs, case))


@pytest.mark.parametrize(("form", "paths"), EVERY_FORM)
def test_the_weights_of_a_token_add_up_to_one(form, paths):
    case = Case((5, 6), form, paths)
    inputs = make_inputs(case)
    assert_equal(
        attend(inputs | dict(value=torch.full_like(inputs["value"], 3.0)), case),
        torch.full_like(inputs["value"], 3.0),
    )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("form", "paths"), EVERY_FORM)
def test_the_first_decays_of_lines_have_no_effect(form, paths, backend):
    case = Case((4, 7), form, paths)
    inputs = make_inputs(case)
    changed = {name: inputs[name].clone() for name in DECAYS}
    changed["log_alpha"][:, :, 0] = -1e30
    changed["log_beta"][:, 0] = -1e30
    expected, actual = (run_case(case, given, backend) for given in (inputs, inputs | changed))
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name
    assert not actual["grad_log_alpha"][:, :, 0].any() and not actual["grad_log_beta"][:, 0].any()
    assert actual["grad_log_alpha"][:, :, 1:].all() and actual["grad_log_beta"][:, 1:].all()


@pytest.mark.parametrize(("form", "paths"), EVERY_FORM)
def test_images_and_heads_do_not_affect_one_another(form, paths):
    case = Case((4, 7), form, paths, batch=4, heads=3)
    inputs = make_inputs(case)
    images, heads = torch.tensor([2, 0, 3, 1]), torch.tensor([1, 2, 0])
    moved = {name: inputs[name][images][:, :, :, heads] for name in TENSORS}
    assert_equal(attend(moved, case), attend(inputs, case)[images][:, :, :, heads])


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(("form", "paths"), EVERY_FORM)
def test_an_empty_batch_gives_an_empty_result_and_gradients(form, paths, backend):
    case = Case((4, 7), form, paths, batch=0, value_dim=5)
    inputs = make_inputs(case, torch.float32)
    results = run_case(case, inputs, backend)
    assert results["out"].shape == (0, 4, 7, 2, 5)
    for name in TENSORS:
        assert results[f"grad_{name}"].shape == inputs[name].shape


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize(("form", "paths"), EVERY_FORM)
def test_gradients_are_those_of_finite_differences(form, paths, decay):
    """Those of tokens that tie, where decays are 0, are those of the sum of decays too."""
    case = Case((2, 3), form, paths, decay, heads=1, head_dim=2, value_dim=1)
    inputs = make_inputs(case)
    tensors = [inputs[name].detach().clone().requires_grad_() for name in TENSORS]

    def attend_(*tensors):  # finite differences of 0 are decays above it
        with use_backend("reference"):
            return attend_with_decays(*tensors, **case.arguments)

    assert torch.autograd.gradcheck(attend_, tensors, check_forward_ad=True)
    if decay:  # second derivatives take long
        assert torch.autograd.gradgradcheck(attend_, tensors)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["full", "axial"])
def test_low_precision_sums_decays_in_float32(form, dtype, backend):
    """Sums of 300 decays would lose most of each in a dtype of few bits."""
    case = Case((1, 300), form, heads=1, head_dim=4)
    inputs = make_inputs(case, dtype)
    inputs["query"] = torch.zeros_like(inputs["query"])  # the mask alone counts
    inputs["log_alpha"] = torch.full_like(inputs["log_alpha"], -1.0078125)  # a number of the dtype
    inputs["value"] = torch.arange(300.0).to(dtype).view(1, 1, 300, 1, 1).expand(1, 1, 300, 1, 4)
    out = attend(inputs, case, backend=backend)
    exact = attend({name: tensor.double() for name, tensor in inputs.items()}, case)
    # Terms are positive: weights and the result are rounded, half an epsilon each, rows add to 1.
    assert ((out.double() - exact).abs() <= 2 * torch.finfo(dtype).eps * exact).all()


@pytest.mark.parametrize("backend", [None, "reference"])
def test_decays_may_be_float32_beside_fewer_bits_and_autocast_keeps_them(backend):
    case = Case((4, 7))
    inputs = make_inputs(case, torch.float32)
    for name in DECAYS:
        inputs[name] = inputs[name] * 1.001  # no numbers of bfloat16
    maps = {name: inputs[name].bfloat16() for name in ("query", "key", "value", "grad_out")}
    expected = run_case(case, inputs | maps, backend)
    assert expected["out"].dtype == expected["grad_query"].dtype == torch.bfloat16
    assert all(expected[f"grad_{name}"].dtype == torch.float32 for name in DECAYS)
    with torch.autocast("cpu", torch.bfloat16):
        results = run_case(case, inputs | dict(grad_out=maps["grad_out"]), backend)
    for name, result in results.items():
        assert torch.equal(result, expected[name].to(result.dtype)), name
    rounded = {name: inputs[name].bfloat16() for name in DECAYS}
    assert not torch.equal(attend(inputs | maps | rounded, case), expected["out"])

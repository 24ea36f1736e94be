"""The definition of neighborhood attention: against loops, reference cases and its properties."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from neighborhood_cases import (
    CASES_3D,
    ODD_CASES,
    TENSORS,
    Case,
    make_inputs,
    oracle_windows,
    random_cases,
    run_case,
    run_oracle,
)
from oracles import error

from densezoo.kernels import neighborhood_attention
from densezoo.kernels.neighborhood_attention.windows import axis_windows

CASE_FILE = json.loads(
    (Path(__file__).parent.parent / "data" / "parity" / "ops" / "na2d.json").read_text()
)
PUBLISHED = {case["name"]: case for case in CASE_FILE["cases"]}


# Names of the file's inputs and gradients, in ours.
NAMES = dict(q="query", k="key", v="value", rpb="bias", add_k="extra_key", add_v="extra_value")


def published_case(name):
    """Give a case of the file and its inputs in float64."""
    entry = PUBLISHED[name]
    case = Case(
        *(tuple(entry[field]) for field in ("size", "kernel_size", "dilation")),
        stride=tuple(entry["stride"]),
        is_causal=tuple(entry["is_causal"]),
        has_bias=entry["rpb"],
        num_extra=entry["additional_kv"],
        scale=entry["scale"],
        batch=entry["batch"],
        heads=entry["heads"],
        head_dim=entry["dim"],
    )
    grid = (case.batch, *case.grid, case.heads, case.head_dim)
    shapes = dict(q=grid, k=grid, v=grid)
    if case.has_bias:
        shapes["rpb"] = (case.heads, *(2 * size - 1 for size in case.kernel_size))
    if case.num_extra:
        shapes["add_k"] = shapes["add_v"] = (case.batch, case.num_extra, *grid[-2:])

    def made(array, shape):
        seed = zlib.crc32(f"{entry['op']}:{array}:{entry['seed']}:{list(shape)}".encode())
        numbers = np.random.RandomState(seed).standard_normal(shape).astype(np.float32)
        return torch.from_numpy(numbers).double()

    inputs = dict.fromkeys(TENSORS)
    inputs.update((NAMES[array], made(array, shape)) for array, shape in shapes.items())
    return case, dict(inputs, grad_out=made("grad", grid))


def as_dtype(inputs, dtype):
    return {name: None if t is None else t.to(dtype) for name, t in inputs.items()}


@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, "reference") for name in PUBLISHED]
    + [(name, "cpu") for name, case in PUBLISHED.items() if len(case["size"]) < 3],
)
def test_reference_cases_hold(name, backend):
    case, inputs = published_case(name)
    outputs, arrays = PUBLISHED[name]["outputs"], PUBLISHED[name].get("arrays", {})
    for dtype, limit in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
        results = run_case(case, as_dtype(inputs, dtype), backend, with_lse=False)
        named = dict(out=results["out"], lse=results["lse"])
        named.update((f"d{array}", results.get(f"grad_{ours}")) for array, ours in NAMES.items())
        assert outputs.keys() == {key for key, tensor in named.items() if tensor is not None}
        for key, summary in outputs.items():
            assert error(summary, named[key]) < limit, (key, dtype)
        for key, array in arrays.items():
            whole = torch.tensor(array, dtype=torch.float64).reshape(named[key].shape)
            assert (named[key] - whole).abs().max() < limit * whole.std(), (key, dtype)


@pytest.mark.parametrize(
    "case", [*ODD_CASES, *CASES_3D, *random_cases(40, seed=0)], ids=lambda case: case.id
)
def test_the_reference_equals_loops_over_queries_and_keys(case):
    inputs = make_inputs(case)
    expected = run_oracle(case, inputs)
    actual = run_case(case, inputs, "reference")
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(actual[name], array, rtol=1e-11, atol=1e-11, err_msg=name)


@pytest.mark.parametrize(
    "example", CASE_FILE["windows"], ids=lambda e: f"{e['length']}-{e['kernel']}"
)
def test_windows_hold_the_keys_of_the_reference_file(example):
    arguments = [example[key] for key in ("length", "kernel", "dilation", "stride", "causal")]
    assert windows_of(*arguments) == example["keys"]
    assert oracle_windows(*arguments) == example["keys"]


def windows_of(length, kernel_size, dilation, stride, is_causal):
    """List the keys of every position, from the package's geometry."""
    windows = axis_windows(length, kernel_size, dilation, stride, is_causal)
    return [
        [int(group + dilation * member) for member in range(start, end)]
        for group, _, start, end in zip(*windows, strict=True)
    ]


def test_every_query_sees_kernel_size_distinct_keys_and_itself():
    for kernel_size in range(2, 8):
        for dilation in range(1, 4):
            for length in range(kernel_size * dilation, kernel_size * dilation + 9):
                for stride in range(1, kernel_size + 1):
                    arguments = (length, kernel_size, dilation, stride)
                    windows = windows_of(*arguments, False)
                    assert windows == oracle_windows(*arguments)
                    for query, keys in enumerate(windows):
                        assert query in keys and len(set(keys)) == kernel_size
                        assert 0 <= keys[0] and keys[-1] < length
                    windows = windows_of(*arguments, True)
                    assert windows == oracle_windows(*arguments, True)
                    for query, keys in enumerate(windows):
                        assert keys[-1] == query and 0 <= keys[0] and len(keys) <= kernel_size


def attend(inputs, kernel_size, **arguments):
    tensors = {name: inputs[name] for name in TENSORS}
    return neighborhood_attention(
        **{**tensors, "kernel_size": kernel_size, "backend": "reference", **arguments}
    )


def plain_attention(query, key, value, **arguments):
    """Plain attention over all positions of (B, *grid, heads, head_dim)."""
    q, k, v = (tensor.flatten(1, -3).transpose(1, 2) for tensor in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, **arguments)
    return out.transpose(1, 2).reshape(query.shape)


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("grid", [(9,), (5, 7), (3, 4, 5)], ids=str)
def test_a_kernel_as_large_as_the_grid_is_plain_attention(grid):
    inputs = make_inputs(Case(grid, grid, batch=2))
    expected = plain_attention(inputs["query"], inputs["key"], inputs["value"])
    assert_equal(attend(inputs, grid), expected)


def test_a_causal_kernel_as_long_as_the_axis_is_causal_attention_whatever_the_stride():
    inputs = make_inputs(Case((11,), (11,)))
    expected = plain_attention(inputs["query"], inputs["key"], inputs["value"], is_causal=True)
    for stride in (1, 4, 11):
        assert_equal(attend(inputs, 11, is_causal=True, stride=stride), expected)


def test_kernel_times_dilation_as_large_as_the_grid_is_plain_attention_in_each_group():
    inputs = make_inputs(Case((6, 12), (3, 4)))
    out = attend(inputs, (3, 4), dilation=(2, 3))
    for row in range(2):
        for column in range(3):
            group = (slice(None), slice(row, None, 2), slice(column, None, 3))
            q, k, v = (inputs[name][group] for name in ("query", "key", "value"))
            assert_equal(out[group], plain_attention(q, k, v))


@pytest.mark.parametrize("is_causal", [False, True])
def test_dilation_is_the_undilated_operator_on_each_group_also_of_unequal_sizes(is_causal):
    case = Case((11, 17), (3, 5), has_bias=not is_causal, num_extra=2)
    inputs = make_inputs(case)
    out, lse = attend(inputs, (3, 5), dilation=(2, 3), is_causal=is_causal, return_lse=True)
    for row in range(2):
        for column in range(3):
            group = (slice(None), slice(row, None, 2), slice(column, None, 3))
            part = {**inputs, **{name: inputs[name][group] for name in TENSORS[:3]}}
            part_out, part_lse = attend(part, (3, 5), is_causal=is_causal, return_lse=True)
            assert_equal(out[group], part_out)
            assert_equal(lse[group], part_lse)


def test_blocks_of_queries_attend_to_their_own_block_when_stride_equals_kernel():
    inputs = make_inputs(Case((8, 12), (4, 6)))
    out = attend(inputs, (4, 6), stride=(4, 6))
    for top in (0, 4):
        for left in (0, 6):
            block = (slice(None), slice(top, top + 4), slice(left, left + 6))
            q, k, v = (inputs[name][block] for name in ("query", "key", "value"))
            assert_equal(out[block], plain_attention(q, k, v))


def test_images_and_heads_do_not_affect_one_another():
    case = Case((7, 9), (3, 5), has_bias=True, num_extra=2, batch=4, heads=3)
    inputs = make_inputs(case)
    out, lse = attend(inputs, (3, 5), return_lse=True)
    images, heads = torch.tensor([2, 0, 3, 1]), torch.tensor([1, 2, 0])
    moved = {name: inputs[name][images][..., heads, :] for name in TENSORS if name != "bias"}
    moved["bias"] = inputs["bias"][heads]
    moved_out, moved_lse = attend(moved, (3, 5), return_lse=True)
    assert_equal(moved_out, out[images][..., heads, :])
    assert_equal(moved_lse, lse[images][..., heads])


def test_queries_inside_move_with_the_map_and_those_at_borders_do_not():
    inputs = make_inputs(Case((16, 18), (5, 5), has_bias=True))
    moved = {**inputs, **{name: inputs[name].roll((2, 3), (1, 2)) for name in TENSORS[:3]}}
    out, moved_out = attend(inputs, 5), attend(moved, 5)
    inside = (slice(None), slice(2, 12), slice(2, 13))
    assert_equal(moved_out.roll((-2, -3), (1, 2))[inside], out[inside])
    assert (moved_out.roll((-2, -3), (1, 2)) - out).abs()[:, 0].max() > 0.1


def test_merging_window_and_extra_keys_by_their_lse_is_attention_over_both():
    inputs = make_inputs(Case((8, 9), (3, 5), num_extra=4))
    out, lse = attend(inputs, (3, 5), return_lse=True)
    alone = {**inputs, "extra_key": None, "extra_value": None}
    window_out, window_lse = attend(alone, (3, 5), return_lse=True)
    logits = torch.einsum("bxyhd,bmhd->bxyhm", inputs["query"], inputs["extra_key"]) * 8**-0.5
    extra_out = torch.einsum("bxyhm,bmhd->bxyhd", logits.softmax(-1), inputs["extra_value"])
    extra_lse = logits.logsumexp(-1)
    assert_equal(lse, torch.logaddexp(window_lse, extra_lse))
    merged = (window_lse - lse).exp()[..., None] * window_out
    merged = merged + (extra_lse - lse).exp()[..., None] * extra_out
    assert_equal(out, merged)


def test_a_dense_softmax_with_a_mask_gives_the_same():
    inputs = make_inputs(Case((10, 12), (4, 3), batch=2))
    out = attend(inputs, (4, 3), dilation=(2, 3), stride=(3, 2), is_causal=(False, True))
    rows = oracle_windows(10, 4, 2, 3, False)
    columns = oracle_windows(12, 3, 3, 2, True)
    mask = torch.zeros(10, 12, 10, 12, dtype=torch.bool)
    for row, seen_rows in enumerate(rows):
        for column, seen_columns in enumerate(columns):
            mask[row, column][np.ix_(seen_rows, seen_columns)] = True
    tensors = (inputs["query"], inputs["key"], inputs["value"])
    assert_equal(out, plain_attention(*tensors, attn_mask=mask.reshape(120, 120)))


def test_a_bias_equal_for_all_offsets_moves_the_lse_alone():
    inputs = make_inputs(Case((7, 8), (3, 3)))
    out, lse = attend(inputs, 3, return_lse=True)
    bias = torch.full((2, 5, 5), 1.5, dtype=torch.float64)
    biased_out, biased_lse = attend(inputs, 3, bias=bias, return_lse=True)
    assert_equal(biased_out, out)
    assert_equal(biased_lse, lse + 1.5)


SMALL_CASES = [
    Case((4, 5), (3, 3), has_bias=True, num_extra=2, heads=1, head_dim=2),
    Case((5, 4), (2, 4), (2, 1), (2, 3), (True, False), heads=1, head_dim=2),
    Case((7,), (3,), (2,), has_bias=True, head_dim=3),
    Case((2, 3, 4), (2, 3, 2), (1, 1, 2), heads=1, head_dim=1),
]


@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.id)
def test_gradients_of_every_order_are_those_of_finite_differences(case):
    inputs = make_inputs(case)
    names = [name for name in TENSORS if inputs[name] is not None]

    def attend_(*tensors):
        return neighborhood_attention(
            **dict(zip(names, tensors, strict=True)),
            **case.arguments,
            return_lse=True,
            backend="reference",
        )

    tensors = [inputs[name].detach().clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(attend_, tensors, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(attend_, tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_is_softmaxed_in_float32(dtype):
    case = Case((9, 10), (5, 5), has_bias=True, num_extra=2)
    inputs = make_inputs(case)
    exact = run_case(case, inputs, "reference")
    results = run_case(case, as_dtype(inputs, dtype), "reference")
    assert results["out"].dtype == dtype and results["lse"].dtype == torch.float32
    logits_rounded = torch.finfo(dtype).eps * 8  # the largest logits are below 8
    assert (results["lse"] - exact["lse"]).abs().max() < logits_rounded

"""The Triton paths of all operators: on a GPU, or in Triton's interpreter without one.

Results are held to the float64 reference, within twice the error of the reference in the dtype.
"""

from dataclasses import replace

import pytest
import torch
from triton_cases import SUITES, assert_exact, each_tiling

from densezoo.kernels import (
    neighborhood_attention,
    polyline_attention,
    routing_attention,
    triton_launch,
)

CALLS = {
    "neighborhood_attention": lambda query: neighborhood_attention(
        query, query, query, 3, backend="triton"
    ),
    "polyline_attention": lambda query: polyline_attention(
        query, query, query, *[query.new_zeros(query.shape[:-1])] * 2, backend="triton"
    ),
    "routing_attention": lambda query: routing_attention(
        query,
        query,
        query,
        torch.zeros(query.shape[0], 4, 1, dtype=torch.int64, device=query.device),
        2,
        backend="triton",
    ),
}
all_operators = pytest.mark.parametrize("name", SUITES)


def all_cases(kind, **extra):
    """Parametrize over the operators and a kind of their cases."""
    return pytest.mark.parametrize(
        "name, case",
        [
            pytest.param(name, replace(case, **extra), id=f"{name}-{case.id}")
            for name, suite in SUITES.items()
            for case in getattr(suite, kind)
        ],
    )


@all_cases("small")
def test_float32_is_as_exact_as_the_reference(name, case, kernel_device):
    assert_exact(name, case, torch.float32, kernel_device)


@all_cases("half")
def test_float16_is_as_exact_as_the_reference(name, case, kernel_device):
    assert_exact(name, case, torch.float16, kernel_device)


@pytest.mark.gpu  # the interpreter's dot of bfloat16 is wrong
@all_cases("odd")
def test_bfloat16_is_as_exact_as_the_reference(name, case, kernel_device):
    assert_exact(name, case, torch.bfloat16, kernel_device)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@all_cases("odd")
def test_odd_shapes_are_as_exact_as_the_reference(name, case, dtype, kernel_device):
    assert_exact(name, case, dtype, kernel_device)


@all_operators
@pytest.mark.parametrize(
    "head_dim, dtype, reason",
    [(16, torch.float64, "float64"), (256, torch.float32, "head_dim is 256")],
    ids=["float64", "wide heads"],
)
def test_it_says_what_it_does_not_run(name, head_dim, dtype, reason, kernel_device):
    query = torch.zeros(1, 6, 6, 1, head_dim, dtype=dtype, device=kernel_device)
    with pytest.raises(ValueError, match=reason):
        CALLS[name](query)


@all_operators
def test_tensors_on_the_cpu_are_declined_outside_of_the_interpreter(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="on the CPU"):
        CALLS[name](torch.zeros(1, 6, 6, 1, 16))


def test_tensorfloat_32_follows_the_switch_of_pytorch(monkeypatch):
    monkeypatch.setattr(triton_launch, "VENDOR", "cuda")
    matmul = torch.backends.cuda.matmul
    name = "fp32_precision" if hasattr(matmul, "fp32_precision") else "allow_tf32"
    values = ("tf32", "ieee") if name == "fp32_precision" else (True, False)
    before = getattr(matmul, name)
    try:
        for value, expected in zip(values, (True, False), strict=True):
            setattr(matmul, name, value)
            assert triton_launch.allows_tf32() is expected
    finally:
        setattr(matmul, name, before)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [16, 32, 49, 64, 128])
@all_cases("tuned")
def test_every_tiling_is_as_exact_as_the_reference(
    name, case, head_dim, dtype, kernel_device, monkeypatch
):
    case = replace(case, head_dim=head_dim)
    if hasattr(case, "value_dim"):
        case = replace(case, value_dim=head_dim)
    for _ in each_tiling(SUITES[name].path, monkeypatch):
        assert_exact(name, case, dtype, kernel_device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@all_cases("tuned", head_dim=32)
def test_gradients_are_deterministic(name, case, dtype, kernel_device):
    cases = SUITES[name].cases
    inputs = cases.make_inputs(case, dtype, device=kernel_device)
    first = cases.run_case(case, inputs, "triton")
    for _ in range(5):
        again = cases.run_case(case, inputs, "triton")
        assert all(torch.equal(again[name], result) for name, result in first.items())


@pytest.mark.gpu
@all_operators
def test_tensorfloat_32_is_as_exact_as_float16(name, kernel_device):
    """Both have 10 bits of mantissa; IEEE products are far more exact."""
    cases, case = SUITES[name].cases, SUITES[name].usual
    exact = cases.run_case(case, cases.make_inputs(case, device=kernel_device), "reference")
    half = cases.make_inputs(case, torch.float16, device=kernel_device)
    eager = cases.run_case(case, half, "reference")
    inputs = cases.make_inputs(case, torch.float32, device=kernel_device)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        rounded = cases.run_case(case, inputs, "triton")
    finally:
        torch.set_float32_matmul_precision(before)
    ieee = cases.run_case(case, inputs, "triton")
    for name, truth in exact.items():
        error = (rounded[name] - truth).abs().max()
        assert error <= 2 * (eager[name] - truth).abs().max(), name
        assert error > (ieee[name] - truth).abs().max(), name

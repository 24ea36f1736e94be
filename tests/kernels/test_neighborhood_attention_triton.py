"""The Triton path of neighborhood attention: on a GPU, or in Triton's interpreter without one.

Results are held to the float64 reference, within twice the error of the reference in the dtype.
"""

import importlib

import pytest
import torch
from neighborhood_cases import (
    ODD_CASES,
    Case,
    assert_within_budget,
    make_inputs,
    random_cases,
    run_case,
)

from densezoo.kernels import neighborhood_attention

path = importlib.import_module("densezoo.kernels.neighborhood_attention.triton")

# Small enough for the interpreter, whose tiles are 4 x 8 members of a group, or 16 in 1-D.
CASES = [
    Case((5, 9), (3, 5), has_bias=True, heads=1, head_dim=16),
    Case((7, 7), (7, 7), has_bias=True, heads=1, head_dim=32),
    Case((9, 8), (5, 3), has_bias=True, heads=2, batch=2, head_dim=16),
    Case((13, 14), (13, 13), has_bias=True, heads=1, head_dim=16),
    Case((8, 11), (7, 7), has_bias=True, heads=1, head_dim=49),
    Case((9, 11), (3, 3), (2, 3), has_bias=True, heads=1, head_dim=32),
    Case((8, 8), (4, 4), (2, 2), heads=1, head_dim=16),
    Case((5, 10), (4, 6), heads=1, head_dim=16),
    Case((6, 13), (2, 2), heads=1, head_dim=16),
    Case((9, 11), (5, 3), stride=(2, 3), heads=1, head_dim=16),
    Case((7, 10), (4, 4), stride=(4, 4), heads=1, head_dim=16),
    Case((7, 9), (3, 4), is_causal=(True, True), heads=1, head_dim=16),
    Case((11, 9), (4, 3), (2, 1), (3, 2), (True, False), heads=1, head_dim=16),
    Case((6, 9), (3, 3), has_bias=True, num_extra=3, heads=2, batch=2, head_dim=16),
    Case((5, 7), (3, 3), (1, 2), (2, 1), (False, True), num_extra=17, heads=1, head_dim=16),
    Case((33,), (7,), (2,), has_bias=True, heads=2, batch=2, head_dim=32),
    Case((40,), (13,), has_bias=True, heads=1, head_dim=16),
    Case((23,), (5,), stride=(3,), is_causal=(True,), num_extra=1, heads=1, head_dim=49),
    Case((5,), (3,), stride=(2,), is_causal=(True,), heads=1, head_dim=16),
    Case((18,), (4,), (3,), scale=0.4, heads=1, head_dim=100),
]
# Sums in half precision are worth a few cases of each kind.
HALF_CASES = [CASES[index] for index in (0, 4, 5, 12, 13, 17)]


def assert_exact(case, dtype, device, **options):
    """Hold the output, the lse and all gradients to the float64 reference."""
    exact = run_case(case, make_inputs(case, device=device), "reference", **options)
    inputs = make_inputs(case, dtype, device=device)
    eager = run_case(case, inputs, "reference", **options)
    # The backward kernels compute the weights from the lse, with its rounding in float32.
    slack = float(exact["lse"].abs().max()) * torch.finfo(torch.float32).eps
    assert_within_budget(run_case(case, inputs, "triton", **options), eager, exact, slack)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_float32_is_as_exact_as_the_reference(case, kernel_device):
    assert_exact(case, torch.float32, kernel_device)


@pytest.mark.parametrize("case", HALF_CASES, ids=lambda case: case.id)
def test_float16_is_as_exact_as_the_reference(case, kernel_device):
    assert_exact(case, torch.float16, kernel_device)


@pytest.mark.gpu  # the interpreter's dot of bfloat16 is wrong
@pytest.mark.parametrize("case", CASES + ODD_CASES, ids=lambda case: case.id)
def test_bfloat16_is_as_exact_as_the_reference(case, kernel_device):
    assert_exact(case, torch.bfloat16, kernel_device)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "case", ODD_CASES + random_cases(30, seed=5, num_axes=(1, 2)), ids=lambda case: case.id
)
def test_odd_shapes_are_as_exact_as_the_reference(case, dtype, kernel_device):
    assert_exact(case, dtype, kernel_device)


def test_the_cotangent_of_the_output_alone_is_enough(kernel_device):
    assert_exact(CASES[0], torch.float32, kernel_device, with_lse=False)


def test_strides_change_nothing(kernel_device):
    """Heads first, channels strided, and a cotangent that is expanded from one number."""
    case = Case((6, 9), (3, 5), has_bias=True, num_extra=2, heads=2, head_dim=16)
    inputs = make_inputs(case, torch.float32, device=kernel_device)
    inputs["grad_out"] = torch.full((), 0.3, device=kernel_device).expand_as(inputs["query"])
    packed = {name: tensor.contiguous() for name, tensor in inputs.items()}
    strided = dict(inputs)
    for name in ("query", "extra_key", "extra_value"):
        strided[name] = packed[name].movedim(-2, 1).contiguous().movedim(1, -2)
    strided["key"] = packed["key"].repeat_interleave(2, dim=-1)[..., ::2]
    strided["bias"] = packed["bias"].mT.contiguous().mT
    expected = run_case(case, packed, "triton")
    for name, result in run_case(case, strided, "triton").items():
        assert torch.equal(result, expected[name]), name
        assert result.is_contiguous(), name


@pytest.mark.parametrize(
    "shape, dtype, reason",
    [
        ((1, 4, 4, 4, 1, 16), torch.float32, "3 axes"),
        ((1, 6, 6, 1, 16), torch.float64, "float64"),
        ((1, 6, 6, 1, 256), torch.float32, "head_dim is 256"),
    ],
    ids=["3-D", "float64", "wide heads"],
)
def test_it_says_what_it_does_not_run(shape, dtype, reason, kernel_device):
    query = torch.zeros(shape, dtype=dtype, device=kernel_device)
    with pytest.raises(ValueError, match=reason):
        neighborhood_attention(query, query, query, 3, backend="triton")


def test_tensors_on_the_cpu_are_declined_outside_of_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    query = torch.zeros(1, 6, 6, 1, 16)
    with pytest.raises(ValueError, match="on the CPU"):
        neighborhood_attention(query, query, query, 3, backend="triton")


def test_tensorfloat_32_follows_the_switch_of_pytorch(monkeypatch):
    monkeypatch.setattr(path, "VENDOR", "cuda")
    matmul = torch.backends.cuda.matmul
    name = "fp32_precision" if hasattr(matmul, "fp32_precision") else "allow_tf32"
    before = getattr(matmul, name)
    try:
        for value, expected in (
            (("tf32", True), ("ieee", False))
            if name == "fp32_precision"
            else ((True, True), (False, False))
        ):
            setattr(matmul, name, value)
            assert path.allows_tf32() is expected
    finally:
        setattr(matmul, name, before)


GPU_CASE = Case((56, 41), (7, 7), has_bias=True, num_extra=2, batch=2, heads=3, head_dim=32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [16, 32, 49, 64, 128])
@pytest.mark.parametrize("grid", [(41, 56), (14, 15), (300,)], ids=["map", "small_map", "line"])
def test_every_tiling_is_as_exact_as_the_reference(
    grid, head_dim, dtype, kernel_device, monkeypatch
):
    """Each candidate of the tuning runs alone, the first of a kernel when it has fewer."""
    dilation = (2, 2) if grid == (14, 15) else None
    case = Case(grid, (7,) * len(grid), dilation, has_bias=True, num_extra=3, head_dim=head_dim)
    tilings = path.tilings
    shape = {(41, 56): "map", (14, 15): "small_map", (300,): "line"}[grid]
    number = max(
        len(tilings(f"_{kernel}_kernel", shape, dtype, head_dim, path.VENDOR))
        for kernel in ("forward", "backward_query", "backward_key")
    )
    path.tuned_kernel.cache_clear()
    try:
        for index in range(number):
            monkeypatch.setattr(
                path,
                "tilings",
                lambda *args, index=index: (tilings(*args) * number)[index : index + 1],
            )
            path.tuned_kernel.cache_clear()
            assert_exact(case, dtype, kernel_device)
    finally:
        path.tuned_kernel.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_gradients_are_deterministic(dtype, kernel_device):
    inputs = make_inputs(GPU_CASE, dtype, device=kernel_device)
    first = run_case(GPU_CASE, inputs, "triton")
    for _ in range(5):
        again = run_case(GPU_CASE, inputs, "triton")
        assert all(torch.equal(again[name], result) for name, result in first.items())


@pytest.mark.gpu
def test_tensorfloat_32_is_as_exact_as_float16(kernel_device):
    """Both have 10 bits of mantissa; IEEE products are far more exact."""
    exact = run_case(GPU_CASE, make_inputs(GPU_CASE, device=kernel_device), "reference")
    eager = run_case(
        GPU_CASE, make_inputs(GPU_CASE, torch.float16, device=kernel_device), "reference"
    )
    inputs = make_inputs(GPU_CASE, torch.float32, device=kernel_device)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        rounded = run_case(GPU_CASE, inputs, "triton")
    finally:
        torch.set_float32_matmul_precision(before)
    ieee = run_case(GPU_CASE, inputs, "triton")
    for name, truth in exact.items():
        error = (rounded[name] - truth).abs().max()
        assert error <= 2 * (eager[name] - truth).abs().max(), name
        assert error > (ieee[name] - truth).abs().max(), name


def run_on_map(size, kernel_size, device):
    """Run forward and backward with bias on a square map of 2 heads of 32; give peak MiB."""
    case = Case((size, size), (kernel_size, kernel_size), has_bias=True, head_dim=32)
    inputs = make_inputs(case, torch.float16, device=device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run_case(case, inputs, "triton")
    return (torch.cuda.max_memory_allocated() - before) / 2**20


@pytest.mark.gpu
def test_memory_grows_with_tokens_not_with_windows(kernel_device):
    for kernel_size in (7, 13):
        run_on_map(64, kernel_size, kernel_device)  # tunes
    small, large = run_on_map(256, 7, kernel_device), run_on_map(512, 7, kernel_device)
    assert large <= 4.2 * small
    # The shares of the sums of the bias are larger, at most 1024 programs' of 64 x 64 numbers.
    assert run_on_map(512, 13, kernel_device) <= large + 16


@pytest.mark.gpu
def test_offsets_pass_32_bits(kernel_device):
    """The last corner of a tensor of over 2**31 elements is that of the corner alone."""
    free, _ = torch.cuda.mem_get_info()
    if free < 40 * 2**30:
        pytest.skip(f"needs 40 GiB of free memory, there are {free / 2**30:.0f}")
    corner = Case((32, 32), (7, 7), heads=8, head_dim=32)
    small = make_inputs(corner, torch.float16, device=kernel_device)
    size = 1700
    qkv = torch.zeros(1, size, size, 3, 8, 32, dtype=torch.float16, device=kernel_device)
    assert qkv.numel() > 2**31
    for index, name in enumerate(("query", "key", "value")):
        qkv[:, -32:, -32:, index] = small[name]
    grad_out = torch.zeros_like(qkv[..., 0, :, :])
    grad_out[:, -32:, -32:] = small["grad_out"]
    whole = Case((size, size), (7, 7), heads=8, head_dim=32)
    query, key, value = qkv.unbind(3)
    inputs = dict(small, query=query, key=key, value=value, grad_out=grad_out)
    references = [
        run_case(
            corner,
            {name: None if tensor is None else tensor.to(dtype) for name, tensor in small.items()},
            backend="reference",
            with_lse=False,
        )
        for dtype in (torch.float16, torch.float64)
    ]
    # Keys up to 7 from the corner's own borders are seen from outside, or by shifted windows.
    inner = [
        {name: result[:, -24:, -24:] for name, result in results.items()}
        for results in (run_case(whole, inputs, "triton", with_lse=False), *references)
    ]
    assert_within_budget(*inner)

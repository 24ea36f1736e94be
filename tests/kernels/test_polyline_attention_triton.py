"""What is special to polyline attention on Triton; what all operators share is in test_triton.

On a GPU, or in Triton's interpreter without one.
"""

from dataclasses import replace

import pytest
import torch
from operator_cases import assert_within_budget
from polyline_cases import DECAYS, TENSORS, Case, make_inputs, run_case
from triton_cases import SUITES, each_tiling

from densezoo.kernels.polyline_attention.decays import Polyline

path = SUITES["polyline_attention"].path
both_forms = pytest.mark.parametrize("form", ["full", "axial"])


@both_forms
def test_strides_change_nothing(form, kernel_device):
    """Heads first, channels strided, columns first, a cotangent expanded from one number."""
    case = Case((3, 2), form, heads=2, head_dim=16)
    inputs = make_inputs(case, torch.float32, device=kernel_device)
    inputs["grad_out"] = torch.full((), 0.3, device=kernel_device).expand_as(inputs["grad_out"])
    packed = {name: tensor.contiguous() for name, tensor in inputs.items()}
    strided = dict(inputs, query=packed["query"].movedim(-2, 1).contiguous().movedim(1, -2))
    strided["key"] = packed["key"].repeat_interleave(2, dim=-1)[..., ::2]
    strided["value"] = packed["value"].transpose(1, 2).contiguous().transpose(1, 2)
    strided["log_alpha"] = packed["log_alpha"].mT.contiguous().mT
    expected = run_case(case, packed, "triton")
    for name, result in run_case(case, strided, "triton").items():
        assert torch.equal(result, expected[name]), name
        assert result.is_contiguous(), name


@pytest.mark.parametrize(
    "form, paths", [("full", "both"), ("full", "row_first"), ("axial", "both")]
)
def test_gradients_of_decays_can_be_left_out(form, paths, kernel_device):
    case = Case((2, 3), form, paths, heads=1, head_dim=16)
    inputs = make_inputs(case, torch.float32, device=kernel_device)
    tensors = [inputs[name] for name in TENSORS]
    geometry = Polyline(form, paths)
    results = path.forward(*tensors, geometry, 0.25)
    with_decays, without = (
        path.backward(inputs["grad_out"], *tensors, *results, geometry, 0.25, needed)
        for needed in (True, False)
    )
    assert without[3:] == (None, None)
    for found, expected in zip(without[:3], with_decays, strict=False):
        assert torch.equal(found, expected)


def test_decays_of_float32_beside_float16_keep_their_precision(kernel_device):
    case = Case((2, 3), heads=1, head_dim=16)
    exact = make_inputs(case, device=kernel_device)
    half = make_inputs(case, torch.float16, device=kernel_device)
    for name in DECAYS:
        exact[name] = exact[name] * (1 - 2**-20)  # no number of float16
        half[name] = exact[name].float()
    results = {
        backend: run_case(case, inputs, backend)
        for backend, inputs in (("triton", half), ("reference", half))
    }
    assert results["triton"]["grad_log_alpha"].dtype == torch.float32
    assert_within_budget(
        results["triton"], results["reference"], run_case(case, exact, "reference")
    )


def test_tilings_of_every_length_fill_the_slots_of_their_rows(monkeypatch):
    """Slots are as wide as the least tile: tiles are whole numbers of them."""
    monkeypatch.setattr(path.runtime, "is_interpreted", lambda: False)
    for vendor in ("cuda", "hip"):
        for dtype in (torch.float16, torch.float32):
            for channels in (16, 64, 128):
                for shape in ("short", "medium", "long"):
                    for kernel in ("_backward_query_kernel", "_backward_key_kernel"):
                        found = path.tilings(kernel, shape, dtype, channels, vendor)
                        assert found and all(tiling.tile % path._SLOT == 0 for tiling in found)


@pytest.mark.gpu
@pytest.mark.parametrize("paths", ["both", "row_first"])
@both_forms
def test_memory_is_that_of_tokens_not_of_masks(form, paths, kernel_device):
    """Four times the rows take four times the memory."""
    peaks = []
    for grid in ((48, 64), (192, 64)):
        case = Case(grid, form, paths, decay=0.1, heads=4, head_dim=32)
        inputs = make_inputs(case, torch.float16, device=kernel_device)
        run_case(case, inputs, "triton")  # tunes
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_case(case, inputs, "triton")
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= 4.1 * peaks[0]
    token_bytes = inputs["query"].numel() * inputs["query"].itemsize
    assert peaks[1] <= 16 * token_bytes


@pytest.mark.gpu
def test_offsets_pass_32_bits(kernel_device, monkeypatch):
    """The last image of a batch of over 2**31 elements is that of the image alone."""
    free, _ = torch.cuda.mem_get_info()
    if free < 60 * 2**30:
        pytest.skip(f"needs 60 GiB of free memory, there are {free / 2**30:.0f}")
    next(each_tiling(path, monkeypatch))  # no tuning over so large a batch
    for form in ("full", "axial"):
        alone = Case((16, 16), form, heads=8, head_dim=32)
        small = make_inputs(alone, torch.float16, device=kernel_device)
        batch_size = 2**31 // small["query"][0].numel() // 3 + 2
        whole = {
            name: torch.zeros(batch_size, *x.shape[1:], dtype=x.dtype, device=kernel_device)
            for name, x in small.items()
            if name not in ("query", "key", "value")
        }
        qkv = torch.zeros(batch_size, 16, 16, 3, 8, 32, dtype=torch.float16, device=kernel_device)
        assert qkv.numel() > 2**31
        whole.update(zip(("query", "key", "value"), qkv.unbind(3), strict=True))
        for name, x in small.items():
            whole[name][-1:] = x
        exact, eager = (
            run_case(alone, {name: x.to(dtype) for name, x in small.items()}, "reference")
            for dtype in (torch.float64, torch.float16)
        )
        results = run_case(replace(alone, batch=batch_size), whole, "triton")
        assert_within_budget({name: x[-1:] for name, x in results.items()}, eager, exact)

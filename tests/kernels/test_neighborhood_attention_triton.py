"""What is special to neighborhood attention on Triton; what all operators share is in test_triton.

On a GPU, or in Triton's interpreter without one.
"""

import pytest
import torch
from neighborhood_cases import Case, make_inputs, run_case
from operator_cases import assert_within_budget
from triton_cases import SUITES, assert_exact

from densezoo.kernels import neighborhood_attention


def test_the_cotangent_of_the_output_alone_is_enough(kernel_device):
    case = SUITES["neighborhood_attention"].small[0]
    assert_exact("neighborhood_attention", case, torch.float32, kernel_device, with_lse=False)


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


def test_grids_of_three_axes_are_declined(kernel_device):
    query = torch.zeros(1, 4, 4, 4, 1, 16, device=kernel_device)
    with pytest.raises(ValueError, match="3 axes"):
        neighborhood_attention(query, query, query, 3, backend="triton")


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

"""What is special to routing attention on Triton; what all operators share is in test_triton.

On a GPU, or in Triton's interpreter without one.
"""

import pytest
import torch
from operator_cases import assert_within_budget
from routing_cases import PADS, Case, make_inputs, run_case
from triton_cases import SUITES, each_tiling

path = SUITES["routing_attention"].path


def takes_dense_form(case, dtype=torch.float32):
    """Whether a case is run densely."""
    inputs = make_inputs(case, dtype)
    rows, columns = case.rows_and_columns
    regions = path.Regions(rows, columns, *case.size)
    return path._Call(inputs["query"], inputs["value"], inputs["routes"], regions, 1.0).is_dense


def test_both_ways_of_walking_are_tested():
    taken = [takes_dense_form(case) for case in SUITES["routing_attention"].small]
    assert taken == [False] * 6 + [True] * 3
    tuned = [takes_dense_form(case) for case in SUITES["routing_attention"].tuned]
    assert tuned == [False] * 4 + [True]


@pytest.mark.parametrize(
    "case, is_dense",
    [
        (Case((56, 56), (7, 7), 1, heads=2, head_dim=32), False),
        (Case((28, 28), (7, 7), 4, heads=4, head_dim=32), False),
        (Case((14, 14), (7, 7), 16, heads=8, head_dim=32), True),
        (Case((50, 76), (16, 16), 16, heads=8, head_dim=32), False),
    ],
    ids=lambda value: getattr(value, "id", None),
)
def test_published_shapes_take_the_way_that_costs_less(case, is_dense):
    """14 x 14 tokens of 196 in 16 regions of 4, in tiles of 16: by regions it were 256."""
    assert takes_dense_form(case, torch.float16) is is_dense


def test_the_table_of_the_dense_form_never_outweighs_the_queries():
    """7 x 9 tokens in 16 x 16 regions of one: dense were less work, with 65536 counts."""
    assert not takes_dense_form(Case((7, 9), (16, 16), 4, pads=PADS, heads=2, head_dim=32))


def test_keepers_are_the_transposed_routes():
    routes = torch.tensor([[[1, 1], [2, 0], [1, 0]], [[0, 2], [2, 1], [0, 2]]])
    keepers, starts = path._transpose(routes)
    assert starts.tolist() == [[0, 2, 5, 6], [0, 2, 3, 6]]
    assert keepers.tolist() == [[1, 2, 0, 0, 2, 1], [0, 2, 1, 0, 1, 2]]


def test_strides_change_nothing(kernel_device):
    """Heads first, channels strided, and a cotangent that is expanded from one number."""
    case = Case((6, 7), (3, 3), 2, pads=PADS, heads=2, head_dim=16)
    inputs = make_inputs(case, torch.float32, device=kernel_device)
    inputs["grad_out"] = torch.full((), 0.3, device=kernel_device).expand_as(inputs["grad_out"])
    packed = {name: tensor.contiguous() for name, tensor in inputs.items()}
    strided = dict(inputs, query=packed["query"].movedim(-2, 1).contiguous().movedim(1, -2))
    strided["key"] = packed["key"].repeat_interleave(2, dim=-1)[..., ::2]
    strided["pad_key"] = packed["pad_key"].mT.contiguous().mT
    strided["routes"] = packed["routes"].mT.contiguous().mT
    expected = run_case(case, packed, "triton")
    for name, result in run_case(case, strided, "triton").items():
        assert torch.equal(result, expected[name]), name
        assert result.is_contiguous(), name


def test_regions_that_none_keeps_have_no_gradient(kernel_device):
    case = Case((6, 6), (3, 3), 1, heads=1, head_dim=16)
    inputs = make_inputs(case, torch.float32, device=kernel_device)
    inputs["routes"] = torch.full_like(inputs["routes"], 4)
    results = run_case(case, inputs, "triton")
    for name in ("grad_key", "grad_value"):
        middle = torch.zeros(6, 6, dtype=torch.bool, device=kernel_device)
        middle[2:4, 2:4] = True
        assert (results[name][0, middle] != 0).any() and (results[name][0, ~middle] == 0).all()


@pytest.mark.gpu
def test_memory_is_that_of_tokens_not_of_kept_regions(kernel_device):
    """A pass takes the results and less than half of the tokens beside them, for any topk."""
    peaks = []
    for topk in (1, 16):
        case = Case((200, 304), (16, 16), topk, pads=PADS, head_dim=32, heads=4)
        inputs = make_inputs(case, torch.float16, device=kernel_device)
        run_case(case, inputs, "triton")  # tunes
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_case(case, inputs, "triton")
        peaks.append(torch.cuda.max_memory_allocated() - before)
    token_bytes = inputs["query"].numel() * inputs["query"].itemsize
    assert peaks[1] <= peaks[0] + token_bytes / 8
    assert peaks[1] <= 5 * token_bytes


@pytest.mark.gpu
def test_offsets_pass_32_bits(kernel_device, monkeypatch):
    """The last region of a tensor of over 2**31 elements is that of the region alone."""
    free, _ = torch.cuda.mem_get_info()
    if free < 40 * 2**30:
        pytest.skip(f"needs 40 GiB of free memory, there are {free / 2**30:.0f}")
    corner = Case((32, 32), (1, 1), 1, heads=8, head_dim=32)
    small = make_inputs(corner, torch.float16, device=kernel_device)
    size = 1696
    qkv = torch.zeros(1, size, size, 3, 8, 32, dtype=torch.float16, device=kernel_device)
    assert qkv.numel() > 2**31
    for index, name in enumerate(("query", "key", "value")):
        qkv[:, -32:, -32:, index] = small[name]
    grad_out = torch.zeros_like(qkv[..., 0, :, :])
    grad_out[:, -32:, -32:] = small["grad_out"]
    whole = Case((size, size), (size // 32, size // 32), 1, heads=8, head_dim=32)
    query, key, value = qkv.unbind(3)
    count = (size // 32) ** 2
    inputs = dict(
        small,
        query=query,
        key=key,
        value=value,
        grad_out=grad_out,
        routes=torch.arange(count, device=kernel_device).view(1, count, 1),
    )
    exact, eager = (
        run_case(
            corner,
            {
                name: tensor.to(dtype) if name not in ("routes", *PADS) else tensor
                for name, tensor in small.items()
            },
            "reference",
        )
        for dtype in (torch.float64, torch.float16)
    )
    next(each_tiling(path, monkeypatch))  # no tuning over so large a map
    results = run_case(whole, inputs, "triton")
    corners = {name: result[:, -32:, -32:] for name, result in results.items()}
    assert_within_budget(corners, eager, exact)

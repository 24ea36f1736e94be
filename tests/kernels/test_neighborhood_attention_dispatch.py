"""What neighborhood attention alone has: the gradient of its lse, 3-D grids, its cost."""

from functools import partial
from math import prod

import pytest
import torch
from neighborhood_cases import TENSORS, Case, make_inputs, run_case
from torch.utils.flop_counter import FlopCounterMode

from densezoo.kernels import neighborhood_attention, which_backend
from densezoo.kernels.operators import registered

REGISTERED = registered["neighborhood_attention"]
CASE = Case((7, 10), (5, 3), (1, 2), has_bias=True, num_extra=2, batch=3)


def test_its_gradient_without_one_of_the_lse_passes_pytorchs_own_checks():
    inputs = make_inputs(CASE, torch.float32)
    tensors = [inputs[name] for name in TENSORS]
    windows = ([5, 3], [1, 2], [1, 1], [0, 0], 0.3)
    outputs = REGISTERED.forward(*tensors, *windows, "")
    torch.library.opcheck(
        REGISTERED.backward, (inputs["grad_out"], None, *tensors, *outputs, *windows, True, "")
    )


def test_the_lse_alone_has_gradients_too():
    inputs = make_inputs(CASE)
    results = []
    for backend in (None, "reference"):
        tensors = {name: inputs[name].detach().clone().requires_grad_() for name in TENSORS}
        _, lse = neighborhood_attention(
            **tensors, **CASE.arguments, return_lse=True, backend=backend
        )
        seen = [tensors[name] for name in ("query", "key", "bias", "extra_key")]
        results.append(torch.autograd.grad(lse, seen, inputs["grad_lse"]))
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)


def test_volumes_take_the_reference():
    volume = torch.zeros(1, 3, 7, 9, 2, 8)
    choice = which_backend(neighborhood_attention, volume, volume, volume, (2, 3, 3))
    assert choice.backend == "reference"
    assert list(choice.declined) == ["triton", "cpu"]


UNDILATED = ([7, 7], [1, 1], [1, 1], [0, 0])


# The layers of NAT-mini and DiNAT-mini (depths 3, 4, 6, 5; heads of 32, kernel 7) on padded maps.
def attention_layers(height, width):
    for stage, depth in enumerate((3, 4, 6, 5)):
        heads = 2 * 2**stage
        yield depth, (1, max(height >> (2 + stage), 7), max(width >> (2 + stage), 7), heads, 32)


@pytest.mark.parametrize("size", [(224, 224), (800, 1333)], ids=str)
def test_the_formula_is_two_products_of_every_query_with_its_window(size):
    windows = REGISTERED.make_geometry(*UNDILATED)
    for _, shape in attention_layers(*size):
        batch, height, width, heads, dim = shape
        by_hand = 0
        for _ in range(batch * heads):
            by_hand += height * width * (7 * 7 * dim)  # a dot product with each key of the window
            by_hand += height * width * (7 * 7 * dim)  # each value times its weight
        maps, extra = [shape] * 3, [(1, 5, heads, dim)] * 2
        assert REGISTERED.count_macs([*maps, None, None, None], windows) == by_hand
        with_extra = REGISTERED.count_macs([*maps, (heads, 13, 13), *extra], windows)
        assert with_extra == by_hand * 54 // 49


def count_by_torch(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("size", [(224, 224), (800, 1333)], ids=str)
def test_torch_counts_models_by_the_formula_on_every_path(size):
    expected = 0
    counted = dict.fromkeys(("operator", "reference"), 0)
    for depth, shape in attention_layers(*size):
        expected += depth * 2 * (2 * prod(shape) * 7 * 7)
        q = torch.empty(shape, device="meta")
        bias = torch.empty(shape[3], 13, 13, device="meta")
        counted["operator"] += depth * count_by_torch(
            lambda q=q, b=bias: REGISTERED.forward(q, q, q, b, None, None, *UNDILATED, 1.0, "")
        )
        counted["reference"] += depth * count_by_torch(
            lambda q=q, b=bias: neighborhood_attention(q, q, q, 7, bias=b, backend="reference")
        )
    assert counted == dict.fromkeys(counted, expected)


@pytest.mark.parametrize(
    "case",
    [
        Case((11, 12), (4, 4), (1, 2), (3, 2), (True, False)),
        Case((15,), (5,), (2,), has_bias=True),
    ],
    ids=lambda case: case.id,
)
def test_strides_causal_axes_and_one_axis_count_in_full_on_every_path(case):
    expected = 4 * case.batch * prod(case.grid) * case.heads * case.head_dim
    expected *= prod(case.kernel_size)
    inputs = make_inputs(case, torch.float32)
    tensors = {name: inputs[name] for name in TENSORS}
    for backend in ("cpu", "reference"):
        forward = partial(neighborhood_attention, **tensors, **case.arguments, backend=backend)
        assert count_by_torch(forward) == expected
        assert count_by_torch(partial(run_case, case, inputs, backend)) == 3 * expected

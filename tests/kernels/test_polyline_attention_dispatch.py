"""What polyline attention alone has: forms and paths, cost, decays that are known."""

import pytest
import torch
from operator_cases import CountReads
from polyline_cases import DECAYS, TENSORS, Case, make_inputs, run_case
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from densezoo.kernels import polyline_attention, use_backend
from densezoo.kernels.operators import registered
from densezoo.kernels.polyline_attention import attend_with_decays

REGISTERED = registered["polyline_attention"]
EVERY_FORM = [(form, paths) for form in ("full", "axial") for paths in ("both", "row_first")]


@pytest.mark.parametrize(
    ("dtype", "needs_decay_grad"), [(torch.float32, False), (torch.bfloat16, True)]
)
@pytest.mark.parametrize(("form", "paths"), EVERY_FORM)
def test_every_form_passes_pytorchs_own_checks(form, paths, dtype, needs_decay_grad):
    inputs = make_inputs(Case((3, 5), form, paths, batch=2, value_dim=6), dtype)
    inputs |= {name: inputs[name].float() for name in DECAYS}
    tensors = [inputs[name] for name in TENSORS]
    tests = ("test_schema", "test_faketensor")  # test_operators has the others, for one form
    torch.library.opcheck(REGISTERED.forward, (*tensors, form, paths, 0.3, ""), test_utils=tests)
    outputs = REGISTERED.forward(*tensors, form, paths, 0.3, "")
    torch.library.opcheck(
        REGISTERED.backward,
        (inputs["grad_out"], *tensors, *outputs, form, paths, 0.3, needs_decay_grad, ""),
        test_utils=tests,
    )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_lse_that_backward_passes_need_has_no_gradient_and_is_that_of_every_softmax(backend):
    inputs = make_inputs(Case((3, 4), decay=0.0))
    query = inputs["query"].detach().requires_grad_()
    tensors = [{**inputs, "query": query}[name] for name in TENSORS]
    logits = 0.3 * torch.einsum("bxyhd,bzwhd->bxyhzw", inputs["query"], inputs["key"])
    whole = logits.flatten(4).logsumexp(-1)
    row = torch.stack([logits[:, i, :, :, i].logsumexp(-1) for i in range(3)], 1)
    column = torch.stack([logits[:, :, j, :, :, j].logsumexp(-1) for j in range(4)], 2)
    for form, paths in EVERY_FORM:
        if backend == "cpu":
            out, lse = REGISTERED.forward(*tensors, form, paths, 0.3, "cpu")
            assert out.requires_grad and not lse.requires_grad
        else:
            _, lse = REGISTERED((*tensors,), REGISTERED.make_geometry(form, paths), 0.3, backend)
        expected = [row, column] if form == "axial" else [whole, whole]
        expected = expected[: 1 if (form, paths) == ("full", "row_first") else 2]
        torch.testing.assert_close(lse, torch.stack(expected, -1), rtol=1e-12, atol=1e-12)


# Stages of PPMA-tiny at 224 x 224 and at 800 x 1216: map, heads, channels of a head, form.
STAGES = [
    ((56, 56), 4, 16, "axial"),
    ((28, 28), 4, 32, "axial"),
    ((14, 14), 8, 32, "full"),
    ((200, 304), 4, 16, "axial"),
    ((50, 76), 8, 32, "full"),
]


@pytest.mark.parametrize("stage", STAGES, ids=str)
def test_the_formula_is_products_of_queries_with_keys_and_of_weights_with_values(stage):
    (height, width), heads, dim, form = stage
    shapes = [(1, height, width, heads, dim)] * 3 + [(1, height, width, heads)] * 2
    count = {
        paths: REGISTERED.count_macs(shapes, REGISTERED.make_geometry(form, paths))
        for paths in ("both", "row_first")
    }
    if form == "full":  # one product of the mean of both softmaxes with the values
        assert count["both"] == count["row_first"] == 2 * (height * width) ** 2 * heads * dim
        return
    line_pairs = height * width**2 + width * height**2  # queries and keys of rows and of columns
    assert count["both"] == 3 * line_pairs * heads * dim  # logits, Aw v and Ah v, both again
    assert count["row_first"] == 2 * line_pairs * heads * dim


@pytest.mark.parametrize(("form", "paths"), EVERY_FORM)
def test_every_path_counts_alike_forward_and_backward(form, paths):
    case = Case((3, 5), form, paths, value_dim=6)
    inputs = make_inputs(case, torch.float32)
    counts = set()
    for backend in ("cpu", "reference"):
        with FlopCounterMode(display=False) as counter:
            run_case(case, inputs, backend)
        counts.add(counter.get_total_flops())
    (count,) = counts
    shapes = [tuple(inputs[name].shape) for name in TENSORS]
    assert count == 6 * REGISTERED.count_macs(shapes, REGISTERED.make_geometry(form, paths))


class Axial(nn.Module):
    """The axial form on maps (B, H, W, 28): two heads of 4 channels and their decays."""

    def forward(self, x):
        maps, decays = x.split((24, 4), dim=-1)
        query, key, value = maps.unflatten(-1, (3, 2, 4)).unbind(-3)
        log_alpha, log_beta = (-decays.exp()).unflatten(-1, (2, 2)).unbind(-2)
        return polyline_attention(query, key, value, log_alpha, log_beta, form="axial")


def test_one_graph_serves_the_axial_form_on_maps_of_every_size():
    model = Axial()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    generator = torch.Generator().manual_seed(0)
    for size in ((3, 5, 7), (4, 12, 9), (5, 2, 2), (6, 3, 8)):
        x = torch.randn(*size, 28, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1


def test_known_decays_give_the_same_and_are_not_looked_at():
    case = Case((3, 5))
    inputs = make_inputs(case)
    tensors = {name: inputs[name] for name in TENSORS}
    results, reads = [], []
    for function in (polyline_attention, attend_with_decays):
        with CountReads() as counter, use_backend("reference"):
            results.append(function(**tensors, **case.arguments))
        reads.append(counter.number)
    assert torch.equal(*results)
    assert reads == [4, 0]

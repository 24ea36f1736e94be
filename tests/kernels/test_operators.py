"""What every operator promises: PyTorch's own checks, one graph, exporters, transforms, counts."""

import copy
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import NamedTuple

import neighborhood_cases
import polyline_cases
import pytest
import routing_cases
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.export import Dim
from torch.func import grad, jvp, vmap
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from densezoo.kernels import (
    neighborhood_attention,
    polyline_attention,
    route_regions,
    routing_attention,
    use_backend,
    which_backend,
)
from densezoo.kernels.operators import registered
from densezoo.tools import export_files
from densezoo.tools.count_macs import count_macs


class NeighborhoodModel(nn.Module):
    """Neighborhood attention as models have it, on maps (B, H, W, 16)."""

    def __init__(self, **arguments):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.qkv = nn.Linear(16, 48)
        self.rel_pos_bias = nn.Parameter(torch.randn(2, 13, 13, generator=generator))
        self.arguments = arguments

    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 8)).unbind(-3)
        return neighborhood_attention(
            query, key, value, 7, bias=self.rel_pos_bias, **self.arguments
        )


class RoutingModel(nn.Module):
    """Routing attention as models have it, on maps (B, H, W, 16) that 3 regions a side may pad."""

    def __init__(self, **arguments):
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.qkv.parameters():
            nn.init.normal_(parameter, std=0.5, generator=generator)
        self.arguments = arguments

    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 8)).unbind(-3)
        of_padding = self.qkv.bias.unflatten(0, (3, 2, 8))
        pads = dict(pad_query=of_padding[0], pad_key=of_padding[1])
        routes = route_regions(query, key, 3, 4, **pads)
        pads = dict(pad_key=of_padding[1], pad_value=of_padding[2])
        return routing_attention(query, key, value, routes, 3, **pads, **self.arguments)


class PolylineModel(nn.Module):
    """Polyline attention as models have it, on maps (B, H, W, 16)."""

    def __init__(self, **arguments):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.qkv = nn.Linear(16, 48 + 4)
        for parameter in self.qkv.parameters():
            nn.init.normal_(parameter, std=0.5, generator=generator)
        self.arguments = arguments

    def forward(self, x):
        maps, decays = self.qkv(x).split((48, 4), dim=-1)
        query, key, value = maps.unflatten(-1, (3, 2, 8)).unbind(-3)
        log_alpha, log_beta = (-F.softplus(decays)).unflatten(-1, (2, 2)).unbind(-2)
        return polyline_attention(query, key, value, log_alpha, log_beta, **self.arguments)


class Subject(NamedTuple):
    """An operator, and what the tests call it with.

    Attributes:
        function: the operator.
        cases: the module of its cases.
        case: a call that takes everything that the operator takes.
        numbers: what the registered operator takes for it beside tensors, but for the backend.
        shared: tensors that all images share, which may be absent.
        by_image: other tensors that have gradients.
        spared: tensors whose gradients can be left out.
        model: a module that calls it.
    """

    function: object
    cases: ModuleType
    case: object
    numbers: tuple
    shared: tuple
    by_image: tuple
    spared: tuple
    model: type

    @property
    def name(self):
        return self.function.__name__

    @property
    def forward(self):
        return registered[self.name].forward

    @property
    def backward(self):
        return registered[self.name].backward

    @property
    def differentiable(self):
        return (*self.by_image, *self.shared)

    def tensors(self, inputs):
        return {name: inputs[name] for name in self.cases.TENSORS}

    def cotangents(self, inputs):
        """Those of the outputs that have gradients."""
        return [inputs[name] for name in ("grad_out", "grad_lse") if name in inputs]

    def call(self, tensors, **arguments):
        return self.function(**tensors, **self.case.arguments, **arguments)


SUBJECTS = [
    Subject(
        neighborhood_attention,
        neighborhood_cases,
        neighborhood_cases.Case(
            (7, 10), (5, 3), (1, 2), has_bias=True, num_extra=2, batch=3, scale=0.3
        ),
        ([5, 3], [1, 2], [1, 1], [0, 0], 0.3),
        ("bias",),
        ("query", "key", "value", "extra_key", "extra_value"),
        ("bias",),
        NeighborhoodModel,
    ),
    Subject(
        routing_attention,
        routing_cases,
        routing_cases.Case(
            (7, 10), (3, 4), 5, pads=routing_cases.PADS, batch=3, scale=0.3, value_dim=6
        ),
        (3, 4, 3, 3, 0.3),
        ("pad_key", "pad_value"),
        ("query", "key", "value"),
        routing_cases.PADS,
        RoutingModel,
    ),
    Subject(
        polyline_attention,
        polyline_cases,
        polyline_cases.Case((4, 6), batch=3, scale=0.3, value_dim=6),
        ("full", "both", 0.3),
        (),
        polyline_cases.TENSORS,
        polyline_cases.DECAYS,
        PolylineModel,
    ),
]


@pytest.fixture(params=SUBJECTS, ids=lambda subject: subject.name)
def subject(request):
    return request.param


@pytest.fixture
def inputs(subject):
    return subject.cases.make_inputs(subject.case)


def maps(*size):
    return torch.randn(*size, 16, generator=torch.Generator().manual_seed(1))


def gradients(model, x):
    """Output of a model, and gradients of its parameters from a cotangent of many values."""
    out = model(x)
    cotangent = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    return out, torch.autograd.grad(out, list(model.parameters()), cotangent)


@pytest.mark.parametrize("has_spared", [False, True])
def test_the_operator_passes_pytorchs_own_checks(subject, has_spared):
    inputs = subject.cases.make_inputs(subject.case, torch.float32)
    without = () if has_spared else subject.spared
    tensors = [
        None
        if name in subject.shared and name in without
        else tensor.detach()
        .clone()
        .requires_grad_(name in subject.differentiable and name not in without)
        for name, tensor in subject.tensors(inputs).items()
    ]
    torch.library.opcheck(subject.forward, (*tensors, *subject.numbers, ""))


@pytest.mark.parametrize("needs_spared_grad", [True, False])
def test_its_gradient_passes_pytorchs_own_checks(subject, needs_spared_grad):
    inputs = subject.cases.make_inputs(subject.case, torch.float32)
    tensors = subject.tensors(inputs).values()
    outputs = subject.forward(*tensors, *subject.numbers, "")
    torch.library.opcheck(
        subject.backward,
        (
            *subject.cotangents(inputs), *tensors, *outputs,
            *subject.numbers, needs_spared_grad, "",
        ),
    )  # fmt: skip


@pytest.mark.slow
def test_the_operator_passes_pytorchs_own_checks_on_triton(subject, kernel_device):
    inputs = subject.cases.make_inputs(subject.case, torch.float32, device=kernel_device)
    tensors = [
        tensor.detach().clone().requires_grad_(name in subject.differentiable)
        for name, tensor in subject.tensors(inputs).items()
    ]
    torch.library.opcheck(subject.forward, (*tensors, *subject.numbers, "triton"))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_each_input_can_be_the_only_one_that_needs_a_gradient(subject, inputs, backend):
    expected = subject.cases.run_case(subject.case, inputs, backend)
    if "grad_lse" in inputs:
        expected = subject.cases.run_case(subject.case, inputs, backend, with_lse=False)
    for wanted in subject.differentiable:
        tensors = {name: tensor.detach() for name, tensor in subject.tensors(inputs).items()}
        tensors[wanted].requires_grad_()
        out = subject.call(tensors, backend=backend)
        (grad_,) = torch.autograd.grad(out, tensors[wanted], inputs["grad_out"])
        torch.testing.assert_close(grad_, expected[f"grad_{wanted}"], rtol=1e-12, atol=1e-12)


def assert_spared_gradients_are_left_out(subject, backend, device="cpu"):
    case = replace(subject.case, batch=1)
    inputs = subject.cases.make_inputs(case, torch.float32, device=device)
    tensors = subject.tensors(inputs).values()
    outputs = subject.forward(*tensors, *subject.numbers, backend)
    whole, without = (
        subject.backward(
            *subject.cotangents(inputs), *tensors, *outputs, *subject.numbers, is_needed, backend
        )
        for is_needed in (True, False)
    )
    names = [name for name in subject.cases.TENSORS if name in subject.differentiable]
    for name, a, b in zip(names, whole, without, strict=True):
        assert a.shape == inputs[name].shape
        assert b.numel() == 0 if name in subject.spared else torch.equal(a, b)


def test_the_cpu_path_leaves_out_gradients_that_can_be(subject):
    assert_spared_gradients_are_left_out(subject, "cpu")


def test_the_triton_path_leaves_out_gradients_that_can_be(subject, kernel_device):
    assert_spared_gradients_are_left_out(subject, "triton", kernel_device)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_one_graph_holds_it_at_every_size(subject, backend):
    model = subject.model(backend=backend)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for size in ((2, 9, 12), (3, 15, 8), (5, 20, 11)):
        out, grads = gradients(compiled, maps(*size))
        expected_out, expected_grads = gradients(model, maps(*size))
        torch.testing.assert_close(out, expected_out)
        torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1
    (graph,) = counter.graphs
    is_operator = [node.target is subject.forward for node in graph.graph.nodes]
    assert sum(is_operator) == (0 if backend == "reference" else 1)


@pytest.mark.slow
def test_inductor_compiles_it(subject):
    model = subject.model()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    out, grads = gradients(compiled, maps(2, 9, 12))
    expected_out, expected_grads = gradients(model, maps(2, 9, 12))
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-4)


def test_a_compiled_model_keeps_the_backend_that_it_was_traced_with(subject):
    model = subject.model()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with use_backend("reference"):
        out = compiled(maps(1, 8, 9))
    torch.testing.assert_close(out, model(maps(1, 8, 9)))
    assert all(node.target is not subject.forward for node in counter.graphs[0].graph.nodes)


SIZES = ((1, 7, 7), (3, 15, 8), (2, 20, 33))
DYNAMIC = ({0: Dim("batch", min=1), 1: Dim("height", min=7), 2: Dim("width", min=7)},)


@pytest.mark.parametrize("strict", [False, True])
def test_torch_export_keeps_the_operator_and_leaves_its_path_open(subject, strict):
    model = subject.model().eval()
    program = torch.export.export(model, (maps(2, 9, 12),), dynamic_shapes=DYNAMIC, strict=strict)
    (node,) = (node for node in program.graph.nodes if node.target is subject.forward)
    assert node.args[-1] == ""
    for size in SIZES:
        torch.testing.assert_close(program.module()(maps(*size)), model(maps(*size)))


@pytest.mark.skipif(not export_files.has_onnx_exporter(), reason="this PyTorch writes no ONNX")
@pytest.mark.parametrize("is_exported_before", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_onnx_files_hold_plain_operators_for_every_size(subject, is_exported_before, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = subject.model().eval()
    if is_exported_before:
        program = torch.export.export(model, (maps(2, 9, 12),), dynamic_shapes=DYNAMIC)
        onnx_program = torch.onnx.export(program, dynamo=True, verbose=False)
    else:
        onnx_program = torch.onnx.export(
            model, (maps(2, 9, 12),), dynamo=True, dynamic_shapes=DYNAMIC, verbose=False
        )
    assert {node.domain for node in onnx_program.model.graph} <= {""}
    onnx_program.save(str(tmp_path / "model.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    (given,) = session.get_inputs()
    for size in SIZES:
        (result,) = session.run(None, {given.name: maps(*size).numpy()})
        expected = model(maps(*size))
        torch.testing.assert_close(torch.from_numpy(result), expected, rtol=1e-5, atol=1e-5)


def test_torch_jit_trace_gets_plain_pytorch_for_every_size(subject):
    model = subject.model().eval()
    traced = torch.jit.trace(model, (maps(2, 9, 12),))
    assert "densezoo::" not in str(traced.inlined_graph)
    for size in SIZES:
        torch.testing.assert_close(traced(maps(*size)), model(maps(*size)))


@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_meta_tensor_has_outputs_and_gradients(subject, backend):
    model = subject.model(backend=backend).to("meta")
    out, grads = gradients(model, maps(2, 9, 12).to("meta"))
    assert out.shape == (2, 9, 12, 2, 8)
    assert [grad_.shape for grad_ in grads] == [p.shape for p in model.parameters()]


def test_a_copy_of_a_module_gives_the_same(subject):
    model = subject.model()
    out = model(maps(2, 9, 12))
    assert torch.equal(copy.deepcopy(model)(maps(2, 9, 12)), out)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_autocast_casts_every_input(subject, backend):
    inputs = subject.cases.make_inputs(subject.case, torch.float32)
    run = partial(subject.cases.run_case, subject.case, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        results = run(inputs)
        tensors = list(subject.tensors(inputs).values())
        tensors[0] = tensors[0].bfloat16()
        direct = subject.forward(*tensors, *subject.numbers, "")
        mixed = run({**inputs, "query": inputs["query"].bfloat16()})  # as a linear layer makes it
        wide = run(subject.cases.make_inputs(subject.case, torch.float64))
    assert results["out"].dtype == mixed["out"].dtype == direct[0].dtype == torch.bfloat16
    assert direct[1].dtype == torch.float32
    assert results[f"grad_{subject.spared[0]}"].dtype == torch.float32
    assert torch.equal(results["out"], mixed["out"])
    assert wide["out"].dtype == torch.float64


def test_a_gradient_under_autocast_is_that_of_a_backward_pass_outside(subject):
    inputs = subject.cases.make_inputs(subject.case, torch.float32)
    tensors = {
        name: tensor.detach().requires_grad_(name in subject.differentiable)
        for name, tensor in subject.tensors(inputs).items()
    }
    leaves = [tensors[name] for name in subject.differentiable]
    with torch.autocast("cpu", torch.bfloat16):
        out = subject.call(tensors)
        cotangent = inputs["grad_out"].to(out.dtype)
        inside = torch.autograd.grad(out, leaves, cotangent, retain_graph=True)
    outside = torch.autograd.grad(out, leaves, cotangent)
    for a, b in zip(inside, outside, strict=True):
        assert torch.equal(a, b)


def in_dims_of(subject, mapped):
    return tuple(1 if name in mapped else None for name in subject.cases.TENSORS)


def test_vmap_gives_what_a_loop_does(subject, inputs):
    tensors = list(subject.tensors(inputs).values())
    stacked = [torch.stack([t, t.flip(0), t.roll(1, 0)], dim=1) for t in tensors]

    def attend(*tensors):
        return subject.call(dict(zip(subject.cases.TENSORS, tensors, strict=True)))

    everything = subject.cases.TENSORS
    for mapped in (
        [name for name in everything if name not in subject.shared],
        ["query"],
        ["key", "routes", *subject.spared],
    ):
        in_dims = in_dims_of(subject, mapped)
        given = [s if dim == 1 else t for s, t, dim in zip(stacked, tensors, in_dims, strict=True)]
        result = vmap(attend, in_dims)(*given)
        for index in range(3):
            one = [
                t.select(dim, index) if dim == 1 else t
                for t, dim in zip(given, in_dims, strict=True)
            ]
            torch.testing.assert_close(result[index], attend(*one), rtol=1e-12, atol=1e-12)


def test_gradients_of_each_image_come_from_vmap_over_the_gradient(subject, inputs):
    tensors = subject.tensors(inputs)
    fixed = {name: t for name, t in tensors.items() if name not in subject.differentiable}
    names = subject.differentiable
    is_wanted = {name: name in names for name in subject.cases.TENSORS}

    def loss(*given):
        named = dict(zip((*names, *fixed), given, strict=True))
        return subject.call(named).square().sum()

    def backward_operator(*given):  # what autograd's own vmap reaches
        named = dict(zip((*names, *fixed), given, strict=True))
        tensors = [named[name] for name in subject.cases.TENSORS]
        out, lse = subject.forward(*tensors, *subject.numbers, "")
        cotangents = [2 * out] if len(subject.cotangents(inputs)) == 1 else [2 * out, None]
        arguments = (*cotangents, *tensors, out, lse, *subject.numbers, True, "")
        found = iter(subject.backward(*arguments))
        grads = {name: next(found) for name, wanted in is_wanted.items() if wanted}
        return tuple(grads[name] for name in names)

    given = [tensors[name] for name in (*names, *fixed)]
    in_dims = tuple(None if name in subject.shared else 0 for name in (*names, *fixed))
    images = [t if dim is None else t.unsqueeze(1) for t, dim in zip(given, in_dims, strict=True)]
    argnums = tuple(range(len(names)))
    whole = grad(loss, argnums=argnums)(*given)
    for function in (grad(loss, argnums=argnums), backward_operator):
        grads = vmap(function, in_dims)(*images)
        for name, each, total in zip(names, grads, whole, strict=True):
            each = each.sum(0) if name in subject.shared else each.squeeze(1)
            torch.testing.assert_close(each, total, rtol=1e-11, atol=1e-11)


def test_torch_func_differentiates_the_reference_alone(subject, inputs):
    tensors = subject.tensors(inputs)

    def attend(query, backend=None):
        return subject.call({**tensors, "query": query}, backend=backend)

    direction = torch.linspace(-1, 1, inputs["query"].numel()).double().view_as(inputs["query"])
    _, tangent = jvp(attend, (inputs["query"],), (direction,))
    step = 1e-6
    difference = attend(inputs["query"] + step * direction) - attend(
        inputs["query"] - step * direction
    )
    torch.testing.assert_close(tangent, difference / (2 * step), rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match="backend='cpu' cannot run .*torch.func"):
        grad(lambda query: attend(query, "cpu").sum())(inputs["query"])


@pytest.mark.parametrize("no_grad", [False, True])
def test_forward_mode_derivatives_are_not_lost_outside_of_torch_func(subject, inputs, no_grad):
    tensors = subject.tensors(inputs)
    direction = torch.linspace(-1, 1, inputs["query"].numel()).double().view_as(inputs["query"])
    with torch.set_grad_enabled(not no_grad), forward_ad.dual_level():
        dual = dict(tensors, query=forward_ad.make_dual(inputs["query"], direction))
        tangent = forward_ad.unpack_dual(subject.call(dual)).tangent
        with pytest.raises(ValueError, match="backend='cpu' cannot run .*forward mode"):
            subject.call(dual, backend="cpu")
    _, expected = jvp(
        lambda query: subject.call({**tensors, "query": query}), (inputs["query"],), (direction,)
    )
    torch.testing.assert_close(tangent, expected)


def test_second_derivatives_are_refused_where_there_are_none(subject, inputs):
    tensors = subject.tensors(inputs)
    query = inputs["query"].detach().requires_grad_()
    out = subject.call({**tensors, "query": query})
    (first,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        first.sum().backward()


def count_by_torch(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


DIVIDED = [
    SUBJECTS[0],
    SUBJECTS[2],
    SUBJECTS[1]._replace(  # padded queries, which the reference does not leave out, count nothing
        case=routing_cases.Case((6, 8), (3, 4), 5, pads=routing_cases.PADS, value_dim=6)
    ),
]


@pytest.mark.parametrize("subject", DIVIDED, ids=lambda subject: subject.name)
def test_every_path_counts_alike_forward_and_backward(subject):
    inputs = subject.cases.make_inputs(subject.case, torch.float32)
    counts = set()
    for backend in ("cpu", "reference"):
        forward = partial(subject.call, subject.tensors(inputs), backend=backend)
        run = partial(subject.cases.run_case, subject.case, inputs, backend)
        counts.add((count_by_torch(forward), count_by_torch(run)))
    ((forward, both),) = counts
    assert forward > 0 and both == 3 * forward


class ImageModel(nn.Module):
    """A model of one attention for count_macs: images to the attention of their pixels."""

    def __init__(self, model):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1)
        self.model = model

    def forward(self, x):
        return self.model(self.stem(x).permute(0, 2, 3, 1))


def test_count_macs_counts_by_the_formula_on_every_path(subject):
    pixels = 12 * 15
    expected = pixels * (3 * 16 + 16 * subject.model().qkv.out_features)
    if subject.name == "neighborhood_attention":
        expected += 2 * pixels * 16 * 7 * 7
    elif subject.name == "polyline_attention":
        expected += 2 * pixels * 16 * pixels
    else:  # 4 of 9 regions, and the products of the regions' means
        expected += 2 * pixels * 16 * (pixels // 9 * 4) + 9 * 9 * 16
    for backend in (None, "cpu", "reference"):
        report = count_macs(ImageModel(subject.model(backend=backend)), (12, 15))
        assert report.macs == expected
        assert report.uncounted == {}


def test_which_backend_tells_the_path_of_a_call_and_why(subject, inputs, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    explain = partial(
        which_backend, subject.function, **subject.tensors(inputs), **subject.case.arguments
    )
    choice = explain()
    assert choice.backend == "cpu"
    assert list(choice.declined) == ["triton"] and "on the CPU" in choice.declined["triton"]
    assert "first" in choice.reason
    with use_backend("reference"):
        choice = explain()
        assert choice.backend == "reference" and "use_backend" in choice.reason
        choice = explain(backend="cpu")
        assert choice.backend == "cpu" and "backend='cpu'" in choice.reason


def test_the_path_that_is_asked_for_is_the_one_that_runs(subject, inputs):
    tensors = subject.tensors(inputs)
    tensors["query"] = tensors["query"].detach().requires_grad_()

    def path():
        return type(subject.call(tensors).grad_fn).__name__

    assert f"densezoo_{subject.name}" in path()
    with use_backend("reference"):
        assert f"densezoo_{subject.name}" not in path()
    with use_backend("cpu"):
        assert f"densezoo_{subject.name}" in path()


NO_TRITON = """
import os, sys
sys.modules["triton"] = None  # importing it fails
import torch
from densezoo.kernels import (
    neighborhood_attention, polyline_attention, route_regions, routing_attention
)
query = torch.randn(1, 8, 9, 2, 8, requires_grad=True)
calls = (
    lambda **arguments: neighborhood_attention(query, query, query, 5, **arguments),
    lambda **arguments: routing_attention(
        query, query, query, route_regions(query, query, 3, 4), 3, **arguments
    ),
    lambda **arguments: polyline_attention(
        query, query, query, *2 * [-query[..., 0].detach().abs()], **arguments
    ),
)
for call in calls:
    call().sum().backward()
    for mode in "0", "1":
        os.environ["TRITON_INTERPRET"] = mode
        try:
            call(backend="triton")
        except ValueError as error:
            print(error)
"""


def test_calls_on_the_cpu_need_no_triton_and_asking_for_it_tells_so():
    done = subprocess.run([sys.executable, "-c", NO_TRITON], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * len(SUBJECTS)
    for compiled, interpreted in zip(lines[::2], lines[1::2], strict=True):
        assert "backend='triton' cannot run" in compiled and "tensors are on the CPU" in compiled
        assert "backend='triton' cannot run" in interpreted
        assert "Triton cannot be imported" in interpreted

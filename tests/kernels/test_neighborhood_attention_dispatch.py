"""The public function: choice of a path, what compilers and exporters make of it, its cost."""

import subprocess
import sys
from functools import partial
from math import prod

import pytest
import torch
from neighborhood_cases import TENSORS, Case, make_inputs, run_case
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.export import Dim
from torch.func import grad, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

from densezoo.kernels import neighborhood_attention, use_backend, which_backend
from densezoo.kernels.neighborhood_attention.dispatch import count_operator_macs
from densezoo.tools import export_files
from densezoo.tools.count_macs import count_macs

OPERATOR = torch.ops.densezoo.neighborhood_attention.default
BACKWARD = torch.ops.densezoo.neighborhood_attention_backward.default
WINDOWS = ([5, 3], [1, 2], [1, 1], [0, 0], 0.3)
CASE = Case((7, 10), (5, 3), (1, 2), has_bias=True, num_extra=2, batch=3)


class Attention(nn.Module):
    """Neighborhood attention as models have it, on maps (B, H, W, 16)."""

    def __init__(self, kernel_size=7, return_lse=False, **arguments):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.qkv = nn.Linear(16, 48)
        table = torch.randn(2, 2 * kernel_size - 1, 2 * kernel_size - 1, generator=generator)
        self.rel_pos_bias = nn.Parameter(table)
        self.arguments = dict(arguments, kernel_size=kernel_size, return_lse=return_lse)

    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 8)).unbind(-3)
        return neighborhood_attention(query, key, value, bias=self.rel_pos_bias, **self.arguments)


def maps(*size):
    return torch.randn(*size, 16, generator=torch.Generator().manual_seed(1))


def gradients(model, x):
    """Outputs of a model, and gradients of its parameters from cotangents of many values."""
    outputs = model(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    cotangents = [torch.linspace(-1, 1, t.numel(), device=t.device).view_as(t) for t in outputs]
    return outputs, torch.autograd.grad(outputs, list(model.parameters()), cotangents)


@pytest.mark.parametrize("given", [TENSORS[:3], TENSORS[:4], TENSORS], ids=len)
def test_the_operator_passes_pytorchs_own_checks(given):
    inputs = make_inputs(CASE, torch.float32)
    tensors = [
        inputs[name].detach().clone().requires_grad_() if name in given else None
        for name in TENSORS
    ]
    torch.library.opcheck(OPERATOR, (*tensors, *WINDOWS, ""))


@pytest.mark.parametrize("needs_bias_grad", [True, False])
@pytest.mark.parametrize("has_grad_lse", [True, False])
def test_its_gradient_passes_pytorchs_own_checks(needs_bias_grad, has_grad_lse):
    inputs = make_inputs(CASE, torch.float32)
    tensors = [inputs[name] for name in TENSORS]
    outputs = OPERATOR(*tensors, *WINDOWS, "")
    grad_lse = inputs["grad_lse"] if has_grad_lse else None
    torch.library.opcheck(
        BACKWARD, (inputs["grad_out"], grad_lse, *tensors, *outputs, *WINDOWS, needs_bias_grad, "")
    )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("wanted", TENSORS)
def test_each_input_can_be_the_only_one_that_needs_a_gradient(wanted, backend):
    inputs = make_inputs(CASE)
    expected = run_case(CASE, inputs, backend)[f"grad_{wanted}"]
    tensors = {name: inputs[name].detach().clone() for name in TENSORS}
    tensors[wanted].requires_grad_()
    outputs = neighborhood_attention(**tensors, **CASE.arguments, return_lse=True, backend=backend)
    outputs = [output for output in outputs if output.requires_grad]
    cotangents = [inputs["grad_out"], inputs["grad_lse"]][: len(outputs)]
    (grad_,) = torch.autograd.grad(outputs, tensors[wanted], cotangents)
    torch.testing.assert_close(grad_, expected, rtol=1e-12, atol=1e-12)


def assert_bias_gradient_is_left_out(backend, device="cpu"):
    case = Case((6, 7), (3, 5), has_bias=True, head_dim=16)
    inputs = make_inputs(case, torch.float32, device=device)
    tensors = [inputs[name] for name in TENSORS]
    windows = ([3, 5], [1, 1], [1, 1], [0, 0], 0.25)
    outputs = OPERATOR(*tensors, *windows, backend)
    whole, without_bias = (
        BACKWARD(inputs["grad_out"], None, *tensors, *outputs, *windows, is_needed, backend)
        for is_needed in (True, False)
    )
    assert whole[3].shape == inputs["bias"].shape and without_bias[3].numel() == 0
    for a, b in zip(whole[:3], without_bias[:3], strict=True):
        assert torch.equal(a, b)


def test_the_cpu_path_leaves_out_a_gradient_of_the_bias_that_is_not_needed():
    assert_bias_gradient_is_left_out("cpu")


def test_the_triton_path_leaves_out_a_gradient_of_the_bias_that_is_not_needed(kernel_device):
    assert_bias_gradient_is_left_out("triton", kernel_device)


@pytest.mark.slow
def test_the_operator_passes_pytorchs_own_checks_on_triton(kernel_device):
    inputs = make_inputs(Case((5, 6), (3, 3), has_bias=True), torch.float32, device=kernel_device)
    tensors = [None if t is None else t.detach().clone() for t in map(inputs.get, TENSORS)]
    tensors = [None if t is None else t.requires_grad_() for t in tensors]
    windows = ([3, 3], [1, 1], [1, 1], [0, 0], 0.25)
    torch.library.opcheck(OPERATOR, (*tensors, *windows, "triton"))


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


@pytest.mark.parametrize("backend", [None, "reference"])
def test_one_graph_holds_it_at_every_size(backend):
    model = Attention(return_lse=True, backend=backend)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for size in ((2, 9, 12), (3, 15, 8), (5, 20, 11)):
        outputs, grads = gradients(compiled, maps(*size))
        expected_outputs, expected_grads = gradients(model, maps(*size))
        torch.testing.assert_close(outputs, expected_outputs)
        torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1
    (graph,) = counter.graphs
    is_operator = [node.target is OPERATOR for node in graph.graph.nodes]
    assert sum(is_operator) == (0 if backend == "reference" else 1)


@pytest.mark.slow
def test_inductor_compiles_it():
    model = Attention()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    outputs, grads = gradients(compiled, maps(2, 9, 12))
    expected_outputs, expected_grads = gradients(model, maps(2, 9, 12))
    torch.testing.assert_close(outputs, expected_outputs)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-4)


def test_a_compiled_model_keeps_the_backend_that_it_was_traced_with():
    model = Attention()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with use_backend("reference"):
        out = compiled(maps(1, 8, 9))
    torch.testing.assert_close(out, model(maps(1, 8, 9)))
    assert all(node.target is not OPERATOR for node in counter.graphs[0].graph.nodes)


SIZES = ((1, 7, 7), (3, 15, 8), (2, 20, 33))
DYNAMIC = ({0: Dim("batch", min=1), 1: Dim("height", min=7), 2: Dim("width", min=7)},)


@pytest.mark.parametrize("strict", [False, True])
def test_torch_export_keeps_the_operator_and_leaves_its_path_open(strict):
    model = Attention().eval()
    program = torch.export.export(model, (maps(2, 9, 12),), dynamic_shapes=DYNAMIC, strict=strict)
    (node,) = (node for node in program.graph.nodes if node.target is OPERATOR)
    assert node.args[-1] == ""
    for size in SIZES:
        torch.testing.assert_close(program.module()(maps(*size)), model(maps(*size)))


@pytest.mark.skipif(not export_files.has_onnx_exporter(), reason="this PyTorch writes no ONNX")
@pytest.mark.parametrize("is_exported_before", [False, True])
def test_onnx_files_hold_plain_operators_for_every_size(is_exported_before, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = Attention(return_lse=True).eval()
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
        results = session.run(None, {given.name: maps(*size).numpy()})
        for result, expected in zip(results, model(maps(*size)), strict=True):
            torch.testing.assert_close(torch.from_numpy(result), expected, rtol=1e-5, atol=1e-5)


def test_torch_jit_trace_gets_plain_pytorch_for_every_size():
    model = Attention().eval()
    traced = torch.jit.trace(model, (maps(2, 9, 12),))
    assert "densezoo::" not in str(traced.inlined_graph)
    for size in SIZES:
        torch.testing.assert_close(traced(maps(*size)), model(maps(*size)))


def test_a_meta_tensor_has_outputs_and_gradients():
    model = Attention(return_lse=True).to("meta")
    (out, lse), grads = gradients(model, maps(2, 9, 12).to("meta"))
    assert out.shape == (2, 9, 12, 2, 8) and lse.shape == (2, 9, 12, 2)
    assert [grad_.shape for grad_ in grads] == [p.shape for p in model.parameters()]


@pytest.mark.parametrize("backend", [None, "reference"])
def test_autocast_casts_every_input(backend):
    case = Case((9, 10), (5, 5), has_bias=True, num_extra=2)
    inputs = make_inputs(case, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        results = run_case(case, inputs, backend)
        tensors = [inputs[name] for name in TENSORS]
        tensors[0] = tensors[0].bfloat16()
        direct = OPERATOR(*tensors, [5, 5], [1, 1], [1, 1], [0, 0], 8**-0.5, "")
        inputs["query"] = inputs["query"].bfloat16()  # as a linear layer makes it
        mixed = run_case(case, inputs, backend)
    assert results["out"].dtype == mixed["out"].dtype == direct[0].dtype == torch.bfloat16
    assert results["lse"].dtype == direct[1].dtype == torch.float32
    assert results["grad_bias"].dtype == torch.float32
    assert torch.equal(results["out"], mixed["out"])
    with torch.autocast("cpu", torch.bfloat16):
        wide = run_case(case, make_inputs(case, torch.float64), backend)
    assert wide["out"].dtype == torch.float64


def test_vmap_gives_what_a_loop_does():
    inputs = make_inputs(Case((6, 7), (3, 5), has_bias=True, num_extra=2, batch=2))
    tensors = [inputs[name] for name in TENSORS]
    stacked = [torch.stack([tensor, 2 * tensor, -tensor], dim=1) for tensor in tensors]

    def attend(*tensors):
        return neighborhood_attention(
            **dict(zip(TENSORS, tensors, strict=True)), kernel_size=(3, 5), return_lse=True
        )

    for in_dims in (
        (1, 1, 1, None, 1, 1),
        (1, None, 1, 1, None, None),
        (None, 1, None, None, 1, 1),
    ):
        mapped = [s if dim == 1 else t for s, t, dim in zip(stacked, tensors, in_dims, strict=True)]
        results = vmap(attend, in_dims)(*mapped)
        for index in range(3):
            one = [
                t.select(dim, index) if dim == 1 else t
                for t, dim in zip(mapped, in_dims, strict=True)
            ]
            for result, expected in zip(results, attend(*one), strict=True):
                torch.testing.assert_close(result[index], expected, rtol=1e-12, atol=1e-12)


def test_gradients_of_each_image_come_from_vmap_over_the_gradient():
    inputs = make_inputs(Case((6, 7), (3, 5), has_bias=True, batch=3))
    tensors = [inputs[name] for name in TENSORS[:4]]

    def loss(query, key, value, bias):
        return neighborhood_attention(query, key, value, (3, 5), bias=bias).square().sum()

    def backward_operator(query, key, value, bias):  # what autograd's own vmap reaches
        windows = ([3, 5], [1, 1], [1, 1], [0, 0], 8**-0.5)
        out, lse = OPERATOR(query, key, value, bias, None, None, *windows, "")
        tensors = (query, key, value, bias, None, None)
        return BACKWARD(2 * out, None, *tensors, out, lse, *windows, True, "")[:4]

    images = [tensor.unsqueeze(1) for tensor in tensors[:3]]
    for function in (grad(loss, argnums=(0, 1, 2, 3)), backward_operator):
        grads = vmap(function, (0, 0, 0, None))(*images, tensors[3])
        whole = grad(loss, argnums=(0, 1, 2, 3))(*tensors)
        for each, total in zip(grads[:3], whole[:3], strict=True):
            torch.testing.assert_close(each.squeeze(1), total, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(grads[3].sum(0), whole[3], rtol=1e-11, atol=1e-11)


def test_torch_func_differentiates_the_reference_alone():
    inputs = make_inputs(Case((6, 7), (3, 5)))

    def attend(query, backend=None):
        return neighborhood_attention(
            query, inputs["key"], inputs["value"], (3, 5), backend=backend
        )

    direction = inputs["grad_out"]
    _, tangent = jvp(attend, (inputs["query"],), (direction,))
    step = 1e-6
    difference = attend(inputs["query"] + step * direction) - attend(
        inputs["query"] - step * direction
    )
    torch.testing.assert_close(tangent, difference / (2 * step), rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match="backend='cpu' cannot run .*torch.func"):
        grad(lambda query: attend(query, "cpu").sum())(inputs["query"])


@pytest.mark.parametrize("no_grad", [False, True])
def test_forward_mode_derivatives_are_not_lost_outside_of_torch_func(no_grad):
    inputs = make_inputs(Case((6, 7), (3, 5)))
    query, key, value = (inputs[name] for name in TENSORS[:3])
    direction = inputs["grad_out"]
    with torch.set_grad_enabled(not no_grad), forward_ad.dual_level():
        dual = forward_ad.make_dual(query, direction)
        tangent = forward_ad.unpack_dual(neighborhood_attention(dual, key, value, (3, 5))).tangent
        with pytest.raises(ValueError, match="backend='cpu' cannot run .*forward mode"):
            neighborhood_attention(dual, key, value, (3, 5), backend="cpu")
    expected = jvp(lambda q: neighborhood_attention(q, key, value, (3, 5)), (query,), (direction,))
    torch.testing.assert_close(tangent, expected[1])


def test_second_derivatives_are_refused_where_there_are_none():
    inputs = make_inputs(Case((6, 7), (3, 5)))
    query = inputs["query"].detach().requires_grad_()
    out = neighborhood_attention(query, inputs["key"], inputs["value"], (3, 5))
    (first,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        first.sum().backward()


UNDILATED = ([7, 7], [1, 1], [1, 1], [0, 0])


# The layers of NAT-mini and DiNAT-mini (depths 3, 4, 6, 5; heads of 32, kernel 7) on padded maps.
def attention_layers(height, width):
    for stage, depth in enumerate((3, 4, 6, 5)):
        heads = 2 * 2**stage
        yield depth, (1, max(height >> (2 + stage), 7), max(width >> (2 + stage), 7), heads, 32)


@pytest.mark.parametrize("size", [(224, 224), (800, 1333)], ids=str)
def test_the_formula_is_two_products_of_every_query_with_its_window(size):
    for _, shape in attention_layers(*size):
        batch, height, width, heads, dim = shape
        by_hand = 0
        for _ in range(batch * heads):
            by_hand += height * width * (7 * 7 * dim)  # a dot product with each key of the window
            by_hand += height * width * (7 * 7 * dim)  # each value times its weight
        assert count_operator_macs(shape, None, (7, 7)) == by_hand
        assert count_operator_macs(shape, (1, 5, heads, dim), (7, 7)) == by_hand * 54 // 49


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
            lambda q=q, b=bias: OPERATOR(q, q, q, b, None, None, *UNDILATED, 1.0, "")
        )
        counted["reference"] += depth * count_by_torch(
            lambda q=q, b=bias: neighborhood_attention(q, q, q, 7, bias=b, backend="reference")
        )
    assert counted == dict.fromkeys(counted, expected)


@pytest.mark.parametrize(
    "case",
    [
        CASE,
        Case((11, 12), (4, 4), (1, 2), (3, 2), (True, False)),
        Case((15,), (5,), (2,), has_bias=True),
    ],
    ids=lambda case: case.id,
)
def test_every_path_counts_alike_forward_and_backward(case):
    expected = 4 * case.batch * prod(case.grid) * case.heads * case.head_dim
    expected *= prod(case.kernel_size) + case.num_extra
    inputs = make_inputs(case, torch.float32)
    tensors = {name: inputs[name] for name in TENSORS}
    for backend in ("cpu", "reference"):
        forward = partial(neighborhood_attention, **tensors, **case.arguments, backend=backend)
        assert count_by_torch(forward) == expected
        assert count_by_torch(partial(run_case, case, inputs, backend)) == 3 * expected


class Model(nn.Module):
    """A model of one attention for count_macs: images to windows of their pixels."""

    def __init__(self, **arguments):
        super().__init__()
        self.proj = nn.Conv2d(3, 48, 1)
        self.rel_pos_bias = nn.Parameter(torch.zeros(2, 13, 13))
        self.extra = nn.Parameter(torch.zeros(1, 4, 2, 8))
        self.arguments = arguments

    def forward(self, x):
        qkv = self.proj(x).permute(0, 2, 3, 1)
        query, key, value = qkv.unflatten(-1, (3, 2, 8)).unbind(-3)
        return neighborhood_attention(
            query, key, value, 7, bias=self.rel_pos_bias,
            extra_key=self.extra, extra_value=self.extra, **self.arguments,
        )  # fmt: skip


def test_count_macs_counts_by_the_formula_on_every_path():
    pixels = 12 * 15
    expected = pixels * 3 * 48 + 2 * pixels * 2 * 8 * (7 * 7 + 4)
    for arguments in ({}, dict(backend="cpu"), dict(backend="reference"), dict(dilation=(1, 2))):
        report = count_macs(Model(**arguments), (12, 15))
        assert report.macs == expected
        assert report.uncounted == {}


def test_which_backend_tells_the_path_of_a_call_and_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = make_inputs(CASE, torch.float32)
    tensors = {name: inputs[name] for name in TENSORS}
    choice = which_backend(neighborhood_attention, **tensors, **CASE.arguments)
    assert choice.backend == "cpu"
    assert list(choice.declined) == ["triton"] and "on the CPU" in choice.declined["triton"]
    assert "first" in choice.reason
    query, key, value = (inputs[name] for name in TENSORS[:3])
    volume = query.unsqueeze(1).expand(-1, 2, -1, -1, -1, -1)
    choice = which_backend(neighborhood_attention, volume, volume, volume, (2, 3, 3))
    assert choice.backend == "reference"
    assert list(choice.declined) == ["triton", "cpu"]
    with use_backend("reference"):
        choice = which_backend(neighborhood_attention, query, key, value, 3)
        assert choice.backend == "reference" and "use_backend" in choice.reason
        choice = which_backend(neighborhood_attention, query, key, value, 3, backend="cpu")
        assert choice.backend == "cpu" and "backend='cpu'" in choice.reason


def test_the_path_that_is_asked_for_is_the_one_that_runs():
    inputs = make_inputs(CASE, torch.float32)
    tensors = {name: inputs[name].detach().requires_grad_() for name in TENSORS}

    def path():
        return type(neighborhood_attention(**tensors, **CASE.arguments).grad_fn).__name__

    assert "densezoo_neighborhood_attention" in path()
    with use_backend("reference"):
        assert "densezoo_neighborhood_attention" not in path()
    with use_backend("cpu"):
        assert "densezoo_neighborhood_attention" in path()


NO_TRITON = """
import os, sys
sys.modules["triton"] = None  # importing it fails
import torch
from densezoo.kernels import neighborhood_attention
query = torch.randn(1, 8, 9, 2, 8, requires_grad=True)
neighborhood_attention(query, query, query, 5).sum().backward()
for mode in "0", "1":
    os.environ["TRITON_INTERPRET"] = mode
    try:
        neighborhood_attention(query, query, query, 5, backend="triton")
    except ValueError as error:
        print(error)
"""


def test_calls_on_the_cpu_need_no_triton_and_asking_for_it_tells_so():
    done = subprocess.run([sys.executable, "-c", NO_TRITON], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    compiled, interpreted = done.stdout.splitlines()
    assert "backend='triton' cannot run" in compiled and "tensors are on the CPU" in compiled
    assert "backend='triton' cannot run" in interpreted
    assert "Triton cannot be imported" in interpreted

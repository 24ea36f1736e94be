"""A wrong call of an operator is a ValueError that names the argument and what is taken.

A table of cases: what is changed of a good call, and parts of the line that is said.
"""

import numpy as np
import pytest
import torch

from densezoo.kernels import neighborhood_attention
from densezoo.kernels.runtime import VARIABLE, use_backend, which_backend


def zeros(*shape, **options):
    return torch.zeros(*shape, **options)


GOOD = zeros(2, 9, 12, 3, 8)
EXTRA = zeros(2, 4, 3, 8)
TABLE = zeros(3, 9, 9)
# Changes of neighborhood_attention(query, key, value, kernel_size=5), parts of what is said.
CALLS = {
    "query-none": (dict(query=None), "query is None: a tensor"),
    "query-array": (dict(query=np.zeros((1, 5))), "query is array", "a tensor"),
    "query-flat": (dict(query=zeros(2, 9, 12)), "query has shape (2, 9, 12)", "1 to 3 axes"),
    "query-4-axes": (dict(query=zeros(1, 5, 5, 5, 5, 1, 2)), "query has shape", "1 to 3 axes"),
    "query-int": (
        dict.fromkeys(("query", "key", "value"), GOOD.int()),
        "query has dtype torch.int32: a floating-point dtype",
    ),
    "query-8-bits": (
        dict.fromkeys(("query", "key", "value"), GOOD.to(torch.float8_e4m3fn)),
        "query has dtype torch.float8_e4m3fn: a floating-point dtype of at least 16 bits",
    ),
    "key-shape": (dict(key=zeros(2, 9, 11, 3, 8)), "key has shape (2, 9, 11, 3, 8)", "(2, 9, 12,"),
    "key-axes": (dict(key=zeros(2, 108, 3, 8)), "key has shape (2, 108, 3, 8)", "shape of query"),
    "value-channels": (dict(value=zeros(2, 9, 12, 3, 9)), "value has shape (2, 9, 12, 3, 9)"),
    "key-dtype": (dict(key=GOOD.double()), "key has dtype torch.float64", "torch.float32"),
    "value-dtype": (dict(value=GOOD.half()), "value has dtype torch.float16", "torch.float32"),
    "value-device": (dict(value=GOOD.to("meta")), "value is on the device meta", "cpu"),
    "bias-device": (dict(bias=TABLE.to("meta")), "bias is on the device meta", "cpu"),
    "bias-dtype": (dict(bias=TABLE.half()), "bias has dtype torch.float16", "torch.float32"),
    "no-heads": (
        dict.fromkeys(("query", "key", "value"), zeros(2, 9, 12, 0, 8)),
        "query has shape (2, 9, 12, 0, 8): at least 1 head",
    ),
    "no-channels": (
        dict.fromkeys(("query", "key", "value"), zeros(2, 9, 12, 3, 0)),
        "query has shape (2, 9, 12, 3, 0): at least 1 head of at least 1 channel",
    ),
    "empty-grid": (
        dict.fromkeys(("query", "key", "value"), zeros(2, 0, 12, 3, 8)),
        "kernel_size is 5 with dilation 1 along axis 0 of the grid (0, 12)",
    ),
    "kernel-1": (dict(kernel_size=1), "kernel_size is 1", "at least 2"),
    "kernel-0": (dict(kernel_size=(5, 0)), "kernel_size is (5, 0)", "at least 2"),
    "kernel-negative": (dict(kernel_size=-3), "kernel_size is -3", "at least 2"),
    "kernel-float": (dict(kernel_size=5.0), "kernel_size is 5.0", "whole number"),
    "kernel-bool": (dict(kernel_size=True), "kernel_size is True", "whole number"),
    "kernel-word": (dict(kernel_size="5"), "kernel_size is '5'", "whole number"),
    "kernel-none": (dict(kernel_size=None), "kernel_size is None", "whole number"),
    "kernel-3-axes": (dict(kernel_size=(3, 3, 3)), "kernel_size is (3, 3, 3)", "2 of them"),
    "kernel-large": (
        dict(kernel_size=11),
        "kernel_size is 11 with dilation 1 along axis 0 of the grid (9, 12)",
        "at most the length of the axis, 9; pad",
    ),
    "dilation-large": (
        dict(dilation=(1, 3)),
        "kernel_size is 5 with dilation 3 along axis 1 of the grid (9, 12)",
        "12; pad query, key and value to 15",
    ),
    "dilation-0": (dict(dilation=0), "dilation is 0", "at least 1"),
    "dilation-bool": (dict(dilation=True), "dilation is True", "whole number"),
    "dilation-axes": (dict(dilation=(1,)), "dilation is (1,)", "2 of them"),
    "stride-0": (dict(stride=0), "stride is 0", "at least 1"),
    "stride-large": (dict(stride=(2, 6)), "stride is (2, 6)", "at most kernel_size, which is 5"),
    "stride-list": (dict(stride=[1, 1, 1]), "stride is [1, 1, 1]", "2 of them"),
    "causal-int": (dict(is_causal=1), "is_causal is 1: True or False"),
    "causal-axes": (dict(is_causal=(True,)), "is_causal is (True,)", "2 of them"),
    "bias-number": (dict(bias=0.5), "bias is 0.5: a tensor"),
    "bias-shape": (dict(bias=zeros(3, 9, 5)), "bias has shape (3, 9, 5)", "(3, 9, 9)"),
    "bias-heads": (dict(bias=zeros(2, 9, 9)), "bias has shape (2, 9, 9)", "(3, 9, 9)"),
    "bias-even": (dict(bias=zeros(3, 7, 7), kernel_size=4), "bias", "odd kernels", "is 4"),
    "bias-even-other": (dict(bias=TABLE, kernel_size=(5, 4)), "bias", "odd", "(5, 4)"),
    "bias-stride": (dict(bias=TABLE, stride=(1, 2)), "bias", "stride 1, stride is (1, 2)"),
    "bias-causal": (dict(bias=TABLE, is_causal=True), "bias", "is_causal=False", "True"),
    "scale-word": (dict(scale="1"), "scale is '1': a finite number"),
    "scale-nan": (dict(scale=float("nan")), "scale is nan: a finite number"),
    "scale-bool": (dict(scale=True), "scale is True: a finite number"),
    "scale-tensor": (dict(scale=zeros(1)), "scale is a tensor of shape (1,): a finite number"),
    "extra-key-alone": (dict(extra_key=EXTRA), "extra_value is None but extra_key is not"),
    "extra-value-alone": (dict(extra_value=EXTRA), "extra_key is None but extra_value is not"),
    "extra-shape": (
        dict(extra_key=zeros(2, 4, 3, 7), extra_value=EXTRA),
        "extra_key has shape (2, 4, 3, 7)",
        "(2, M, 3, 8)",
    ),
    "extra-batch": (
        dict(extra_key=EXTRA, extra_value=zeros(1, 4, 3, 8)),
        "extra_value has shape (1, 4, 3, 8)",
        "(2, M, 3, 8)",
    ),
    "extra-number": (
        dict(extra_key=EXTRA, extra_value=zeros(2, 5, 3, 8)),
        "extra_value has shape (2, 5, 3, 8)",
        "same M",
    ),
    "extra-axes": (dict(extra_key=zeros(2, 3, 8), extra_value=EXTRA), "extra_key has shape"),
    "extra-none": (
        dict(extra_key=zeros(2, 0, 3, 8), extra_value=zeros(2, 0, 3, 8)),
        "extra_key has shape (2, 0, 3, 8)",
        "at least 1",
    ),
    "backend-unknown": (dict(backend="cuda"), "backend is 'cuda'", "triton, cpu, reference"),
    "backend-number": (dict(backend=1), "backend is 1", "triton, cpu, reference"),
    "backend-on-cpu": (
        dict(backend="triton"),
        "backend='triton' cannot run this call of neighborhood_attention",
        "the tensors are on the CPU",
    ),
    "backend-3-d": (
        dict(dict.fromkeys(("query", "key", "value"), zeros(1, 5, 5, 5, 1, 2)), backend="cpu"),
        "backend='cpu' cannot run this call of neighborhood_attention",
        "1-D and 2-D",
    ),
}


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("ask", [neighborhood_attention, which_backend], ids=["call", "which"])
@pytest.mark.parametrize("case", CALLS)
def test_a_wrong_call_of_neighborhood_attention_names_the_argument(case, ask):
    changes, *parts = CALLS[case]
    arguments = dict(query=GOOD, key=GOOD, value=GOOD, kernel_size=5) | changes
    operator = () if ask is neighborhood_attention else (neighborhood_attention,)
    with pytest.raises(ValueError) as raised:
        ask(*operator, **arguments)
    line = str(raised.value)
    assert "\n" not in line
    for part in parts:
        assert part in line, line


def test_a_backend_that_does_not_exist_is_named_with_its_source(monkeypatch):
    with pytest.raises(ValueError, match="use_backend is 'gpu': one of triton, cpu, reference"):
        with use_backend("gpu"):
            pass
    monkeypatch.setenv(VARIABLE, "gpu")
    with pytest.raises(ValueError, match="variable DENSEZOO_BACKEND is 'gpu': one of triton"):
        neighborhood_attention(GOOD, GOOD, GOOD, 5)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_an_empty_batch_gives_empty_results_and_gradients_of_zero(backend):
    query = zeros(0, 9, 12, 3, 8).requires_grad_()
    table, extra = zeros(3, 9, 9).requires_grad_(), zeros(0, 4, 3, 8).requires_grad_()
    out, lse = neighborhood_attention(
        query, query, query, 5, bias=table,
        extra_key=extra, extra_value=extra, return_lse=True, backend=backend,
    )  # fmt: skip
    assert out.shape == query.shape and lse.shape == (0, 9, 12, 3)
    (out.sum() + lse.sum()).backward()
    assert query.grad.shape == query.shape and extra.grad.shape == extra.shape
    assert torch.equal(table.grad, zeros(3, 9, 9))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_inputs_of_any_strides_give_what_contiguous_ones_do(backend):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    strided = [
        normal(2, 9, 12, 3, 3, 8).unbind(3)[1],  # of a product of query, key and value
        normal(2, 3, 8, 9, 12).permute(0, 3, 4, 1, 2),  # channels first
        normal(9, 1, 3, 8).expand(2, 9, 12, 3, 8),  # one column for all, one image for both
        normal(9, 9, 6)[..., ::2].permute(2, 0, 1),
        normal(2, 3, 4, 16)[..., ::2].transpose(1, 2),
        normal(3, 8).expand(2, 4, 3, 8),
    ]
    results = []
    for tensors in (strided, [tensor.contiguous() for tensor in strided]):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        query, key, value, bias, extra_key, extra_value = leaves
        out = neighborhood_attention(
            query, key, value, 5, bias=bias,
            extra_key=extra_key, extra_value=extra_value, backend=backend,
        )  # fmt: skip
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_numbers_of_numpy_are_taken():
    out = neighborhood_attention(
        GOOD, GOOD, GOOD, np.int64(5), stride=(np.int32(2), 1), is_causal=np.True_,
        scale=np.float32(0.5),
    )  # fmt: skip
    assert out.shape == GOOD.shape

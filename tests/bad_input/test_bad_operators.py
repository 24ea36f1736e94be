"""A wrong call of an operator is a ValueError that names the argument and what is taken.

A table of cases: what is changed of a good call, and parts of the line that is said.
"""

from functools import partial

import numpy as np
import pytest
import torch

from densezoo.kernels import neighborhood_attention, route_regions, routing_attention
from densezoo.kernels.runtime import VARIABLE, use_backend, which_backend


def zeros(*shape, **options):
    return torch.zeros(*shape, **options)


GOOD = zeros(2, 9, 12, 3, 8)
EXTRA = zeros(2, 4, 3, 8)
TABLE = zeros(3, 9, 9)
# Changes of neighborhood_attention(query, key, value, kernel_size=5), parts of what is said.
CALLS = {
    "query-none": (dict(query=None), "query is None: a tensor"),
    "query-array": (dict(query=np.zeros((9, 5))), "query is an array of shape (9, 5): a tensor"),
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


MAP = zeros(2, 6, 8, 3, 8)
ROUTES = torch.zeros(2, 12, 4, dtype=torch.int64)
PAD = zeros(3, 8)


def maps(*names, like):
    return dict.fromkeys(names or ("query", "key", "value"), like)


# Changes of routing_attention(query, key, value, routes, num_regions=(3, 4)).
ROUTED_CALLS = {
    "query-none": (dict(query=None), "query is None: a tensor"),
    "routes-list": (dict(routes=[[0]]), "routes is [[0]]: a tensor"),
    "routes-long-list": (dict(routes=ROUTES.tolist()), "routes is a list: a tensor"),
    "routes-array": (
        dict(routes=ROUTES.numpy()),
        "routes is an array of shape (2, 12, 4): a tensor",
    ),
    "query-4-axes": (
        dict(query=zeros(2, 48, 3, 8)),
        "query has shape (2, 48, 3, 8): (B, H, W, heads, head_dim)",
    ),
    "empty-batch": (maps(like=zeros(0, 6, 8, 3, 8)), "(0, 6, 8, 3, 8): at least 1 image"),
    "empty-map": (maps(like=zeros(2, 6, 0, 3, 8)), "(2, 6, 0, 3, 8): a map of at least 1 token"),
    "no-heads": (maps(like=zeros(2, 6, 8, 0, 8)), "(2, 6, 8, 0, 8): at least 1 head"),
    "no-channels": (maps(like=zeros(2, 6, 8, 3, 0)), "at least 1 head of at least 1 channel"),
    "query-int": (maps(like=MAP.int()), "query has dtype torch.int32: a floating-point dtype"),
    "key-shape": (dict(key=zeros(2, 6, 7, 3, 8)), "key has shape (2, 6, 7, 3, 8)", "(2, 6, 8, 3,"),
    "key-dtype": (dict(key=MAP.double()), "key has dtype torch.float64", "torch.float32"),
    "value-map": (
        dict(value=zeros(2, 6, 7, 3, 8)),
        "value has shape (2, 6, 7, 3, 8)",
        "(2, 6, 8, 3, value_dim)",
    ),
    "value-none": (dict(value=zeros(2, 6, 8, 3, 0)), "value has shape (2, 6, 8, 3, 0)"),
    "value-dtype": (dict(value=MAP.half()), "value has dtype torch.float16", "torch.float32"),
    "value-device": (dict(value=MAP.to("meta")), "value is on the device meta", "cpu"),
    "routes-int32": (dict(routes=ROUTES.int()), "routes has dtype torch.int32: torch.int64"),
    "routes-float": (dict(routes=ROUTES.float()), "routes has dtype torch.float32: torch.int64"),
    "routes-device": (dict(routes=ROUTES.to("meta")), "routes is on the device meta", "cpu"),
    "routes-axes": (dict(routes=ROUTES[0]), "routes has shape (12, 4)", "(2, 12, topk)"),
    "routes-batch": (dict(routes=ROUTES[:1]), "routes has shape (1, 12, 4)", "(2, 12, topk)"),
    "routes-regions": (
        dict(routes=ROUTES[:, :9]),
        "routes has shape (2, 9, 4)",
        "(2, 12, topk) for 3 x 4 regions",
    ),
    "routes-none": (dict(routes=ROUTES[..., :0]), "routes has shape (2, 12, 0)"),
    "routes-large": (dict(routes=ROUTES + 12), "routes holds 12: ", "0 to 11, are taken"),
    "routes-negative": (dict(routes=ROUTES - 1), "routes holds -1: ", "0 to 11, are taken"),
    "regions-0": (dict(num_regions=0), "num_regions is 0", "at least 1"),
    "regions-negative": (dict(num_regions=(3, -4)), "num_regions is (3, -4)", "at least 1"),
    "regions-bool": (dict(num_regions=True), "num_regions is True", "whole number"),
    "regions-float": (dict(num_regions=3.0), "num_regions is 3.0", "whole number"),
    "regions-none": (dict(num_regions=None), "num_regions is None", "whole number"),
    "regions-array": (
        dict(num_regions=np.full((2, 2), 3)),
        "num_regions is an array of shape (2, 2)",
        "whole number",
    ),
    "regions-3": (dict(num_regions=(3, 4, 1)), "num_regions is (3, 4, 1)", "2 of them"),
    "size-0": (dict(region_size=0), "region_size is 0", "at least 1"),
    "size-negative": (dict(region_size=(2, -2)), "region_size is (2, -2)", "at least 1"),
    "size-bool": (dict(region_size=True), "region_size is True", "whole number"),
    "size-small": (
        dict(region_size=1),  # more regions are needed to cover the map
        "routes has shape (2, 12, 4)",
        "(2, 48, topk) for 6 x 8 regions",
    ),
    "scale-word": (dict(scale="1"), "scale is '1': a finite number"),
    "scale-nan": (dict(scale=float("nan")), "scale is nan: a finite number"),
    "scale-bool": (dict(scale=True), "scale is True: a finite number"),
    "pad-key-shape": (dict(pad_key=zeros(24)), "pad_key has shape (24,)", "(3, 8)"),
    "pad-key-number": (dict(pad_key=0.0), "pad_key is 0.0: a tensor"),
    "pad-value-shape": (dict(pad_value=zeros(2, 3, 8)), "pad_value has shape (2, 3, 8)", "(3, 8)"),
    "pad-key-dtype": (dict(pad_key=PAD.double()), "pad_key has dtype torch.float64"),
    "pad-value-device": (dict(pad_value=PAD.to("meta")), "pad_value is on the device meta"),
    "backend-unknown": (dict(backend="cuda"), "backend is 'cuda'", "triton, cpu, reference"),
    "backend-on-cpu": (
        dict(backend="triton"),
        "backend='triton' cannot run this call of routing_attention",
        "the tensors are on the CPU",
    ),
}
NAN = torch.where(torch.arange(8) == 3, float("nan"), MAP)
# Changes of route_regions(query, key, num_regions=(3, 4), topk=4).
ROUTING_CALLS = {
    "topk-large": (dict(topk=13), "topk is 13: at most the number of regions, 12 (3 x 4)"),
    "topk-0": (dict(topk=0), "topk is 0", "at least 1"),
    "topk-bool": (dict(topk=True), "topk is True", "whole number"),
    "topk-float": (dict(topk=4.0), "topk is 4.0", "whole number"),
    "query-nan": (dict(query=NAN), "NaN among the products of their means"),
    "key-nan": (dict(key=NAN), "NaN among the products of their means"),
    "key-none": (dict(key=None), "key is None: a tensor"),
    "key-shape": (dict(key=zeros(2, 6, 8, 3, 7)), "key has shape (2, 6, 8, 3, 7)"),
    "key-dtype": (dict(key=MAP.double()), "key has dtype torch.float64", "torch.float32"),
    "key-device": (dict(key=MAP.to("meta")), "key is on the device meta", "cpu"),
    "empty-batch": (maps("query", "key", like=zeros(0, 6, 8, 3, 8)), "at least 1 image"),
    "regions-0": (dict(num_regions=(3, 0)), "num_regions is (3, 0)", "at least 1"),
    "size-bool": (dict(region_size=(2, True)), "region_size is (2, True)", "whole number"),
    "pad-query-alone": (dict(pad_query=PAD), "pad_key is None but pad_query is not"),
    "pad-key-alone": (dict(pad_key=PAD), "pad_query is None but pad_key is not"),
    "pad-shape": (dict(pad_query=PAD, pad_key=zeros(8)), "pad_key has shape (8,)", "(3, 8)"),
    "pad-dtype": (dict(pad_query=PAD, pad_key=PAD.half()), "pad_key has dtype torch.float16"),
}


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def assert_says(parts, call, arguments):
    with pytest.raises(ValueError) as raised:
        call(**arguments)
    line = str(raised.value)
    assert "\n" not in line
    for part in parts:
        assert part in line, line


@pytest.mark.parametrize("ask", [False, True], ids=["call", "which"])
@pytest.mark.parametrize("case", CALLS)
def test_a_wrong_call_of_neighborhood_attention_names_the_argument(case, ask):
    changes, *parts = CALLS[case]
    arguments = dict(query=GOOD, key=GOOD, value=GOOD, kernel_size=5) | changes
    call = partial(which_backend, neighborhood_attention) if ask else neighborhood_attention
    assert_says(parts, call, arguments)


@pytest.mark.parametrize("ask", [False, True], ids=["call", "which"])
@pytest.mark.parametrize("case", ROUTED_CALLS)
def test_a_wrong_call_of_routing_attention_names_the_argument(case, ask):
    changes, *parts = ROUTED_CALLS[case]
    arguments = dict(query=MAP, key=MAP, value=MAP, routes=ROUTES, num_regions=(3, 4)) | changes
    call = partial(which_backend, routing_attention) if ask else routing_attention
    assert_says(parts, call, arguments)


@pytest.mark.parametrize("case", ROUTING_CALLS)
def test_a_wrong_call_of_route_regions_names_the_argument(case):
    changes, *parts = ROUTING_CALLS[case]
    arguments = dict(query=MAP, key=MAP, num_regions=(3, 4), topk=4) | changes
    assert_says(parts, route_regions, arguments)


def test_routes_of_the_wrong_range_are_found_wherever_they_are():
    routes = ROUTES.clone()
    routes[1, 7, 2] = 12
    with pytest.raises(ValueError, match="routes holds 12"):
        routing_attention(MAP, MAP, MAP, routes, (3, 4))
    # The last region may be named.
    assert routing_attention(MAP, MAP, MAP, routes.clamp_max(11), (3, 4)).shape == MAP.shape


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


def normal(*shape, generator):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def assert_strides_do_not_matter(attend, strided):
    results = []
    for tensors in (strided, [tensor.contiguous() for tensor in strided]):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        out = attend(*leaves)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_neighborhood_attention_takes_any_strides(backend):
    draw = partial(normal, generator=torch.Generator().manual_seed(0))
    strided = [
        draw(2, 9, 12, 3, 3, 8).unbind(3)[1],  # of a product of query, key and value
        draw(2, 3, 8, 9, 12).permute(0, 3, 4, 1, 2),  # channels first
        draw(9, 1, 3, 8).expand(2, 9, 12, 3, 8),  # one column for all, one image for both
        draw(9, 9, 6)[..., ::2].permute(2, 0, 1),
        draw(2, 3, 4, 16)[..., ::2].transpose(1, 2),
        draw(3, 8).expand(2, 4, 3, 8),
    ]

    def attend(query, key, value, bias, extra_key, extra_value):
        return neighborhood_attention(
            query, key, value, 5, bias=bias,
            extra_key=extra_key, extra_value=extra_value, backend=backend,
        )  # fmt: skip

    assert_strides_do_not_matter(attend, strided)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_routing_attention_takes_any_strides(backend):
    draw = partial(normal, generator=torch.Generator().manual_seed(0))
    order = torch.rand(12, 2, 12, generator=torch.Generator().manual_seed(1)).argsort(-1)
    routes = order[..., 1:9:2].transpose(0, 1)
    strided = [
        draw(2, 7, 10, 3, 3, 8).unbind(3)[1],  # of a product of query, key and value
        draw(2, 3, 8, 7, 10).permute(0, 3, 4, 1, 2),  # channels first
        draw(7, 1, 3, 8).expand(2, 7, 10, 3, 8),  # one column for all, one image for both
        draw(8, 6)[:, ::2].t(),
        draw(8).expand(3, 8),
    ]

    def attend(query, key, value, pad_key, pad_value):
        return routing_attention(
            query, key, value, routes, (3, 4),
            pad_key=pad_key, pad_value=pad_value, backend=backend,
        )  # fmt: skip

    assert_strides_do_not_matter(attend, strided)
    query, key = strided[:2]
    expected = route_regions(query.contiguous(), key.contiguous(), (3, 4), 4)
    assert torch.equal(route_regions(query, key, (3, 4), 4).sort().values, expected.sort().values)


def test_numbers_of_numpy_are_taken():
    out = neighborhood_attention(
        GOOD, GOOD, GOOD, np.int64(5), stride=(np.int32(2), 1), is_causal=np.True_,
        scale=np.float32(0.5),
    )  # fmt: skip
    assert out.shape == GOOD.shape
    regions = (np.int64(3), np.int32(4))
    routes = route_regions(MAP, MAP, regions, np.int64(4), region_size=np.int64(2))
    out = routing_attention(
        MAP, MAP, MAP, routes, regions, region_size=np.int64(2), scale=np.float32(0.5)
    )
    assert out.shape == MAP.shape

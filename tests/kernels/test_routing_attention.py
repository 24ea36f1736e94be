"""The definition of routing attention and the routing: loops, reference cases, properties."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import error
from routing_cases import (
    ODD_CASES,
    PADS,
    TENSORS,
    Case,
    make_inputs,
    random_cases,
    region_tokens,
    run_case,
    run_oracle,
)
from torch.nn import functional as F

from densezoo.kernels import route_regions, routing_attention

CASE_FILE = json.loads(
    (Path(__file__).parent.parent / "data" / "parity" / "ops" / "bra2d.json").read_text()
)
# Those of the layer are in tests/layers.
PUBLISHED = {
    f"{case['op']}-{case['name']}": case
    for case in CASE_FILE["cases"]
    if case["op"] in ("bra2d", "bra2d_nchw")
}


def published_arrays(entry, dtype):
    """Give a case's q, k, v and the cotangent g as they are in the file: NHWC or NCHW."""
    arrays = {}
    for name, shape in entry["inputs"].items():
        seed = zlib.crc32(f"{entry['op']}:{name}:{entry['seed']}:{shape}".encode())
        numbers = np.random.RandomState(seed).standard_normal(shape).astype(np.float32)
        arrays[name] = torch.from_numpy(numbers).to(dtype)
    return arrays


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_reference_cases_hold(name, backend):
    entry = PUBLISHED[name]
    arguments = entry["args"]
    is_nchw = entry["op"] == "bra2d_nchw"
    for dtype, limit in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
        arrays = published_arrays(entry, dtype)
        leaves = [arrays[part].requires_grad_() for part in "qkv"]
        query, key, value = (
            (leaf.permute(0, 2, 3, 1) if is_nchw else leaf).unflatten(
                -1, (arguments["num_heads"], -1)
            )
            for leaf in leaves
        )
        regions = dict(num_regions=arguments["n_win"], region_size=entry.get("region_size"))
        routes = route_regions(query, key, topk=arguments["topk"], **regions)
        assert routes.sort().values.tolist() == entry["routing"]
        out = routing_attention(
            query, key, value, routes, **regions, scale=arguments["scale"], backend=backend
        ).flatten(3)
        out = out.permute(0, 3, 1, 2) if is_nchw else out
        results = dict(out=out)
        grads = torch.autograd.grad(out, leaves, arrays["g"])
        results.update((f"grad_{part}", grad) for part, grad in zip("qkv", grads, strict=True))
        assert entry["outputs"].keys() == results.keys()
        for part, summary in entry["outputs"].items():
            assert error(summary, results[part]) < limit, (part, dtype)


@pytest.mark.parametrize("case", [*ODD_CASES, *random_cases(40, seed=0)], ids=lambda case: case.id)
def test_the_reference_equals_loops_over_tokens(case):
    inputs = make_inputs(case)
    expected = run_oracle(case, inputs)
    actual = run_case(case, inputs, "reference")
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(actual[name], array, rtol=1e-11, atol=1e-11, err_msg=name)


def means_by_loops(case, tokens, pad):
    """Average the tokens of each region: over those on the map, or with `pad` over all."""
    rows, columns = case.rows_and_columns
    means = np.zeros((len(tokens), rows * columns, tokens[0, 0, 0].size))
    for image, region in np.ndindex(means.shape[:2]):
        places = region_tokens(case, region)
        seen = [
            (pad if place is None else tokens[image][place]).flatten()
            for place in places
            if place is not None or pad is not None
        ]
        if seen:
            means[image, region] = np.mean(seen, axis=0)
    return means


@pytest.mark.parametrize("has_pads", [False, True])
@pytest.mark.parametrize("case", [*ODD_CASES, *random_cases(20, seed=1)], ids=lambda case: case.id)
def test_kept_are_the_regions_of_the_largest_products_of_means(case, has_pads):
    inputs = make_inputs(case)
    generator = torch.Generator().manual_seed(2)
    pads = [None, None]
    if has_pads:
        pads = torch.randn(2, case.heads, case.head_dim, generator=generator, dtype=torch.float64)
    query, key = (
        means_by_loops(case, inputs[name].numpy(), None if pad is None else pad.numpy())
        for name, pad in zip(("query", "key"), pads, strict=True)
    )
    products = np.einsum("bqc,bkc->bqk", query, key)
    topk = min(case.topk, products.shape[-1])
    routes = route_regions(
        inputs["query"], inputs["key"], case.num_regions, topk,
        region_size=case.region_size, pad_query=pads[0], pad_key=pads[1],
    )  # fmt: skip
    assert routes.dtype == torch.int64 and routes.shape == (*products.shape[:2], topk)
    assert all(len(set(kept)) == topk for kept in routes.flatten(0, 1).tolist())
    # Regions that are wholly outside are alike: any of them may be kept, so products are compared.
    kept = np.sort(np.take_along_axis(products, routes.numpy(), -1))
    np.testing.assert_allclose(kept, np.sort(products)[..., -topk:], rtol=1e-11, atol=1e-11)


def attend(inputs, case, **arguments):
    tensors = {name: inputs[name] for name in TENSORS}
    return routing_attention(**{**tensors, **case.arguments, "backend": "reference", **arguments})


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def plain_attention(query, key, value, **arguments):
    """Plain attention over all tokens of (B, H, W, heads, head_dim)."""
    q, k, v = (tensor.flatten(1, 2).transpose(1, 2) for tensor in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, **arguments)
    return out.transpose(1, 2).unflatten(1, query.shape[1:3])


@pytest.mark.parametrize("num_regions", [1, 2, (4, 3)], ids=str)
def test_all_regions_kept_is_plain_attention(num_regions):
    case = Case((8, 6), (1, 1), 1)
    inputs = make_inputs(case)
    rows, columns = (num_regions,) * 2 if isinstance(num_regions, int) else num_regions
    every = torch.arange(rows * columns).expand(1, rows * columns, -1)
    out = attend({**inputs, "routes": every}, case, num_regions=num_regions)
    assert_equal(out, plain_attention(inputs["query"], inputs["key"], inputs["value"]))


def test_regions_that_keep_themselves_alone_are_windows():
    case = Case((8, 12), (2, 3), 1)
    inputs = make_inputs(case)
    out = attend({**inputs, "routes": torch.arange(6).view(1, 6, 1)}, case)
    for top in (0, 4):
        for left in (0, 4, 8):
            window = (slice(None), slice(top, top + 4), slice(left, left + 4))
            q, k, v = (inputs[name][window] for name in ("query", "key", "value"))
            assert_equal(out[window], plain_attention(q, k, v))


def test_padding_is_attended_to_as_the_tokens_that_it_stands_for():
    case = Case((7, 9), (3, 4), 5, pads=PADS, batch=2)
    inputs = make_inputs(case)
    whole = dict(inputs)
    for name, pad in (("query", "pad_key"), ("key", "pad_key"), ("value", "pad_value")):
        padded = inputs[pad].expand(2, 9, 12, -1, -1).clone()
        padded[:, :7, :9] = inputs[name]
        whole[name] = padded
    out = attend({**whole, "pad_key": None, "pad_value": None}, case)
    assert_equal(attend(inputs, case), out[:, :7, :9])


def test_without_pads_padding_has_zero_keys_and_values():
    case = Case((7, 9), (3, 4), 5, pads=PADS)
    inputs = make_inputs(case)
    zeros = {name: torch.zeros_like(inputs[name]) for name in PADS}
    assert_equal(
        attend({**inputs, "pad_key": None, "pad_value": None}, case), attend(inputs | zeros, case)
    )


def test_routes_have_no_order():
    case = Case((7, 9), (3, 4), 5, pads=PADS, batch=2)
    inputs = make_inputs(case)
    mixed = inputs["routes"][..., torch.tensor([3, 0, 4, 2, 1])]
    assert_equal(attend({**inputs, "routes": mixed}, case), attend(inputs, case))


def test_one_number_and_a_pair_and_the_real_number_of_regions_are_one():
    inputs = make_inputs(Case((10, 14), (1, 1), 4, region_size=(3, 4), pads=PADS))
    results = [
        attend(inputs, Case((10, 14), num_regions, 4, region_size=(3, 4), pads=PADS))
        for num_regions in ((1, 1), (3, 3), (4, 4))
    ]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    case = Case((8, 8), (4, 4), 3)
    inputs = make_inputs(case)
    assert torch.equal(
        attend(inputs, case, num_regions=4), attend(inputs, case, num_regions=[4, 4])
    )
    assert torch.equal(attend(inputs, case, region_size=2), attend(inputs, case))


def test_images_and_heads_do_not_affect_one_another():
    case = Case((7, 9), (3, 4), 5, pads=PADS, batch=4, heads=3)
    inputs = make_inputs(case)
    images, heads = torch.tensor([2, 0, 3, 1]), torch.tensor([1, 2, 0])
    moved = {name: inputs[name][images][..., heads, :] for name in ("query", "key", "value")}
    moved |= {name: inputs[name][heads] for name in PADS}
    moved["routes"] = inputs["routes"][images]
    assert_equal(attend(moved, case), attend(inputs, case)[images][..., heads, :])


def test_a_number_that_is_not_finite_reaches_those_that_attend_to_it_alone():
    case = Case((8, 8), (4, 4), 3)
    inputs = make_inputs(case)
    key = inputs["key"].clone()
    key[0, 0, 0] = float("nan")  # a token of region 0
    out = attend({**inputs, "key": key}, case)
    is_hit = (inputs["routes"] == 0).any(-1).view(4, 4)  # region by region
    expected = is_hit.repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(out[0].isnan().all(dim=(-1, -2)), expected)
    assert torch.equal(out[0].isnan().any(dim=(-1, -2)), expected)


SMALL_CASES = [
    Case((4, 4), (2, 2), 2, heads=1, head_dim=2),
    Case((3, 5), (2, 2), 3, pads=PADS, head_dim=2, value_dim=1),
    Case((3, 3), (2, 2), 3, region_size=(1, 2), pads=("pad_key",), repeats=True, head_dim=1),
]


@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.id)
def test_gradients_of_every_order_are_those_of_finite_differences(case):
    inputs = make_inputs(case)
    names = [n for n in TENSORS if inputs[n] is not None and n != "routes"]

    def attend_(*tensors):
        return attend({**inputs, **dict(zip(names, tensors, strict=True))}, case)

    tensors = [inputs[name].detach().clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(attend_, tensors, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(attend_, tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_is_routed_in_float32(dtype):
    """Products of means that differ by less than a rounding of the dtype are told apart."""
    query = torch.ones(1, 4, 4, 1, 8, dtype=dtype)
    key = torch.ones(1, 4, 4, 1, 8, dtype=dtype)
    key[0, 2, 2, 0, 0] += 2 * torch.finfo(dtype).eps  # of region 3, whose mean moves by half an eps
    assert (route_regions(query, key, 2, 1) == 3).all()
    with torch.autocast("cpu", dtype):
        assert (route_regions(query.float(), key.float(), 2, 1) == 3).all()

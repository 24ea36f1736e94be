"""What routing attention and the routing alone have: cost, graphs for all maps, known routes."""

from math import prod

import pytest
import torch
from operator_cases import CountReads
from routing_cases import PADS, TENSORS, Case, make_inputs
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.func import vmap
from torch.utils.flop_counter import FlopCounterMode

from densezoo.kernels import route_regions, routing_attention, runtime
from densezoo.kernels.operators import registered
from densezoo.kernels.routing_attention import attend_known_routes
from densezoo.kernels.routing_attention.regions import maximum

REGISTERED = registered["routing_attention"]


def test_the_lse_that_backward_passes_need_has_no_gradient():
    inputs = make_inputs(Case((7, 9), (3, 4), 5))
    query = inputs["query"].detach().requires_grad_()
    tensors = [{**inputs, "query": query}[name] for name in TENSORS]
    out, lse = REGISTERED.forward(*tensors, 3, 4, 3, 3, 0.3, "")
    assert out.requires_grad and not lse.requires_grad
    logits = 0.3 * torch.einsum("bxyhd,bzwhd->bhxyzw", inputs["query"], inputs["key"]).flatten(4)
    region = torch.arange(7)[:, None] // 3 * 4 + torch.arange(9) // 3
    kept = (inputs["routes"][0][region][..., None] == region.flatten()).any(2)  # (7, 9, 63)
    num_padded = (9 - torch.bincount(region.flatten(), minlength=12))[inputs["routes"][0][region]]
    padded = num_padded.sum(-1).double().log()  # zero keys: their logits are 0
    expected = torch.logaddexp(logits.masked_fill(~kept, float("-inf")).logsumexp(-1), padded)
    torch.testing.assert_close(lse, expected.permute(0, 2, 3, 1), rtol=1e-12, atol=1e-12)


# Stages of BiFormer-small: map, heads of 32, topk; 7 regions a side, and 16 that pad the maps.
STAGES_224 = [((56, 56), 2, 1), ((28, 28), 4, 4), ((14, 14), 8, 16)]
STAGES_800 = [((200, 304), 2, 1), ((100, 152), 4, 4), ((50, 76), 8, 16)]


@pytest.mark.parametrize(
    ("stages", "num_regions", "published"),
    [
        (STAGES_224, 7, (25.7, 12.8, 6.4)),  # million MACs
        (STAGES_800, 16, (1922, 1089, 622)),
    ],
)
def test_the_formula_is_two_products_of_every_query_with_the_kept_tokens(
    stages, num_regions, published
):
    for ((height, width), heads, topk), millions in zip(stages, published, strict=True):
        size = -(-height // num_regions), -(-width // num_regions)
        by_hand = 0
        for _ in range(height * width):
            num_keys = topk * prod(size)
            by_hand += heads * num_keys * 32  # a dot product with each key
            by_hand += heads * num_keys * 32  # each value times its weight
        shape = (1, height, width, heads, 32)
        routes = (1, num_regions**2, topk)
        regions = REGISTERED.make_geometry(num_regions, num_regions, *size)
        count = REGISTERED.count_macs([shape] * 3 + [routes, None, None], regions)
        assert count == by_hand == pytest.approx(millions * 1e6, rel=0.005)


def test_padded_queries_count_nothing_and_padded_keys_do():
    inputs = make_inputs(Case((7, 9), (3, 4), 5, pads=PADS, value_dim=6), torch.float32)
    with FlopCounterMode(display=False) as counter:
        routing_attention(**{name: inputs[name] for name in TENSORS}, num_regions=(3, 4))
    assert counter.get_total_flops() == 2 * (7 * 9 * 2) * (5 * 9) * (8 + 6)


class Ragged(nn.Module):
    """Routing attention whose regions have a size, as many as cover the map."""

    def forward(self, x):
        query, key, value = x.unflatten(-1, (3, 2, 4)).unbind(-3)
        size = tuple(maximum(1, length // 3) for length in x.shape[1:3])
        routes = route_regions(query, key, 3, 4, region_size=size)
        return routing_attention(query, key, value, routes, 3, region_size=size)


class Padded(nn.Module):
    """Routing attention whose regions have sizes that follow the map, which is padded."""

    def forward(self, x):
        query, key, value = x.unflatten(-1, (3, 2, 4)).unbind(-3)
        pads = x.new_ones(3, 2, 4)
        routes = route_regions(query, key, 3, 4, pad_query=pads[0], pad_key=pads[1])
        return routing_attention(query, key, value, routes, 3, pad_key=pads[1], pad_value=pads[2])


def maps(*size):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*size, 24, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("model", "sizes"),
    # Regions of one token, and fewer tokens than regions, in the padded form.
    [
        (Ragged(), ((5, 7), (12, 9), (4, 11), (13, 13))),
        (Padded(), ((5, 7), (12, 9), (2, 2), (3, 8))),
    ],
    ids=["ragged", "padded"],
)
def test_one_graph_serves_maps_that_regions_divide_and_others(model, sizes):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for batch, size in enumerate(sizes):
        x = maps(batch + 3, *size)
        torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1
    lowest = min(map(min, sizes))
    axes = {0: Dim("batch", min=1), 1: Dim("height", min=lowest), 2: Dim("width", min=lowest)}
    program = torch.export.export(model, (maps(3, *sizes[0]),), dynamic_shapes=(axes,))
    for size in sizes:
        torch.testing.assert_close(program.module()(maps(1, *size)), model(maps(1, *size)))


def test_known_routes_give_the_same_and_are_not_looked_at():
    case = Case((7, 9), (3, 4), 5, pads=PADS)
    inputs = make_inputs(case)
    tensors = {name: inputs[name] for name in TENSORS}
    results, reads = [], []
    for function in (routing_attention, attend_known_routes):
        with CountReads() as counter, runtime.use_backend("reference"):
            results.append(function(**tensors, **case.arguments))
        reads.append(counter.number)
    assert torch.equal(*results)
    assert reads == [2, 0]


def test_vmap_of_the_routing_gives_what_a_loop_does():
    inputs = make_inputs(Case((7, 9), (3, 4), 5, batch=3))
    query, key = inputs["query"], inputs["key"]

    def route(query, key):
        return route_regions(query, key, (3, 4), 5).sort().values

    mapped = vmap(route)(query.unsqueeze(1), key.unsqueeze(1))
    assert torch.equal(mapped.squeeze(1), route(query, key))


def test_the_routing_has_no_gradient_and_takes_none():
    inputs = make_inputs(Case((7, 9), (3, 4), 5))
    query, key = (inputs[name].detach().requires_grad_() for name in ("query", "key"))
    pads = torch.zeros(2, 2, 8, dtype=torch.float64, requires_grad=True)
    routes = route_regions(query, key, (3, 4), 5, pad_query=pads[0], pad_key=pads[1])
    assert not routes.requires_grad and routes.grad_fn is None

"""Attention maps hold the weights with which layers take up their values, and the rest of them."""

import pytest
import torch
from oracles import image, relative_error
from torch import nn

from densezoo.backbones.biformer import GlobalAttention
from densezoo.backbones.faster_vit_blocks import Block as FasterViTBlock
from densezoo.backbones.faster_vit_blocks import Grid
from densezoo.backbones.gc_vit import Block as GCViTBlock
from densezoo.backbones.maxvit import PartitionAttention
from densezoo.backbones.nat_isotropic import FullAttention
from densezoo.layers.neighborhood_attention import NeighborhoodAttention
from densezoo.layers.resolution import pad_to_windows
from densezoo.layers.routing_attention import RoutingAttention
from densezoo.layers.window_attention import attend_to_real_tokens
from densezoo.layers.windows import merge, partition

HEADS, DIM = 2, 16
SIZE = (9, 11)
POINTS = [(0, 0), (4, 7), (8, 10)]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def noisy(module):
    """The module in float64, every parameter noise, so that no two weights are alike."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.double().parameters():
        parameter.normal_(std=0.5, generator=generator)
    return module.eval()


def tokens(height, width, seed=0):
    return image(height, width, chans=DIM, seed=seed).double().permute(0, 2, 3, 1)


def check(maps, size, values, out, elsewhere=0.0):
    """Compare sums of the values by the weights with what attention gives.

    Args:
        maps: the `AttentionMaps` of POINTS.
        size: height and width of the map.
        values: (H, W, C) of the map, heads after each other.
        out: (H, W, C), before the output projection.
        elsewhere: the value of all that is not on the map, (C,).
    """
    assert maps.weights.shape == (len(POINTS), HEADS, *size)
    assert (maps.weights >= 0).all()
    total = maps.weights.sum((2, 3)) + maps.elsewhere
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)
    found = torch.einsum("phyx,yxhc->phc", maps.weights, values.unflatten(-1, (HEADS, -1)))
    rest = torch.as_tensor(elsewhere).expand(DIM).unflatten(0, (HEADS, -1))
    found = (found + maps.elsewhere[..., None] * rest).flatten(1)
    expected = torch.stack([out[row, column] for row, column in POINTS])
    assert relative_error(found, expected) < 1e-12


@pytest.mark.parametrize("dilation", [1, 3], ids=["whole", "padded"])
def test_those_of_neighborhood_attention_and_of_its_padding(dilation):
    attn, x = noisy(NeighborhoodAttention(DIM, HEADS, 5, dilation)), tokens(*SIZE)
    attn.proj = nn.Identity()
    ((kind, maps),) = attn.attention_maps(x, size=SIZE, points=POINTS).items()
    check(maps, SIZE, attn.qkv(x)[0, ..., -DIM:], attn(x)[0], attn.qkv.bias[-DIM:])
    assert kind == ("neighborhood 5x5, dilation 3" if dilation > 1 else "neighborhood 5x5")
    assert (maps.weights > 0).sum((2, 3)).max() <= 25
    assert (maps.elsewhere > 0).any() == (dilation == 3)


@pytest.mark.parametrize("family", ["vitrpb", "biformer"])
def test_those_of_attention_to_all_positions(family):
    if family == "vitrpb":
        attn = noisy(FullAttention(DIM, HEADS, SIZE))
    else:
        attn = noisy(GlobalAttention(DIM, HEADS, lepe_of_values=True))
        attn.lepe.weight.zero_()
        attn.lepe.bias.zero_()
    attn.proj, x = nn.Identity(), tokens(*SIZE)
    ((kind, maps),) = attn.attention_maps(x, size=SIZE, points=POINTS).items()
    check(maps, SIZE, attn.qkv(x)[0, ..., -DIM:], attn(x)[0])
    assert kind == "all positions" and (maps.weights > 0).all()


@pytest.mark.parametrize("is_grid", [False, True], ids=["window", "grid"])
@pytest.mark.parametrize("size", [SIZE, (10, 12)], ids=["padded", "whole"])
def test_those_of_windows_and_grids_and_none_of_padding(size, is_grid):
    part, x = noisy(PartitionAttention(DIM, HEADS, (5, 4), 0.0, is_grid=is_grid)), tokens(*size)
    part.attn.proj = nn.Identity()
    ((kind, maps),) = part.attention_maps(x, size=size, points=POINTS).items()
    normed = part.norm1(x)
    out = attend_to_real_tokens(normed, part.attn, is_grid=is_grid)
    check(maps, size, part.attn.qkv(normed)[0, ..., -DIM:], out[0])
    assert kind == ("grid 5x4" if is_grid else "window 5x4")
    assert (maps.weights > 0).sum((2, 3)).max() <= 20 and not maps.elsewhere.any()


@pytest.mark.parametrize("is_global", [False, True], ids=["local", "global"])
@pytest.mark.parametrize("size", [SIZE, (10, 12)], ids=["padded", "whole"])
def test_those_of_windows_with_queries_of_the_whole_map_and_of_padding(size, is_global):
    block = GCViTBlock(
        DIM, HEADS, (5, 4), is_global=is_global, mlp_ratio=1, layer_scale=None, rate=0.0
    )
    block, x = noisy(block), tokens(*size)
    block.attn.proj = nn.Identity()
    query = tokens(5, 4, seed=1).flatten(1, 2).unflatten(-1, (HEADS, -1)) if is_global else None
    linear = block.attn.kv if is_global else block.attn.qkv
    normed = block.norm1(x)
    out, values = block._attend(normed, query)[0], linear(normed)[0, ..., -DIM:]
    if size != SIZE:  # as a stage gives a map that needs no padding
        x = partition(x, (5, 4)).unflatten(1, (5, 4))[None]
    ((kind, maps),) = block.attention_maps(x, query, size=size, points=POINTS).items()
    check(maps, size, values, out, linear.bias[-DIM:])
    assert kind == ("window 5x4, query of all" if is_global else "window 5x4")
    assert (maps.elsewhere > 0).any() == (size == SIZE)


def faster_vit(has_carriers):
    """A block, its windows of the map, which has padding, and their grid of carriers."""
    side = 4
    block = noisy(
        FasterViTBlock(
            DIM, HEADS, side, 1.0, None, 0.0,
            has_carriers=has_carriers, propagates=False, origin=None,
        )
    )  # fmt: skip
    padded = pad_to_windows(tokens(*SIZE), (side, side))
    windows = partition(padded, (side, side))
    if not has_carriers:
        return block, windows, None
    carriers = tokens(len(windows), 4, seed=1)[0]
    return block, torch.cat([carriers, windows], 1), Grid.of(padded, 3, 3)


def watch(attn, num_others):
    """Note an attention's values and its results before the projection, as it runs.

    The values of the first `num_others` tokens, and of padding, are set to zero: what is left of
    the results comes from the map.
    """
    seen = {}

    def change_values(module, args, out):
        values = out[..., -DIM:].clone()
        values[:, :num_others] = 0
        values[:, num_others:] *= partition(torch.ones(1, *SIZE, 1), (4, 4))
        seen["values"] = values[:, num_others:]
        return torch.cat([out[..., :-DIM], values], -1)

    attn.qkv.register_forward_hook(change_values)
    attn.proj.register_forward_pre_hook(lambda module, args: seen.update(out=args[0]))
    return seen


def as_map(windows):
    return merge(windows, (4, 4), *SIZE)[0]


@pytest.mark.parametrize("has_carriers", [False, True], ids=["alone", "carriers"])
def test_those_of_windows_beside_carriers(has_carriers):
    block, windows, grid = faster_vit(has_carriers)
    num_carriers = 4 * has_carriers
    maps = list(block.attention_maps(windows, grid, size=SIZE, points=POINTS).values())[-1]
    seen = watch(block.windows.attn, num_carriers)
    block(windows, grid)
    check(maps, SIZE, as_map(seen["values"]), as_map(seen["out"][:, num_carriers:]))
    inside = maps.elsewhere[0]  # the first window has no padding
    assert (inside > 0).all() if has_carriers else not inside.any()


def test_those_of_the_carrier_that_covers_a_position():
    block, windows, grid = faster_vit(has_carriers=True)
    maps = block.attention_maps(windows, grid, size=SIZE, points=POINTS)["carriers"]
    seen = {}
    attn = block.carriers.attn
    attn.qkv.register_forward_hook(lambda module, args, out: seen.update(values=out[..., -DIM:]))
    attn.proj.register_forward_pre_hook(lambda module, args: seen.update(out=args[0]))
    block(windows, grid)
    values, out = (seen[name][0].unflatten(0, (6, 6)) for name in ("values", "out"))
    # Two carriers along a side of four positions.
    per_position = out.repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert maps.cell == (2, 2)
    check(maps, (6, 6), values, per_position)


@pytest.mark.parametrize("is_ragged", [False, True], ids=["padded", "ragged"])
def test_those_of_routing_attention_and_of_its_padding(is_ragged):
    attn = RoutingAttention(
        DIM, HEADS, 4, 3, is_ragged=is_ragged, lepe_kernel_size=0, has_proj=False
    )
    attn, x = noisy(attn), tokens(*SIZE)
    ((kind, maps),) = attn.attention_maps(x, size=SIZE, points=POINTS).items()
    padding = 0.0 if is_ragged else attn.qkv.bias[-DIM:]
    check(maps, SIZE, attn.qkv(x)[0, ..., -DIM:], attn(x)[0], padding)
    routed = attn.routed_regions(x, size=SIZE, points=POINTS)
    # Of 9 x 11 positions 4 regions a side, of 3 x 3 positions; ragged ones have 2 x 2.
    assert (routed.grid, routed.size) == (((5, 6), (2, 2)) if is_ragged else ((4, 4), (3, 3)))
    assert kind == ("3 of 30 regions" if is_ragged else "3 of 16 regions")
    rows, columns = routed.size
    for i, (row, column) in enumerate(POINTS):
        assert routed.regions[i] == row // rows * routed.grid[1] + column // columns
        used = maps.weights[i].sum(0).nonzero()
        regions = {int(r) // rows * routed.grid[1] + int(c) // columns for r, c in used}
        padded = {r for r in routed.routes[i] if r not in regions}
        assert regions <= set(routed.routes[i]) and len(routed.routes[i]) == 3
        assert not padded or maps.elsewhere[i].min() > 0


def test_those_of_copies_that_are_no_positions_are_refused():
    attn = RoutingAttention(DIM, HEADS, 3, 2, soft_routing=True)
    with pytest.raises(ValueError, match="without soft_routing"):
        attn.attention_maps(
            image(9, 9, chans=DIM).permute(0, 2, 3, 1), size=(9, 9), points=[(0, 0)]
        )

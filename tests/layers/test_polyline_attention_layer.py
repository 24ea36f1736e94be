"""The layer of polyline attention: rotation, decays, LePE, and what it shows of itself."""

import copy
import math

import pytest
import torch
from oracles import image, relative_error
from torch.nn import functional as F

from densezoo.layers.polyline_attention import FixedDecays, PolylineAttention, TokenDecays
from densezoo.layers.rotary import raster_rotation, rotate, rotation_speeds

FORMS = [(form, paths) for form in ("full", "axial") for paths in ("both", "row_first")]
every_form = pytest.mark.parametrize("form, paths", FORMS)
SIZES = [(4, 5), (1, 6), (5, 1), (1, 1)]


def tokens(*size, dim=16, batch=1, seed=0):
    return image(*size, batch=batch, chans=dim, seed=seed).double().permute(0, 2, 3, 1)


def noisy(*args, seed=0, **kwargs):
    """A layer in float64 whose every parameter is noise."""
    attn = PolylineAttention(*args, **kwargs).double().eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in attn.parameters():
        parameter.data.normal_(std=0.5, generator=generator)
    return attn


def walk(alpha, beta, corner, start, end):
    """The log decays of the steps from `start` by way of `corner` to `end`, token by token.

    A step's decay is that of its token with the higher index.
    """
    total, here = 0.0, start
    for target in (corner, end):
        while here != target:
            steps = [(target[a] > here[a]) - (target[a] < here[a]) for a in (0, 1)]
            there = here[0] + steps[0], here[1] + steps[1]
            axis = 0 if steps[0] else 1
            total += float((beta if axis == 0 else alpha)[max(here, there, key=lambda p: p[axis])])
            here = there
    return total


def definition(attn, x):
    """The layer by its definition: every weight of every pair of tokens, one head at a time."""
    _, height, width, dim = x.shape
    places = [(i, j) for i in range(height) for j in range(width)]
    head_dim, outs = dim // attn.num_heads, []
    linear = attn.q_proj, attn.k_proj, attn.v_proj
    for image_of in x:
        heads = []
        query, key, value = (layer(image_of).flatten(0, 1) for layer in linear)
        log_alpha, log_beta = (d[0] for d in attn.decays(image_of[None]))
        for g in range(attn.num_heads):
            own = slice(g * head_dim, (g + 1) * head_dim)
            q, k, v = query[:, own], key[:, own] * head_dim**-0.5, value[:, own]
            q, k = turned(q), turned(k)
            alpha, beta = log_alpha[..., g], log_beta[..., g]
            logits = q @ k.T
            first, second = torch.empty_like(logits), torch.empty_like(logits)
            for a, start in enumerate(places):
                for b, end in enumerate(places):
                    first[a, b] = walk(alpha, beta, (start[0], end[1]), start, end)
                    second[a, b] = walk(alpha, beta, (end[0], start[1]), start, end)
            if attn.form == "full":
                paths = [(logits + first).softmax(-1), (logits + second).softmax(-1)]
            else:
                rows, columns = (torch.tensor([p[i] for p in places]) for i in (0, 1))
                far = logits.new_full((), -torch.inf)
                row = (logits + first).where(rows[:, None] == rows, far).softmax(-1)
                column = (logits + first).where(columns[:, None] == columns, far).softmax(-1)
                paths = [column @ row, row @ column]
            weights = sum(paths) / 2 if attn.paths == "both" else paths[0]
            heads.append(weights @ v)
        lepe = attn.lepe(value.T.unflatten(1, (height, width))[None])[0].permute(1, 2, 0)
        outs.append(attn.proj(torch.cat(heads, -1).unflatten(0, (height, width)) + lepe))
    return torch.stack(outs)


def turned(x):
    """Tokens (N, D), N row by row, turned by numbers of plain Python."""
    speeds = torch.tensor(rotation_speeds(x.shape[1])).tolist()  # as float32 numbers
    angles = [[n * speed for speed in speeds] for n in range(len(x))]
    turns = [[complex(math.cos(a), math.sin(a)) for a in row] for row in angles]
    pairs = torch.complex(x[:, 0::2].contiguous(), x[:, 1::2].contiguous())
    return torch.view_as_real(pairs * torch.tensor(turns, dtype=torch.complex128)).flatten(1)


@every_form
@pytest.mark.parametrize("decay_range", [None, 4], ids=["decays of tokens", "fixed decays"])
def test_it_is_its_definition_on_maps_of_any_size(form, paths, decay_range):
    attn = noisy(16, 2, form=form, paths=paths, decay_range=decay_range)
    for batch, size in enumerate(SIZES, 1):
        x = tokens(*size, batch=batch)
        expected = definition(attn, x)
        assert relative_error(attn(x), expected) < 1e-9, size
        with torch.no_grad():  # by other kernels
            assert relative_error(attn(x), expected) < 1e-9, size


@every_form
def test_float32_inference_takes_no_other_function(form, paths):
    attn = noisy(64, 4, form=form, paths=paths)
    x = tokens(12, 10, dim=64, batch=2)
    expected = attn(x)
    with torch.no_grad():
        assert relative_error(attn.float()(x.float()), expected) < 1e-4


# Rotation


def test_speeds_are_the_published_ones_and_their_formula():
    for head_dim in (2, 8, 16, 32, 64):
        speeds = torch.tensor(rotation_speeds(head_dim), dtype=torch.float64)
        exponent = torch.linspace(0, 1, head_dim // 2, dtype=torch.float64)
        assert torch.allclose(speeds, 10000**-exponent, rtol=1e-6, atol=0)
    # Rounded to float32, which is visible in float64.
    rotation = raster_rotation(1, 2, 1, 32, like=torch.ones((), dtype=torch.float64))
    angle = math.atan2(*rotation[0, 1, 0, 1].tolist()[::-1])
    assert angle == pytest.approx(float(torch.tensor(0.541169524)), abs=1e-15)


def test_channels_turn_by_the_index_of_a_token_row_by_row():
    x = tokens(3, 4, dim=16, batch=2).contiguous().unflatten(-1, (2, 8))
    rotation = raster_rotation(3, 4, 2, 8, like=x)
    out = rotate(x, rotation)
    assert torch.equal(out[:, 0, 0], x[:, 0, 0])
    for b in range(2):
        for head in range(2):
            expected = turned(x[b, :, :, head].flatten(0, 1))
            assert relative_error(out[b, :, :, head].flatten(0, 1), expected) < 1e-12
    assert relative_error(torch.vmap(lambda one: rotate(one[None], rotation)[0])(x), out) < 1e-12
    half = rotate(x.half(), raster_rotation(3, 4, 2, 8, like=x.half()))
    assert half.dtype == torch.float16 and relative_error(half, out) < 2e-3


def test_rotations_are_kept_apart_by_size_type_and_heads_and_serve_training():
    like = torch.ones(())
    with torch.inference_mode():
        kept = raster_rotation(6, 7, 2, 8, like=like)
        assert raster_rotation(6, 7, 2, 8, like=like) is kept
        assert raster_rotation(7, 6, 2, 8, like=like).shape[:2] == (7, 6)
        assert raster_rotation(6, 7, 3, 8, like=like).shape[2] == 3
        assert raster_rotation(6, 7, 2, 8, like=like.double()).dtype == torch.float64
    x = torch.ones(1, 6, 7, 2, 8, requires_grad=True)
    rotate(x, raster_rotation(6, 7, 2, 8, like=like)).sum().backward()
    assert x.grad.isfinite().all()
    assert not [name for name in PolylineAttention(16, 2).state_dict() if "rot" in name]


# Decays


def test_decays_of_tokens_are_their_formula():
    torch.manual_seed(0)
    decays = TokenDecays(4, 3).double()
    decays.proj.weight.data.normal_(std=8)  # beyond 20, where softplus is its argument
    x = tokens(2, 3, dim=12)
    for way, found in enumerate(decays(x)):
        assert found.shape == (1, 2, 3, 3) and (found < 0).all()
        for g in range(3):
            steps = x[..., 4 * g : 4 * g + 4] @ decays.proj.weight[way] + decays.step_bias[g]
            expected = -decays.log_rate[g].exp() * torch.log1p(steps.exp())
            assert torch.allclose(found[..., g], expected, rtol=1e-8, atol=1e-12)


def test_decays_in_inference_are_precise_from_tiny_to_large_steps():
    decays = TokenDecays(1, 1)
    decays.proj.weight.data.fill_(1)
    x = torch.linspace(-80, 80, 40001)
    with torch.inference_mode():
        found = decays(x.view(1, -1, 1, 1)).flatten(1).double()
        rate = decays.log_rate.exp().double()
        # The sum as float32 has it: its rounding is not softplus's.
        steps = (x + decays.step_bias).double()
    expected = -rate * torch.log1p(steps.exp())
    torch.testing.assert_close(found, expected.expand(2, -1), rtol=1e-6, atol=0)


def test_decays_begin_as_published():
    torch.manual_seed(0)
    decays = TokenDecays(8, 2000)
    rates, steps = decays.log_rate.detach().exp(), F.softplus(decays.step_bias.detach())
    assert (
        rates.min() >= 1 and rates.max() <= 1.1 and float(rates.mean()) == pytest.approx(1.05, 0.01)
    )
    assert steps.min() > 0.99e-3 and steps.max() < 0.101
    # Uniform in their logarithm: the median is the mean of the ends there.
    assert float(steps.median()) == pytest.approx(0.01, rel=0.1)


def test_fixed_decays_are_their_formula_in_float32():
    along_rows, along_columns = FixedDecays(4, 6.0)(tokens(2, 3))
    assert torch.equal(along_rows, along_columns) and along_rows.dtype == torch.float64
    for g in range(4):
        assert along_rows[0, 1, 2, g].item() == pytest.approx(
            math.log(1 - 2 ** (-2 - 1.5 * g)), 1e-5
        )
        (own,) = along_rows[..., g].unique()
        assert own.item() == own.float().item()


def test_decays_and_rotation_are_of_float32_at_least():
    attn = PolylineAttention(16, 2).bfloat16()
    x = tokens(5, 6).bfloat16()
    assert {d.dtype for d in attn.decays(x)} == {torch.float32}
    assert raster_rotation(5, 6, 2, 8, like=x).dtype == torch.float32
    assert attn(x).dtype == torch.bfloat16


# Pictures


@every_form
def test_attention_maps_are_the_weights_of_the_values(form, paths):
    attn = noisy(16, 2, form=form, paths=paths)
    x, points = tokens(4, 5), [(0, 0), (2, 3), (3, 4)]
    ((kind, maps),) = attn.attention_maps(x, size=(4, 5), points=points).items()
    assert kind == f"{form}, {'both paths' if paths == 'both' else 'one path'}"
    assert maps.weights.shape == (3, 2, 4, 5) and maps.cell == (1, 1)
    assert torch.allclose(maps.weights.sum((2, 3)), torch.ones(3, 2).double())
    assert not maps.elsewhere.any()
    value = attn.v_proj(x)
    lepe = attn.lepe(value.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    heads = torch.einsum("phij,ijhd->phd", maps.weights, value[0].unflatten(-1, (2, 8))).flatten(1)
    expected = attn(x)[0]
    for (i, j), head in zip(points, heads, strict=True):
        assert relative_error(attn.proj(head + lepe[0, i, j]), expected[i, j]) < 1e-9


@every_form
def test_polyline_masks_are_the_products_of_decays_along_paths(form, paths):
    attn = noisy(16, 2, form=form, paths=paths)
    x, points = tokens(3, 4), [(0, 3), (1, 1)]
    masks = attn.polyline_masks(x, size=(3, 4), points=points)
    assert masks.shape == (2, 3, 4, 2)
    log_alpha, log_beta = (d[0] for d in attn.decays(x))
    for p, (i, j) in enumerate(points):
        for g in range(2):
            assert float(masks[p, i, j, g]) == 1
            for k in range(3):
                for m in range(4):
                    along = [
                        math.exp(walk(log_alpha[..., g], log_beta[..., g], corner, (i, j), (k, m)))
                        for corner in ((i, m), (k, j))
                    ]
                    # Of axial weights those of the column come first in the path.
                    one = along[0] if form == "full" else along[1]
                    expected = sum(along) / 2 if paths == "both" else one
                    assert float(masks[p, k, m, g]) == pytest.approx(expected, rel=1e-9)


def test_copies_and_traces_are_of_the_same_function():
    attn = noisy(16, 2)
    x = tokens(4, 5)
    assert torch.equal(copy.deepcopy(attn)(x), attn(x))
    with torch.no_grad():
        traced = torch.jit.trace(attn, x, check_trace=False)
        assert relative_error(traced(x + 1), attn(x + 1)) < 1e-12


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(dim=0), "dim is 0"),
        (dict(num_heads=0), "num_heads is 0"),
        (dict(num_heads=3), "num_heads is 3: a divisor of dim 16"),
        (dict(num_heads=16), "num_heads is 16: .* even number of channels"),
        (dict(form="rows"), "form is 'rows': one of full, axial is taken"),
        (dict(paths="column_first"), "paths is 'column_first': one of both, row_first is taken"),
        (dict(decay_range=-1), "decay_range is -1"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        PolylineAttention(**{**dict(dim=16, num_heads=2), **arguments})


def test_an_odd_head_dim_does_not_turn():
    with pytest.raises(ValueError, match="head_dim is 5: an even number"):
        rotation_speeds(5)

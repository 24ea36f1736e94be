"""Linear layers and the MLP made of them: the fast CPU inference path equals the plain one."""

import pytest
import torch
from oracles import relative_error
from torch.autograd import forward_ad
from torch.nn import functional as F

from densezoo.layers import mlp
from densezoo.layers.linear import Linear
from densezoo.layers.mlp import Mlp


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gelu_of(x, form):
    if form is False:
        return x
    return F.gelu(x, approximate="tanh" if form == "tanh" else "none")


@pytest.mark.parametrize("gelu", [False, True, "exact", "tanh"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 24), (2, 7, 3, 24), (1, 0, 24)], ids=str)
def test_inference_equals_pytorchs_layer(gelu, bias, shape):
    torch.manual_seed(0)
    layer, x = Linear(24, 40, bias, gelu=gelu), noise(*shape)
    expected = F.linear(x, layer.weight, layer.bias)
    expected = gelu_of(expected, gelu)
    with torch.no_grad():
        actual = layer(x)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(layer(x), expected)  # under autograd


def test_inputs_of_any_strides_are_taken():
    torch.manual_seed(0)
    layer, x = Linear(24, 40), noise(2, 24, 5, 6).permute(0, 2, 3, 1)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer(x.contiguous()))


def test_the_two_gelus_are_told_apart():
    torch.manual_seed(0)
    exact, tanh = (Linear(24, 40, gelu=form) for form in ("exact", "tanh"))
    tanh.load_state_dict(exact.state_dict())
    x = noise(50, 24)
    with torch.no_grad():
        assert 1e-5 < (exact(x) - tanh(x)).abs().max() < 1e-3
    assert "gelu='tanh'" in repr(tanh) and "gelu" not in repr(Linear(24, 40))
    for gelu in ("relu", 1, None):
        with pytest.raises(ValueError, match=f"gelu is {gelu!r}"):
            Linear(24, 40, gelu=gelu)


@pytest.mark.parametrize("gelu", ["exact", "tanh"])
def test_the_mlp_equals_its_formula_however_many_pieces_it_is_computed_in(gelu, monkeypatch):
    torch.manual_seed(0)
    layer, x = Mlp(8, 24, gelu=gelu), noise(2, 5, 7, 8)
    hidden = gelu_of(F.linear(x, layer.fc1.weight, layer.fc1.bias), gelu)
    expected = F.linear(hidden, layer.fc2.weight, layer.fc2.bias)
    assert relative_error(layer(x), expected) < 1e-6
    pieces = []
    layer.fc1.register_forward_hook(lambda module, args, output: pieces.append(len(output)))
    for values, count in ((2**22, 1), (24 * 69, 70 // 3 + 1)):
        monkeypatch.setattr(mlp, "_MOST_HIDDEN_VALUES", values)
        monkeypatch.setattr(mlp, "_HIDDEN_VALUES", 24 * 3)
        pieces.clear()
        with torch.no_grad():
            assert relative_error(layer(x), expected) < 1e-6
        assert len(pieces) == count


@pytest.mark.parametrize("width", [0, 23, 48])
def test_an_input_of_another_width_is_refused_as_by_pytorchs_layer(width):
    with torch.no_grad(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Linear(24, 40)(noise(2, 5, width))


def test_forward_mode_derivatives_are_not_lost_in_inference():
    torch.manual_seed(0)
    layer, x = Linear(24, 40), noise(5, 24)
    with torch.no_grad(), forward_ad.dual_level():
        out = layer(forward_ad.make_dual(x, torch.ones_like(x)))
        tangent = forward_ad.unpack_dual(out).tangent
    torch.testing.assert_close(tangent, layer.weight.sum(1).expand(5, 40))


def test_hidden_sizes_below_one_are_named():
    with pytest.raises(ValueError, match="hidden_dim is 0"):
        Mlp(8, 0)

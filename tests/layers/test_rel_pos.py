"""Position biases and embeddings are as defined, and kept only as long as their weights last."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from densezoo.layers import rel_pos
from densezoo.layers.rel_pos import (
    MlpPosEmbed,
    MlpRelPosBias,
    RelPosBias,
    WeightCache,
    rel_pos_bias_of_pairs,
    resize_rel_pos_bias,
)


def table(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("size", [(5, 5), (13, 13), (21, 25)], ids=str)
def test_a_resized_table_keeps_heads_centre_and_level(size):
    heads = torch.tensor([1.0, -2.0, 3.0])[:, None, None]
    level = resize_rel_pos_bias(heads.expand(3, 9, 9), size)
    assert level.shape == (3, *size)
    assert torch.allclose(level, heads)
    peak = torch.zeros(1, 9, 9)
    peak[0, 4, 4] = 1
    resized = resize_rel_pos_bias(peak, size)[0]
    assert resized.argmax() == resized.numel() // 2
    assert resized.max() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("size", [(9, 9), (21, 25)], ids=str)
def test_opposite_offsets_stay_opposite(size):
    original = table(2, 13, 13)
    resized = resize_rel_pos_bias(original.flip(1, 2), size).flip(1, 2)
    assert torch.allclose(resized, resize_rel_pos_bias(original, size), atol=1e-6)


def test_resizing_to_the_same_size_changes_nothing_and_keeps_the_dtype():
    original = table(2, 13, 13)
    assert torch.allclose(resize_rel_pos_bias(original, (13, 13)), original, atol=1e-6)
    assert resize_rel_pos_bias(original.bfloat16(), (21, 21)).dtype == torch.bfloat16
    assert resize_rel_pos_bias(original.double(), (21, 21)).dtype == torch.float64


@pytest.mark.parametrize("shape, size", [((2, 12, 13), (5, 5)), ((2, 13, 13), (5, 6))], ids=str)
def test_even_sides_are_refused(shape, size):
    with pytest.raises(ValueError, match="odd sides"):
        resize_rel_pos_bias(torch.zeros(shape), size)


def test_the_bias_of_a_pair_is_the_entry_of_its_offset():
    height, width = 3, 4
    original = table(2, 2 * height - 1, 2 * width - 1)
    bias = rel_pos_bias_of_pairs(original)
    assert bias.shape == (2, height * width, height * width)
    for query in range(height * width):
        for key in range(height * width):
            dy = key // width - query // width
            dx = key % width - query % width
            expected = original[:, dy + height - 1, dx + width - 1]
            assert torch.equal(bias[:, query, key], expected)


def test_bilinear_resizing_weighs_the_two_nearest_entries_of_either_axis():
    original = table(2, 5, 7)
    resized = resize_rel_pos_bias(original, (9, 7), "bilinear")
    for row in range(9):
        at = min(max((row + 0.5) * 5 / 9 - 0.5, 0), 4)
        low = min(int(at), 3)
        expected = original[:, low] * (low + 1 - at) + original[:, low + 1] * (at - low)
        assert torch.allclose(resized[:, row], expected, atol=1e-6)
    with pytest.raises(ValueError, match="mode is 'nearest'"):
        resize_rel_pos_bias(original, (9, 7), "nearest")


def test_an_embedding_is_the_mlp_of_coordinates_about_the_middle():
    torch.manual_seed(0)
    embed = MlpPosEmbed(6, 16).double()
    for size, origin in (((7, 4), (3, 2)), ((7, 7), (24, 24))):
        result = embed(size, None if origin[0] == 3 else origin)
        for row in range(size[0]):
            for column in range(size[1]):
                xy = [(row - origin[0]) / origin[0], (column - origin[1]) / origin[1]]
                hidden = F.linear(torch.tensor(xy).double(), embed.fc1.weight, embed.fc1.bias)
                expected = embed.fc2.weight @ hidden.relu()
                assert torch.allclose(result[row * size[1] + column], expected, atol=1e-6)


def test_a_bias_is_the_mlp_of_logarithmic_offsets_from_key_to_query():
    torch.manual_seed(0)
    bias, (height, width) = MlpRelPosBias(3, 16).double(), (3, 4)
    result = bias((height, width))
    assert result.shape == (3, 12, 12)
    for query in range(12):
        for key in range(12):
            u = []
            for d, n in ((query // 4 - key // 4, height), (query % 4 - key % 4, width)):
                t = 8 * d / (n - 1)
                u.append(math.copysign(math.log2(abs(t) + 1) / 3, t))
            hidden = F.linear(torch.tensor(u).double(), bias.fc1.weight, bias.fc1.bias)
            expected = 16 * (bias.fc2.weight @ hidden.relu()).sigmoid()
            assert torch.allclose(result[:, query, key], expected, atol=1e-5)  # float32 offsets
    assert torch.equal(rel_pos_bias_of_pairs(bias.table((height, width))), result)


def test_a_smaller_window_has_the_middle_of_the_table():
    bias = RelPosBias(2, (3, 4))
    whole = bias().view(2, 3, 4, 3, 4)
    assert torch.equal(bias((2, 3)), whole[:, :2, :3, :2, :3].reshape(2, 6, 6))


def modules():
    torch.manual_seed(0)
    return [
        (RelPosBias(2, (3, 4)), ()),
        (MlpRelPosBias(2, 8), ((3, 4),)),
        (MlpPosEmbed(6, 8), ((3, 4),)),
    ]


def steps(module, arguments):
    """Ways of changing weights, each of which writes all of a module's."""
    names = [name for name, _ in module.named_parameters()]

    def optimizer():
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
        module(*arguments).square().mean().backward()
        optimizer.step()

    def load():
        module.load_state_dict({name: p + 1 for name, p in module.state_dict().items()})

    def load_and_assign():
        state = {name: p + 1 for name, p in module.state_dict().items()}
        module.load_state_dict(state, assign=True)

    def data():
        for parameter in module.parameters():
            parameter.data.add_(1)

    def swap_data():
        for parameter in module.parameters():
            parameter.data = parameter.data + 1

    def one_element():
        weight = module.get_parameter(names[-1])
        weight.data.view(-1)[-1] += 1

    def numpy():
        for parameter in module.parameters():
            parameter.detach().numpy()[...] += 1

    def double():
        module.double()

    return [optimizer, load, load_and_assign, data, swap_data, one_element, numpy, double]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_every_change_of_a_weight_is_noticed(mode):
    for module, arguments in modules():
        for step in steps(module, arguments):
            with mode():
                before = module(*arguments)
                assert module(*arguments) is before  # kept
            step()
            with mode():
                after = module(*arguments)
                torch.testing.assert_close(after, compute(module, arguments))
            if step.__name__ == "double":
                assert after.dtype == torch.float64
            else:
                assert not torch.equal(after, before), step.__name__


def compute(module, arguments):
    """The module's result under autograd, which keeps nothing."""
    with torch.enable_grad():
        return module(*arguments).detach()


def test_weights_without_a_version_counter_are_compared_as_well():
    bias = RelPosBias(2, (3, 4))
    with torch.inference_mode():
        bias.table = nn.Parameter(bias.table.clone(), requires_grad=False)
        before = bias()
        assert bias() is before
        bias.table.add_(1)
        assert torch.equal(bias(), before + 1)


def test_a_functional_call_gets_the_result_of_its_own_weights():
    bias = RelPosBias(2, (3, 4))
    with torch.no_grad():
        before = bias()
        other = torch.func.functional_call(bias, {"table": bias.table + 1}, ())
        assert torch.equal(other, before + 1)
        assert torch.equal(bias(), before)


def test_what_is_kept_is_in_no_state_dict_copy_or_pickle(tmp_path):
    for module, arguments in modules():
        with torch.no_grad():
            expected = module(*arguments)
        assert len(module._cache.entries) > 0
        assert set(module.state_dict()) == {name for name, _ in module.named_parameters()}
        torch.save(module, tmp_path / "module.pt")
        loaded = torch.load(tmp_path / "module.pt", weights_only=False)
        for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
            assert len(copied._cache.entries) == 0
            with torch.no_grad():
                assert torch.equal(copied(*arguments), expected)


def test_nothing_is_kept_where_a_call_is_recorded_or_transformed():
    for module, arguments in modules():

        def call(module=module, arguments=arguments):
            return module(*arguments)

        call()  # autograd
        with torch.no_grad():
            with torch.autocast("cpu", torch.bfloat16):
                call()
            torch.func.vmap(lambda x, call=call: x + call().sum())(torch.zeros(2))
            torch.compile(call, fullgraph=True, backend="eager")()
        torch.export.export(Caller(module, arguments), (torch.zeros(1),), strict=False)
        torch.jit.trace(Caller(module, arguments), torch.zeros(1), check_trace=False)
        assert len(module._cache.entries) == 0


class Caller(nn.Module):
    """A module of one input that gives another module's result."""

    def __init__(self, module, arguments):
        super().__init__()
        self.module, self.arguments = module.eval(), arguments

    @torch.no_grad()
    def forward(self, x):
        return x.sum() + self.module(*self.arguments)


def test_kept_results_are_bounded_in_number_and_in_size(monkeypatch):
    embed = MlpPosEmbed(6, 8)
    with torch.no_grad():
        for side in range(2, 12):
            embed((side, side))
            assert len(embed._cache.entries) <= embed._cache.size
        latest = embed((11, 11))
        assert embed((11, 11)) is latest
        monkeypatch.setattr(rel_pos, "_MOST_KEPT_VALUES", 12 * 12 * 6 - 1)
        assert embed((12, 12)) is not embed((12, 12))
        assert embed((11, 11)) is latest


def test_the_result_used_longest_ago_makes_room():
    cache, weight = WeightCache(2), torch.zeros(1)
    with torch.no_grad():
        for key in ("a", "b", "a", "c"):
            cache.get(key, (weight,), lambda: torch.zeros(1))
    assert [key[0] for key in cache.entries] == ["a", "c"]

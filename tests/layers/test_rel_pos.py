"""Tables of relative position biases: resizing keeps what they mean, and pairs are looked up."""

import pytest
import torch

from densezoo.layers.rel_pos import rel_pos_bias_of_pairs, resize_rel_pos_bias


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

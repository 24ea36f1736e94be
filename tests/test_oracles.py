"""The measures that other tests rely on."""

import torch
from oracles import PeakMemory, gradient_error, variants_by_shape, variants_of_families


def test_the_meter_of_memory_counts_what_autograd_keeps_and_frees():
    x = torch.zeros(2**18, requires_grad=True)  # 1 MiB, there before
    with PeakMemory() as memory:
        y = x
        for _ in range(10):
            y = y.exp()  # each keeps its result
        assert memory.live() == memory.peak == 10 * 2**20
        y.view(2, -1).sum().backward()
        del y
    assert memory.live() == 2**20  # the gradient
    assert 11 * 2**20 <= memory.peak <= 13 * 2**20


def test_names_of_too_many_parameters_are_tested_by_their_shapes_alone():
    names = {p.values[0] for p in variants_of_families(10_000_000)}
    assert names == {"cas_vit_xs", "cas_vit_s"}
    unmarked = {p.values[0] for p in variants_by_shape(10_000_000) if not p.marks}
    assert {n for n in unmarked if n.startswith("cas")} == {"cas_vit_xs", "cas_vit_m", "cas_vit_t"}


def test_each_design_of_a_family_has_a_name_that_is_tested_by_default():
    names = {p.values[0] for p in variants_of_families() if not p.marks}
    assert {"cas_vit_xs", "dinat_mini"} <= names and "dinat_s_tiny" not in names
    names = {p.values[0] for p in variants_of_families(every_design=True) if not p.marks}
    assert {"cas_vit_xs", "dinat_mini", "dinat_s_tiny"} <= names


def test_gradients_are_compared_by_their_own_size_and_rounding_by_that_of_the_largest():
    expected = [torch.ones(2), torch.full((2,), 0.01), torch.full((2,), 1e-9)]
    ones, small, rounding = expected
    assert abs(gradient_error([ones, 1.1 * small, rounding], expected) - 0.1) < 1e-6
    assert abs(gradient_error([ones, small, 1000 * rounding], expected) - 1e-6) < 1e-8

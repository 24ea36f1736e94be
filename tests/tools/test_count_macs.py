"""Parameters and MACs: against recorded figures, formulas of our own, and what it refuses."""

import json
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from densezoo.tools.cli import main
from densezoo.tools.count_macs import OPERATOR_HANDLES, count_macs

PARITY = Path(__file__).parents[1] / "data" / "parity"


def count_products(model, size):
    """MACs of convolutions and linear layers, by hooks on the modules that hold the weights."""
    total = 0

    def hook(module, inputs, output):
        nonlocal total
        total += module.weight.numel() * output.numel() // (output.shape[0] * output.shape[1])

    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    handles = [layer.register_forward_hook(hook) for layer in layers]
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, *size))
    for handle in handles:
        handle.remove()
    return total


@pytest.mark.parametrize("path", sorted(PARITY.glob("cas_vit_*.json")), ids=lambda path: path.stem)
def test_figures_equal_those_of_the_official_code(path):
    recorded = json.loads(path.read_text())
    model = timm.create_model(recorded["model_name"], **recorded["cases"][0]["model_kwargs"])
    report = count_macs(model, (224, 224))
    # The official head averages the last map with an operator that the recorded count left out.
    head_pooling = model.num_features * 7 * 7
    assert report.params == recorded["params"]
    assert report.macs == recorded["macs"]["224x224"] + head_pooling
    assert report.uncounted == {}


def test_products_at_an_odd_size_equal_the_formula_and_parts_add_up():
    size = (97, 131)
    model = timm.create_model("cas_vit_xs")
    report = count_macs(model, size)
    assert report.operators["conv"] + report.operators["linear"] == count_products(model, size)
    assert [part.name for part in report.parts] == [
        "stem", *(f"stages.{i}" for i in range(4)), "norm", "head",
    ]  # fmt: skip
    assert sum(part.params for part in report.parts) == report.params
    assert sum(part.macs for part in report.parts) == report.macs == sum(report.operators.values())
    assert report.flops == 2 * report.macs
    assert report.published is None


def test_attention_of_a_timm_model_counts_both_products():
    report = count_macs("vit_tiny_patch16_224")
    tokens, dim, blocks = 14 * 14 + 1, 192, 12
    assert report.operators["scaled_dot_product_attention"] == blocks * 2 * tokens**2 * dim
    assert report.uncounted == {}
    assert sum(part.params for part in report.parts) == report.params


def test_models_built_for_one_size_are_built_for_the_size_asked_for():
    report = count_macs("vit_tiny_patch16_224", (96, 160))
    tokens = 6 * 10 + 1
    assert report.operators["scaled_dot_product_attention"] == 12 * 2 * tokens**2 * 192


def test_matrix_products_of_any_rank_count_output_times_inner_size():
    class Products(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = nn.Parameter(torch.zeros(5, 7))
            self.vector = nn.Parameter(torch.zeros(7))

        def forward(self, x):  # (1, 3, 4, 5)
            return (x @ self.matrix) @ self.vector, torch.baddbmm(x[0], x[0, :, :, :4], x[0])

    report = count_macs(Products(), (4, 5))
    assert report.operators == {"matmul": 3 * 4 * 5 * 7 + 3 * 4 * 7, "baddbmm": 3 * 4 * 5 * 4}


def test_averages_count_alike_however_they_are_written():
    class Average(nn.Module):
        def __init__(self, average):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))
            self.average = average

        def forward(self, x):
            return self.average(x)

    averages = [
        lambda x: x.mean((2, 3)),
        lambda x: F.adaptive_avg_pool2d(x, 1),
        lambda x: F.avg_pool2d(x, 2),
    ]
    assert [count_macs(Average(f), (8, 6)).macs for f in averages] == [3 * 8 * 6] * 3


def test_an_operator_of_ones_own_is_listed_until_it_has_a_handle(monkeypatch):
    @torch.library.custom_op("densezoo_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)

        def forward(self, x):
            return twice(twice(self.conv(x)))

    report = count_macs(Model(), (4, 5))
    assert report.uncounted == {"densezoo_test::twice": 2}
    assert report.macs == 3 * 2 * 4 * 5
    monkeypatch.setitem(OPERATOR_HANDLES, "densezoo_test::twice", lambda inputs, outputs: 1000)
    report = count_macs(Model(), (4, 5))
    assert report.uncounted == {}
    assert report.macs == 3 * 2 * 4 * 5 + 2000


def test_a_given_model_is_left_in_its_modes():
    model = timm.create_model("cas_vit_xs", depths=(1, 1, 1, 1)).train()
    model.stem.eval()
    modes = [module.training for module in model.modules()]
    statistics = model.stages[0].blocks[0].norm1.running_mean.clone()
    count_macs(model, (32, 32))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model.stages[0].blocks[0].norm1.running_mean, statistics)


@pytest.mark.parametrize(
    ("model", "size", "message"),
    [
        ("cas_vit_sx", None, "cas_vit_xs"),
        ("resnet50.no_such_tag", None, "'resnet50' alone is enough"),
        ("hf-hub:somebody/model", None, "no name of a model"),
        ("cas_vit_xs", (0, 32), "the size is 0 32"),
        ("inception_v3", (8, 8), "inception_v3 does not run on an image of 3 channels, 8x8"),
        (nn.Conv2d(3, 3, 1), None, "a height and a width"),
    ],
)
def test_what_cannot_be_counted_is_a_value_error_that_says_so(model, size, message):
    with pytest.raises(ValueError, match=message):
        count_macs(model, size)


def test_a_missing_fvcore_is_an_import_error_that_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "fvcore.nn", None)
    with pytest.raises(ImportError, match=r"densezoo\[profile\]"):
        count_macs("cas_vit_xs", (32, 32))


def test_the_command_prints_published_figures_at_their_size_alone_and_no_warnings(capfd):
    assert main(["macs", "cas_vit_xs"]) == 0
    out, err = capfd.readouterr()
    assert "published" in out and "difference" in out and "not counted: nothing" in out
    assert err == ""
    assert main(["macs", "cas_vit_xs", "--size", "33", "65", "--in-chans", "4"]) == 0
    out, err = capfd.readouterr()
    assert "4 channels, 33x65 pixels" in out and "published" not in out
    assert err == ""


def test_published_figures_are_those_of_the_tag():
    report = count_macs("maxvit_tiny.in1k_384")
    assert report.size == (384, 384)
    assert report.published.gmacs == pytest.approx(report.macs / 1e9, rel=0.01)


def test_the_command_lists_what_it_could_not_count(capfd):
    assert main(["macs", "sequencer2d_s"]) == 0
    assert "not counted: aten::lstm (36 calls)" in capfd.readouterr().out


def test_the_command_turns_a_wrong_name_into_one_line(capfd):
    assert main(["macs", "cas_vit_sx"]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1 and "did you mean" in err

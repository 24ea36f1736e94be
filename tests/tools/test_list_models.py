"""The printed zoo: every model, with the figures of its registration."""

import pytest
import timm

from densezoo import list_backbones
from densezoo.backbones.registry import BACKBONES
from densezoo.tools.cli import main
from densezoo.tools.list_models import HEADER, describe_model, select_models, with_tags


def test_every_model_is_printed_with_the_page_of_its_weights(capfd):
    assert main(["list"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    lines = out.splitlines()
    rows = [line.split()[0] for line in lines[2:]]
    assert [name for name in rows if name in BACKBONES] == list(BACKBONES)
    for name in list_backbones():
        pages = [line for line in lines if line.endswith(BACKBONES[name].weights.page)]
        assert any(name in line for line in pages)


def test_every_file_of_a_model_has_a_row():
    assert with_tags("maxvit_tiny") == [
        "maxvit_tiny",
        "maxvit_tiny.in1k_384",
        "maxvit_tiny.in1k_512",
    ]
    assert with_tags("cas_vit_xs") == ["cas_vit_xs"]
    cells = describe_model("maxvit_tiny.in1k_384")
    assert cells[:2] == ("maxvit_tiny.in1k_384", "30.977") and cells[3:5] == ("384x384", "85.2")


def test_a_model_is_described_by_its_parameters_and_published_results():
    described = dict(zip(HEADER, describe_model("cas_vit_xs"), strict=True))
    num_params = sum(p.numel() for p in timm.create_model("cas_vit_xs").parameters())
    assert described == {
        "model": "cas_vit_xs",
        "params (M)": f"{num_params / 1e6:.3f}",
        "GMACs": "0.554",
        "at": "224x224",
        "top-1": "78.3 / 78.7",
        "RetinaNet": "36.5",
        "Mask R-CNN": "37.4 / 34.9",
        "Semantic FPN": "37.1",
        "licence": "mit",
    }


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("cas_vit_[xs]*", ["cas_vit_xs", "cas_vit_s"]),
        ("s_vit_x", ["cas_vit_xs"]),
        ("cas_vit_?", ["cas_vit_s", "cas_vit_m", "cas_vit_t"]),
    ],
)
def test_a_filter_takes_wildcards_or_a_part_of_a_name(pattern, expected):
    assert select_models(pattern) == expected


def test_a_filter_that_matches_nothing_is_one_line(capfd):
    assert main(["list", "--filter", "no_such_model"]) == 1
    out, err = capfd.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert "no model of the zoo matches 'no_such_model'" in err

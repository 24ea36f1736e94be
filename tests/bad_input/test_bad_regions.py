"""Regions, heads and checkpoints of BiFormer: what is refused, by name, and what is fitted."""

import pytest
import timm
import torch
from mistakes import dense
from oracles import image

from densezoo.backbones.mmlab import DenseBackbone

SMALL = dict(depths=(1, 1, 1, 1), dims=(32, 32, 64, 64))
NAMES = ["biformer_tiny", "biformer_stl", "biformer_stl_nchw"]


def create(name="biformer_tiny", **arguments):
    """Build the smallest model of a design with these arguments."""
    return timm.create_model(name, **{**SMALL, **arguments})


def refusal(call):
    """The one line that a call is refused with."""
    with pytest.raises(ValueError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line
    return line


# Arguments, and parts of the line that refuses them.
ARGUMENTS = {
    "regions-0": (dict(num_regions=0), "num_regions is 0: a whole number of at least 1"),
    "regions-negative": (dict(num_regions=-7), "num_regions is -7: a whole number of at least 1"),
    "regions-bool": (dict(num_regions=True), "num_regions is True: a whole number"),
    "regions-float": (dict(num_regions=7.0), "num_regions is 7.0: a whole number"),
    "regions-str": (dict(num_regions="7"), "num_regions is '7': a whole number"),
    "regions-two": (dict(num_regions=(7, 7)), "num_regions is (7, 7)", "three"),
    "regions-four": (dict(num_regions=(7, 7, 7, 7)), "num_regions is (7, 7, 7, 7)", "three"),
    "regions-one-bad": (dict(num_regions=(7, 0, 7)), "num_regions is (7, 0, 7)", "at least 1"),
    "topk-0": (dict(topk=0), "topk is 0: a whole number of at least 1"),
    "topk-all": (dict(topk=(1, 4, 16, -2)), "topk is (1, 4, 16, -2)", "first three"),
    "topk-over": (dict(num_regions=3), "topk is 16: at most 9", "num_regions=3"),
    "topk-over-one": (dict(topk=(50, 4, 16)), "topk is 50: at most 49", "num_regions=7"),
    "head_dim-0": (dict(head_dim=0), "head_dim is 0", "at least 1"),
    "head_dim-24": (dict(head_dim=24), "head_dim is 24: a divisor", "(32, 32, 64, 64)"),
    "last-dim": (dict(dims=(32, 32, 64, 60)), "dims[3] is 60: a multiple of 8"),
    "mlp_ratio": (dict(mlp_ratio=0), "mlp_ratio is 0"),
    "ragged": (dict(is_ragged="yes"), "is_ragged is 'yes': True or False"),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", ARGUMENTS)
def test_a_wrong_argument_is_named(case, name):
    arguments, *parts = ARGUMENTS[case]
    if name == "biformer_stl_nchw" and "is_ragged" in arguments:
        arguments = dict(is_ragged=1)
        parts = ["is_ragged is 1: True or False"]
    line = refusal(lambda: create(name, device="meta", **arguments))
    assert all(part in line for part in parts), line


def test_the_dense_backbone_names_wrong_regions_too():
    line = refusal(
        lambda: dense(model_name="biformer_tiny", model_kwargs=dict(SMALL, num_regions=0))
    )
    assert "num_regions is 0" in line
    line = refusal(lambda: DenseBackbone("biformer_small", model_kwargs=dict(num_regions=2)))
    assert "topk is 16: at most 4" in line


@pytest.mark.parametrize("name", NAMES)
def test_a_map_of_fewer_tokens_than_regions_works(name):
    torch.manual_seed(0)
    model = create(name, num_regions=16, features_only=True).eval()
    with torch.no_grad():
        maps = model(image(40, 33))
    assert [tuple(m.shape[2:]) for m in maps] == [(10, 9), (5, 5), (3, 3), (2, 2)]
    assert all(m.isfinite().all() for m in maps)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_that_is_not_finite_or_a_batch_without_one_is_named(name):
    model = create(name).eval()
    x = image(64, 64, batch=2)
    x[1, 0, 5, 5] = torch.nan
    with torch.no_grad():
        assert "NaN" in refusal(lambda: model(x))
        assert "at least 1 image" in refusal(lambda: model(x[:0]))


@pytest.mark.parametrize("num_regions", [4, 8, 16])
def test_a_checkpoint_fits_any_number_of_regions(num_regions, tmp_path):
    torch.manual_seed(0)
    state = create().state_dict()
    torch.save(state, tmp_path / "weights.pth")
    overlay = dict(file=str(tmp_path / "weights.pth"))
    model = create(pretrained=True, pretrained_cfg_overlay=overlay, num_regions=num_regions)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("given, wanted", [NAMES[1:], NAMES[:0:-1]], ids=str)
def test_our_own_file_of_the_other_stl_design_is_refused_by_name(given, wanted, tmp_path):
    torch.save(create(given).state_dict(), tmp_path / "weights.pth")
    overlay = dict(file=str(tmp_path / "weights.pth"))
    line = refusal(lambda: create(wanted, pretrained=True, pretrained_cfg_overlay=overlay))
    assert line.startswith(f"{wanted}: ") and "another function" in line, line

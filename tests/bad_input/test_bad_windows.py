"""Windows, heads and checkpoints of families with windows: what is refused, what is fitted.

A window larger than the map is no mistake; a file for other windows is fitted and that is said.
"""

import argparse
import itertools
import logging

import pytest
import timm
import torch
from oracles import image

# The smallest models of each family: what a variant is called, and arguments that make it small.
SMALL = {
    "maxvit_tiny": dict(depths=(1, 1, 1, 1), dims=(32, 32, 64, 64), stem_dim=16),
    "gc_vit_xxtiny": dict(depths=(2, 1, 1, 1), dims=(32, 64, 64, 64), num_heads=(1, 2, 2, 2)),
    "faster_vit_0": dict(
        depths=(1, 1, 2, 1), dims=(16, 16, 32, 32), stem_dim=16, num_heads=(1, 1, 2, 2)
    ),
    "nat_mini": dict(depths=(1, 1, 1, 1), dims=(32, 32, 64, 64)),
    "dinat_s_tiny": dict(depths=(1, 1, 1, 1), dims=(32, 32, 64, 64)),
    "cas_vit_xs": dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)),
    "biformer_tiny": dict(depths=(1, 1, 1, 1), dims=(32, 32, 64, 64)),
    "biformer_stl_nchw": dict(depths=(1, 1, 1, 1), dims=(32, 32, 64, 64)),
}
WINDOWED = ["maxvit_tiny", "gc_vit_xxtiny", "faster_vit_0"]


def create(name, **arguments):
    """Build the smallest model of a family with these arguments."""
    return timm.create_model(name, **{**SMALL[name], **arguments})


def load(name, path, **arguments):
    """Build the smallest model of a family with the weights of a file."""
    overlay = dict(file=str(path))
    return create(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)


def refusal(call):
    """The one line that a call is refused with."""
    with pytest.raises(ValueError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("window_size", [0, -7, 2.5, "7", True, (), (7, 0), (7, 7, 7)], ids=str)
@pytest.mark.parametrize("name", WINDOWED)
def test_a_bad_window_is_named(name, window_size):
    line = refusal(lambda: create(name, device="meta", window_size=window_size))
    assert f"window_size is {window_size!r}" in line and "at least" in line


@pytest.mark.parametrize("grid_size", [0, -1, "7", (7, -1)], ids=str)
def test_a_bad_grid_of_maxvit_is_named(grid_size):
    line = refusal(lambda: create("maxvit_tiny", device="meta", grid_size=grid_size))
    assert f"grid_size is {grid_size!r}" in line and "at least 1" in line


@pytest.mark.parametrize(
    "name, arguments, words",
    [
        ("maxvit_tiny", dict(head_dim=24), ("head_dim is 24", "divisor", "32")),
        ("maxvit_tiny", dict(head_dim=0), ("head_dim is 0", "at least 1")),
        ("gc_vit_xxtiny", dict(num_heads=(1, 2, 3, 2)), ("num_heads is (1, 2, 3, 2)", "divisors")),
        (
            "gc_vit_xxtiny",
            dict(num_heads=(1, 2, 0, 2)),
            ("num_heads is (1, 2, 0, 2)", "at least 1"),
        ),
        ("gc_vit_xxtiny", dict(num_heads=2), ("num_heads is 2", "four")),
        ("faster_vit_0", dict(num_heads=(1, 1, 3, 2)), ("num_heads is (1, 1, 3, 2)", "divisors")),
        ("faster_vit_0", dict(num_heads=(1, 1, 0, 2)), ("num_heads is (1, 1, 0, 2)", "divisors")),
        ("faster_vit_0", dict(num_heads="2222"), ("num_heads is '2222'", "four")),
        ("faster_vit_0", dict(window_size=1), ("window_size is 1", "at least 2")),
        ("faster_vit_0", dict(official_quirks=True), ("official_quirks", "faster_vit_4_21k_224")),
        ("faster_vit_0", dict(official_quirks="no"), ("official_quirks is 'no'", "True or False")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_heads_that_do_not_fit_and_other_arguments_are_named(name, arguments, words):
    line = refusal(lambda: create(name, device="meta", **arguments))
    assert all(word in line for word in words), line


@pytest.mark.parametrize("name", WINDOWED)
def test_a_window_larger_than_the_map_works(name):
    torch.manual_seed(0)
    model = create(name, window_size=12, features_only=True).eval()
    with torch.no_grad():
        maps = model(image(40, 33))  # of 10 x 9 tokens at most
    assert [tuple(m.shape[2:]) for m in maps] == [(10, 9), (5, 5), (3, 3), (2, 2)]
    assert all(m.isfinite().all() for m in maps)


@pytest.mark.parametrize("name", ["maxvit_tiny", "gc_vit_xxtiny"])
def test_a_checkpoint_of_another_window_is_resized_and_that_is_said(name, tmp_path, caplog):
    torch.manual_seed(0)
    torch.save(create(name).state_dict(), tmp_path / "weights.pth")
    sizes = dict(window_size=5, grid_size=5) if name == "maxvit_tiny" else dict(window_size=5)
    with caplog.at_level(logging.INFO, "densezoo"):
        model = load(name, tmp_path / "weights.pth", **sizes)
    (record,) = [r for r in caplog.records if r.name.startswith("densezoo")]
    said = record.getMessage()
    assert record.levelno == logging.WARNING
    assert "tables of relative position bias" in said and "7" in said and "to 5" in said
    assert "0 missing; 0 unexpected" in said
    with torch.no_grad():
        assert model.eval()(image(64, 64)).isfinite().all()


def test_a_checkpoint_of_another_window_needs_no_resizing_in_faster_vit(tmp_path, caplog):
    torch.manual_seed(0)
    state = create("faster_vit_0").state_dict()
    torch.save(state, tmp_path / "weights.pth")
    with caplog.at_level(logging.INFO, "densezoo"):
        model = load("faster_vit_0", tmp_path / "weights.pth", window_size=5)
    assert "0 missing; 0 unexpected; 0 reshaped" in caplog.text
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("given, wanted", list(itertools.permutations(SMALL, 2)))
def test_a_checkpoint_of_another_family_is_refused_by_name(given, wanted, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(create(given).state_dict(), path)
    line = refusal(lambda: load(wanted, path))
    assert line.startswith(f"{wanted}: ") and "another" in line, line


@pytest.mark.parametrize("name", WINDOWED)
def test_training_files_with_a_namespace_load_and_nothing_else_is_unpickled(name, tmp_path):
    torch.manual_seed(0)
    state = create(name).state_dict()
    arguments = argparse.Namespace(lr=5e-3, amp=True, name="run", betas=(0.9, 0.999), resume=None)
    checkpoint = dict(epoch=3, arch=name, state_dict=state, args=arguments, metric=82.1)
    torch.save(checkpoint, tmp_path / "weights.pth.tar")
    model = load(name, tmp_path / "weights.pth.tar")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    checkpoint["args"].callback = image  # a function, which unpickling would import
    torch.save(checkpoint, tmp_path / "worse.pth.tar")
    line = refusal(lambda: load(name, tmp_path / "worse.pth.tar"))
    assert "worse.pth.tar" in line and "it asks for oracles.image" in line

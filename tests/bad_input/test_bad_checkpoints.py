"""A bad checkpoint is one line that names it, in each command and call that loads it."""

import pytest
import torch
from mistakes import CONFIG, classifier, classifier_options, create, dense, snapshot

from densezoo.backbones.checkpoints import read_checkpoint

# Checkpoints, and parts of the line that `test` and `predict` say of them.
CHECKPOINTS = {
    "truncated.pth": ("truncated.pth", "can be read safely", "truncated"),
    "empty.pth": ("empty.pth", "it is empty", "again"),
    "text.pth": ("text.pth", "Git LFS", "git lfs pull"),
    "page.pth": ("page.pth", "a web page", "download the file itself"),
    "keras.h5": ("keras.h5", "HDF5"),
    "keras.pth": ("keras.pth", "HDF5"),
    "model.onnx": ("model.onnx", "of another format"),
    "list.pth": ("list.pth", "can be read safely"),
    "index.json": ("index.json", "JSON", "index of several files"),
    "library.pth": ("library.pth", "it asks for mmengine.config.config.Config"),
    "nan.pth": ("hold NaN, such as", "conv1.conv.bias", "before its training failed"),
    "malicious.pth": ("malicious.pth", "it asks for posix.mkfifo"),
    "archive.pth": ("archive.pth", "of another format"),
    "broken.safetensors": ("broken.safetensors", "can be read safely"),
    "torch.safetensors": ("torch.safetensors", "give it the suffix .pth"),
    "tensors.pth": ("tensors.pth", "give it the suffix .safetensors"),
    "tensor.pth": ("tensor.pth", "Tensor, not a checkpoint"),
    "numbers.pth": ("no weights found", "'epoch'"),
    "other_family.pth": ("other_family.pth", "another model"),
    "headless_detector.pth": ("headless_detector.pth",),
    "": ("checkpoints", "folder"),
    "none.pth": ("none.pth", "does not exist"),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_bad_checkpoint_is_one_line_however_it_is_loaded(case, run, stage, tmp_path):
    path = stage / "checkpoints" / case
    before = snapshot(stage)
    options = classifier_options(stage)
    for line in (
        f"test {CONFIG} {path} --out figures.json",
        f"predict {CONFIG} {path} {{stage}}/images/good.png --out drawn",
        f"train {CONFIG} --resume {path}",
    ):
        code, said = run(line, options)
        assert code == 1, said
        assert "Traceback" not in said
        said = said.strip().splitlines()[-1]
        parts = ("optimizer",) if line.startswith("train") and "optimizer" in said else ()
        for part in parts or CHECKPOINTS[case]:
            assert part in said, said
    assert not list(tmp_path.rglob("*.png")) and not list(tmp_path.rglob("*.json"))
    for load in (
        lambda: create(pretrained=True, pretrained_cfg_overlay=dict(file=str(path))),
        lambda: dense(init_cfg=dict(type="Pretrained", checkpoint=str(path))).init_weights(),
        lambda: dense(pretrained=path),
        lambda: classifier(init_cfg=dict(type="Pretrained", checkpoint=str(path))).init_weights(),
    ):
        with pytest.raises((ValueError, OSError)) as caught:
            load()
        assert "\n" not in str(caught.value)
    assert snapshot(stage) == before
    assert not (path.parent / "pwned").exists()


@pytest.mark.parametrize("name", ["good.pth", "published.pth", "tensors.safetensors"])
def test_the_good_checkpoints_of_these_tests_are_read(name, stage):
    path = stage / "checkpoints" / name
    expected = read_checkpoint(stage / "checkpoints" / "published.pth")["model"][
        "stem.conv1.conv.bias"
    ]
    for model in (
        create(pretrained=True, pretrained_cfg_overlay=dict(file=str(path))),
        dense(pretrained=path).model,
    ):
        loaded = {key: value for key, value in model.state_dict().items()}
        (own,) = (value for key, value in loaded.items() if key.endswith("stem.conv1.conv.bias"))
        assert torch.equal(own, expected)

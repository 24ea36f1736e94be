"""A folder of good and bad files, and a command line to name them in."""

import itertools
import json
import os
import pickle
import shlex
import shutil
import zipfile

import pytest
import safetensors.torch
import timm
import torch
from mistakes import CONFIG, DETECTOR, create
from mmengine.config import Config
from PIL import Image

from densezoo.tools import cli
from densezoo.tools.demo_data import make_dataset


class _Malicious:
    """What makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkfifo, (str(self.path),)


def _write_checkpoints(folder):
    """Write checkpoints, good and bad ones, and return {name: path}."""
    torch.manual_seed(0)
    model = create(num_classes=10, distillation=False)
    own = model.state_dict()
    paths = {}

    def save(name, content):
        paths[name] = folder / name
        torch.save(content, paths[name])

    save("good.pth", {"state_dict": {f"backbone.{key}": value for key, value in own.items()}})
    save("published.pth", {"model": own})
    save("other_family.pth", timm.create_model("test_convnext").state_dict())
    save("headless_detector.pth", {"state_dict": {"neck.conv.weight": torch.zeros(3, 3)}})
    save("library.pth", Config(dict(a=1)))
    save("tensor.pth", torch.zeros(3))
    save("nan.pth", {"model": {**own, "stem.conv1.conv.bias": torch.full((24,), torch.nan)}})
    save("malicious.pth", _Malicious(folder / "pwned"))
    save("numbers.pth", {"epoch": 3, "loss": 0.5})
    whole = paths["good.pth"].read_bytes()
    raw = {
        "truncated.pth": whole[: len(whole) // 2],
        "empty.pth": b"",
        "text.pth": b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n",
        "page.pth": b"<!DOCTYPE html><html><body>Sign in</body></html>",
        "keras.h5": b"\x89HDF\r\n\x1a\n" + bytes(64),
        "keras.pth": b"\x89HDF\r\n\x1a\n" + bytes(64),
        "model.onnx": b"\x08\x07\x12\x07pytorch" + bytes(64),
        "list.pth": pickle.dumps([1, 2]),
        "index.json": json.dumps(
            {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
        ).encode(),
        "broken.safetensors": b"\xff" * 64,
    }
    for name, content in raw.items():
        paths[name] = folder / name
        paths[name].write_bytes(content)
    safetensors.torch.save_file(own, folder / "tensors.safetensors")
    shutil.copy(folder / "tensors.safetensors", folder / "tensors.pth")
    shutil.copy(paths["good.pth"], folder / "torch.safetensors")
    with zipfile.ZipFile(folder / "archive.pth", "w") as archive:
        archive.writestr("readme.txt", "no weights")
    for name in ("tensors.safetensors", "tensors.pth", "torch.safetensors", "archive.pth"):
        paths[name] = folder / name
    return paths


CONFIGS = {
    "empty.py": "",
    "syntax.py": "model = dict(\n",
    "missing_base.py": '_base_ = "nope.py"\n',
    "circle.py": '_base_ = "circle_too.py"\n',
    "circle_too.py": '_base_ = "circle.py"\n',
    "exits.py": "raise SystemExit(3)\n",
    "divides.py": "a = 1 / 0\n",
    "broken.json": "{",
    "list.json": "[1]",
    "text.txt": "hello",
    "few.json": '{"model": {"type": "ImageClassifier"}}',
    "latin.py": b"\xff\xfe\x00",
    "imports.py": 'custom_imports = dict(imports=["no_such_package"])\n',
}


@pytest.fixture(scope="session")
def stage(tmp_path_factory):
    """A folder of files, good and bad, that the cases name."""
    root = tmp_path_factory.mktemp("stage")
    (root / "configs").mkdir()
    for name, text in CONFIGS.items():
        content = text if isinstance(text, bytes) else text.encode()
        (root / "configs" / name).write_bytes(content)
    (root / "checkpoints").mkdir()
    _write_checkpoints(root / "checkpoints")
    (root / "file").write_text("precious")
    (root / "folder").mkdir()
    (root / "folder" / "precious").write_text("precious")
    make_dataset(root / "digits", images=16, size=64)
    (root / "images").mkdir()
    Image.new("RGB", (40, 30), "red").save(root / "images" / "good.png")
    return root


@pytest.fixture
def run(stage, tmp_path, monkeypatch, capsys):
    """Run a command line in an empty folder: (exit code, stderr without mmengine's own lines)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run_(line, options=()):
        words = shlex.split(line.format(stage=stage, **_NAMES))
        if options:  # mmengine keeps the logs of runs apart by the experiment's name
            words += ["--cfg-options", *options, f"experiment_name=bad_input_{next(_runs)}"]
        capsys.readouterr()
        try:
            code = cli.main(words)
        except SystemExit as stopped:
            code = stopped.code
        return code, capsys.readouterr().err

    return run_


_runs = itertools.count()
_NAMES = dict(config=CONFIG, detector=DETECTOR)

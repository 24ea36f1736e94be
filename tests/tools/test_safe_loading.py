"""No checkpoint ever runs code, whichever way it comes; honest ones load as they always did."""

import argparse
import functools
import os
import pickle
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import mmengine.runner
import numpy as np
import pytest
import timm
import torch
from mmengine.config import ConfigDict
from mmengine.fileio import LocalBackend
from mmengine.fileio.backends import backends
from mmengine.logging import HistoryBuffer
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import CheckpointLoader
from PIL import Image
from small_run import Line, make_runner
from torch._tensor import _rebuild_from_type_v2

from densezoo.backbones.checkpoints import read_checkpoint
from densezoo.backbones.mmlab import DenseBackbone, read_mmengine_checkpoints_safely
from densezoo.tools.cli import main

CONFIG = "cas_vit_xs_8xb128_300e_in1k"


class Call:
    """An object whose unpickling calls a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def _attributes_of_attributes(code):
    """Reach exec from a class that checkpoints of mmengine hold, by getattr and what PyTorch has.

    None of the functions that it names is dangerous by itself.
    """

    def attribute(owner, name):
        return Call(getattr, owner, name)

    def call(function, result_class, *arguments):
        return Call(_rebuild_from_type_v2, function, result_class, arguments, None)

    names = attribute(attribute(HistoryBuffer, "update"), "__globals__")
    builtins = call(attribute(names, "get"), attribute({}, "__class__"), "__builtins__")
    function = call(attribute(builtins, "get"), attribute(getattr, "__class__"), "exec")
    return call(function, attribute(None, "__class__"), code)


def _history(payload):
    history = HistoryBuffer([1.0], [1])
    history.payload = payload
    return history


# A file's contents, given what runs code when it is unpickled, and that code.
VARIANTS = {
    "zip.pth": lambda payload, code: payload,
    "legacy.pth": lambda payload, code: payload,
    "bare.pt": lambda payload, code: payload,
    "nested.pth": lambda payload, code: {**_classifier(), "meta": {"a": [1, ("b", payload)]}},
    "namespace.pth": lambda payload, code: {**_classifier(), "args": argparse.Namespace(x=payload)},
    "history.pth": lambda payload, code: {**_classifier(), "message_hub": _history(payload)},
    "config.pth": lambda payload, code: {**_classifier(), "meta": ConfigDict(x=payload)},
    "attributes.pth": lambda payload, code: {
        **_classifier(),
        "message_hub": _attributes_of_attributes(code),
    },
}


@functools.cache
def _classifier():
    return {
        "state_dict": timm.create_model("cas_vit_xs", num_classes=3).state_dict(),
        "optimizer": {"state": {}, "param_groups": []},
    }


@pytest.fixture(params=VARIANTS)
def malicious(request, tmp_path, monkeypatch):
    """A file that makes the file `marker` beside it when it is unpickled."""
    monkeypatch.chdir(tmp_path)
    path, marker = tmp_path / request.param, tmp_path / "marker"
    code = f"open({str(marker)!r}, 'w').close()"
    contents = VARIANTS[request.param](Call(exec, code), code)
    if path.suffix == ".pt":
        path.write_bytes(pickle.dumps(contents, protocol=2))
    else:
        torch.save(contents, path, _use_new_zipfile_serialization=path.name != "legacy.pth")
    yield path
    assert not marker.exists(), "the code ran"
    unsafe = pickle.loads if path.suffix == ".pt" else torch.load
    if path.suffix == ".pt":
        unsafe(path.read_bytes())
    else:
        unsafe(path, weights_only=False)
    assert marker.exists(), "the file is not malicious at all"


@contextmanager
def _served(path):
    """Offer a file at a URL."""
    handler = functools.partial(_QuietHandler, directory=str(path.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/{path.name}"
        finally:
            server.shutdown()


def _mmengine_url(path):
    """Load a file through mmengine's http scheme."""
    with _served(path) as url:
        return CheckpointLoader.load_checkpoint(url, map_location="cpu")


def _dense_url(path):
    with _served(path) as url:
        return DenseBackbone("cas_vit_xs", pretrained=url)


class _QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


class _Bucket(LocalBackend):
    """A remote store, on the disk."""

    def __init__(self, **options):
        pass

    def get(self, filepath):
        return super().get(str(filepath).removeprefix("s3:/"))


def _mmengine_zoo(path):
    """Load a file that mmengine's own folder of models names."""
    (path.parent / "open_mmlab.json").write_text(f'{{"ours": "{path.name}"}}')
    return CheckpointLoader.load_checkpoint("open-mmlab://ours")


def _module(name, **init_cfg):
    import mmseg.models  # noqa: F401

    def load(path):
        init = dict(type="Pretrained", checkpoint=str(path), **init_cfg)
        model = MODELS.build(dict(type=name, depth=18, init_cfg=init))
        model.init_weights()

    return load


def _dense(**options):
    return DenseBackbone("cas_vit_xs", **options)


def _from_timm(path, **overlay):
    return timm.create_model(
        "cas_vit_xs", num_classes=3, pretrained=True, pretrained_cfg_overlay=overlay
    )


def _classifier_from(path):
    model = MODELS.build(
        dict(
            type="ImageClassifier",
            model_name="cas_vit_xs",
            num_classes=3,
            init_cfg=dict(type="Pretrained", checkpoint=str(path)),
        )
    )
    model.init_weights()
    return model


ENTRIES = {
    "read_checkpoint": read_checkpoint,
    "DenseBackbone(pretrained)": lambda path: _dense(pretrained=str(path)),
    "DenseBackbone(URL)": _dense_url,
    "DenseBackbone(init_cfg)": lambda path: _dense(
        init_cfg=dict(type="Pretrained", checkpoint=str(path))
    ).init_weights(),
    "ImageClassifier(init_cfg)": _classifier_from,
    "timm file": lambda path: _from_timm(path, file=str(path)),
    "timm url": lambda path: _from_timm(path, url=path.as_uri()),
    "timm checkpoint_path": lambda path: timm.create_model(
        "cas_vit_xs", num_classes=3, checkpoint_path=str(path)
    ),
    "timm checkpoint_path, features": lambda path: timm.create_model(
        "cas_vit_xs", features_only=True, checkpoint_path=str(path)
    ),
    "Runner.load_checkpoint": lambda path: make_runner(path.parent).load_checkpoint(str(path)),
    "Runner.resume": lambda path: make_runner(path.parent).resume(str(path)),
    "mmengine.runner.load_checkpoint": lambda path: mmengine.runner.load_checkpoint(
        Line(), str(path)
    ),
    "mmengine http": _mmengine_url,
    "mmengine s3": lambda path: CheckpointLoader.load_checkpoint(f"s3:/{path}"),
    "mmengine open-mmlab": _mmengine_zoo,
    "mmdet init_cfg": _module("mmdet.ResNet"),
    "mmseg init_cfg, prefix": _module("mmseg.ResNetV1c", prefix="backbone."),
}


@pytest.fixture
def _schemes(tmp_path, monkeypatch):
    """Let mmengine's schemes that need a network lead to the disk, and caches to `tmp_path`."""
    read_mmengine_checkpoints_safely()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MMENGINE_HOME", str(tmp_path))
    monkeypatch.setitem(backends, "petrel", _Bucket)


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_malicious_file_is_refused_in_one_line_and_runs_nothing(entry, malicious, _schemes):
    # timm refuses what it loads itself with a RuntimeError.
    kind = RuntimeError if entry.startswith("timm checkpoint_path") else ValueError
    if malicious.suffix == ".pt" and kind is RuntimeError:
        kind = Exception
    with pytest.raises(kind) as refused:
        ENTRIES[entry](malicious)
    message = str(refused.value)
    assert "\n" not in message
    if kind is ValueError and entry != "mmengine s3":
        assert malicious.name in message


@pytest.fixture
def options(colours):
    """The options that make the ImageNet config a run of a second on the images of `colours`."""
    loaders = ("train_dataloader", "val_dataloader", "test_dataloader")
    return [
        "model.num_classes=3",
        "model.model_kwargs=None",
        *(f"{loader}.dataset.root={colours / 'folder'}" for loader in loaders),
        *(f"{loader}.num_workers=0" for loader in loaders),
        *(f"{loader}.persistent_workers=False" for loader in loaders),
    ]


COMMANDS = {
    "load_from": lambda path: (["train", CONFIG], [f"load_from={path}"]),
    "resume": lambda path: (["train", CONFIG, "--resume", str(path)], []),
    "resume auto": lambda path: (
        ["train", CONFIG, "--work-dir", str(_as_last(path)), "--resume"],
        [],
    ),
    "init_cfg": lambda path: (
        ["train", CONFIG],
        ["model.init_cfg.type=Pretrained", f"model.init_cfg.checkpoint={path}"],
    ),
    "test": lambda path: (["test", CONFIG, str(path)], []),
    "predict": lambda path: (["predict", CONFIG, str(path), str(_image(path))], []),
}


def _as_last(path):
    """Make a work dir whose last checkpoint is the file."""
    folder = path.parent / "run"
    folder.mkdir()
    (folder / "last_checkpoint").write_text(str(path))
    return folder


def _image(path):
    picture = path.with_name("image.png")
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(picture)
    return picture


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_a_malicious_file_in_one_line(command, malicious, options, capsys):
    arguments, own_options = COMMANDS[command](malicious)
    assert main([*arguments, "--cfg-options", *options, *own_options]) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert "Traceback" not in "".join(errors)
    assert errors[-1].startswith(f"densezoo {arguments[0]}: error: ")
    assert malicious.name in errors[-1] and "safely" in errors[-1]


SCRIPT = """
import sys
import mmengine.runner
{importing}
try:
    mmengine.runner.load_checkpoint(None, sys.argv[1])
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize(
    "importing",
    [
        "import densezoo; from mmengine.registry import MODELS\n"
        "MODELS.build(dict(type='DenseBackbone', model_name='cas_vit_xs'))",
        "import densezoo.tools.engine.runner",
    ],
    ids=["a backbone", "the Runner"],
)
def test_a_process_is_safe_once_it_has_a_part_of_ours(importing, tmp_path):
    path, marker = tmp_path / "evil.pth", tmp_path / "marker"
    torch.save({"x": Call(exec, f"open({str(marker)!r}, 'w').close()")}, path)
    command = [sys.executable, "-c", SCRIPT.format(importing=importing), str(path)]
    # The variable with which PyTorch's check can be switched off.
    environment = {**os.environ, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not marker.exists()
    assert "evil.pth' is not a checkpoint that can be read safely: it asks for exec" in done.stdout


@pytest.mark.parametrize("is_reduced", [True, False], ids=["state", "array"])
def test_arrays_of_pointers_are_refused(is_reduced, tmp_path):
    """NumPy would take the bytes of a file for the addresses of objects."""

    class Dtype:
        def __reduce__(self):
            state = (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0)
            return np.dtype, ("V8", False, True), state

    content = Dtype() if is_reduced else np.array([{}], dtype=object)
    torch.save({"w": torch.zeros(1), "x": content}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="evil.pth' is not a checkpoint .* numpy.dtype of"):
        read_checkpoint(tmp_path / "evil.pth")


def test_resuming_runs_no_text_of_a_checkpoint(tmp_path, _schemes):
    """mmengine reads the text of meta["config"] as a config, which is a program."""
    runner = make_runner(tmp_path)
    runner.train()
    path, marker = tmp_path / "epoch_5.pth", tmp_path / "marker"
    checkpoint = torch.load(path, weights_only=False)
    code = f"open({str(marker)!r}, 'w').close()"
    checkpoint["meta"]["config"] = code
    torch.save(checkpoint, path)
    with _served(path) as url:
        for source in (str(path), url):
            make_runner(tmp_path).resume(source)
            assert not marker.exists()
    mmengine.Config.fromstring(code, file_format=".py")
    assert marker.exists(), "mmengine runs it no more"


def test_arrays_are_saved_again_as_numpys(tmp_path):
    array = np.arange(6, dtype=">i2").reshape(2, 3)
    torch.save({"w": torch.zeros(1), "x": array}, tmp_path / "a.pth")
    torch.save(read_checkpoint(tmp_path / "a.pth"), tmp_path / "b.pth")
    again = torch.load(tmp_path / "b.pth", weights_only=False)["x"]
    assert type(again) is np.ndarray
    np.testing.assert_array_equal(again, array)


def _assert_same(one, two):
    assert type(one) is type(two) or isinstance(one, np.ndarray)
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            _assert_same(one[key], two[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two)
        for pair in zip(one, two, strict=True):
            _assert_same(*pair)
    elif isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    elif isinstance(one, HistoryBuffer):
        for pair in zip(one.data, two.data, strict=True):
            np.testing.assert_array_equal(*pair)
    elif isinstance(one, argparse.Namespace):
        _assert_same(vars(one), vars(two))
    else:
        np.testing.assert_array_equal(one, two)


READERS = {
    "read_checkpoint": read_checkpoint,
    "in memory": functools.partial(read_checkpoint, mmap=False),
    "mmengine": lambda path: CheckpointLoader.load_checkpoint(str(path), map_location="cpu"),
    "mmengine http": _mmengine_url,
    "mmengine s3": lambda path: CheckpointLoader.load_checkpoint(f"s3:/{path}"),
    "mmengine open-mmlab": _mmengine_zoo,
}


@pytest.mark.parametrize("reader", READERS)
def test_a_runners_checkpoint_with_its_histories_loads_whole(reader, tmp_path, _schemes):
    runner = make_runner(tmp_path, size=3)
    runner.train()
    path = tmp_path / "epoch_5.pth"
    checkpoint = torch.load(path, weights_only=False)
    assert any(
        isinstance(h, HistoryBuffer) for h in checkpoint["message_hub"]["log_scalars"].values()
    )
    _assert_same(READERS[reader](path), checkpoint)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_an_honest_file_of_many_kinds_loads_whole(is_zip, tmp_path):
    checkpoint = {
        "model": {"w": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2, dtype=torch.bfloat16)},
        "args": argparse.Namespace(lr=1e-3, size=(224, 224), nested=argparse.Namespace(x=None)),
        "numbers": [np.float32(1.5), np.int32(3), np.float64(2), np.bool_(True), np.uint8(4)],
        "arrays": [np.arange(3, dtype=np.int16), np.array(["a", "bc"])],
        "meta": {"classes": ("a", "b"), "palette": [(1, 2, 3)], "part": slice(1, 2)},
        "cfg": ConfigDict(metainfo=ConfigDict(classes=["a"])),
    }
    path = tmp_path / "checkpoint.pth"
    torch.save(checkpoint, path, _use_new_zipfile_serialization=is_zip)
    loaded = read_checkpoint(path)
    assert loaded["meta"].pop("part") == checkpoint["meta"].pop("part")
    _assert_same(loaded, checkpoint)


@pytest.mark.parametrize("entry", ["file", "url"])
@pytest.mark.parametrize("extra", ["timm", "mmengine"])
def test_timm_takes_honest_files_with_arguments_and_histories(entry, extra, tmp_path, _schemes):
    torch.manual_seed(0)
    source = timm.create_model("cas_vit_xs", num_classes=3)
    path = tmp_path / "checkpoint.pth"
    extras = {
        "timm": {"args": argparse.Namespace(lr=0.1), "metric": np.float64(3)},
        "mmengine": {"message_hub": {"log_scalars": {"train/loss": HistoryBuffer([1.0], [1])}}},
    }
    torch.save({"state_dict": source.state_dict(), **extras[extra]}, path)
    location = {"file": str(path), "url": path.as_uri()}
    model = _from_timm(path, **{entry: location[entry]})
    _assert_same(dict(model.state_dict()), dict(source.state_dict()))
    assert "state_dict" not in model.pretrained_cfg, "the model keeps the file's tensors alive"


def test_tensors_go_where_the_caller_says(tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save({"w": torch.ones(3)}, path)
    assert read_checkpoint(path, map_location="meta")["w"].is_meta

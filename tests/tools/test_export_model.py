"""Exports: files that answer as their model does, and what is refused before any work."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from oracles import relative_error
from torch import nn

from densezoo.backbones.cas_vit import CASViT
from densezoo.tools import export_files, export_model
from densezoo.tools.cli import main
from densezoo.tools.export_files import (
    ExportError,
    compare,
    export_onnx,
    export_program,
    has_onnx_exporter,
)

# With an older PyTorch, ONNX export is refused in one line; the last test holds it to that.
needs_onnx_exporter = pytest.mark.skipif(
    not has_onnx_exporter(), reason="ONNX export takes torch 2.7 or newer"
)


def image(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def small():
    """A model of the zoo's class that traces in a second."""
    torch.manual_seed(0)
    return CASViT((1, 1, 1, 1), (8, 8, 16, 16), num_classes=5).eval()


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory):
    """What the command wrote of cas_vit_xs with a checkpoint: file, model, printed lines."""
    folder = tmp_path_factory.mktemp("onnx")
    torch.manual_seed(1)
    model = timm.create_model("cas_vit_xs", num_classes=7).eval()
    torch.save({"state_dict": model.state_dict()}, folder / "seven.pth")
    path = folder / "seven.onnx"
    words = ["cas_vit_xs", str(path), "--dynamic", "--size", "64", "96"]
    run = subprocess.run(
        [sys.executable, "-m", "densezoo", "export", *words, "--checkpoint", folder / "seven.pth"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return path, model, run


@needs_onnx_exporter
def test_the_onnx_file_answers_as_the_checkpoint_at_any_size(onnx_file):
    import onnxruntime

    path, model, _ = onnx_file
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for shape in ((3, 3, 97, 131), (1, 3, 33, 250)):
        x = image(*shape)
        (logits,) = session.run(["logits"], {"images": x.numpy()})
        with torch.no_grad():
            assert logits.shape == (shape[0], 7)
            assert relative_error(torch.from_numpy(logits), model(x)) < 1e-3


@needs_onnx_exporter
def test_the_onnx_file_names_its_axes_and_says_what_it_is(onnx_file):
    import onnx

    proto = onnx.load(onnx_file[0])
    onnx.checker.check_model(proto)
    (images,), (logits,) = proto.graph.input, proto.graph.output
    axes = [axis.dim_param or axis.dim_value for axis in images.type.tensor_type.shape.dim]
    assert (images.name, logits.name) == ("images", "logits")
    assert axes == ["batch", 3, "height", "width"]
    assert [opset.version for opset in proto.opset_import if not opset.domain] == [18]
    assert {node.domain for node in proto.graph.node} == {""}
    assert "BatchNormalization" in {node.op_type for node in proto.graph.node}  # the last norm's
    said = {entry.key: entry.value for entry in proto.metadata_props}
    assert said["model"] == "cas_vit_xs" and said["num_classes"] == "7"
    assert json.loads(said["mean"]) == [0.485, 0.456, 0.406]
    assert json.loads(said["smallest_size"]) == [33, 33]


@needs_onnx_exporter
def test_the_command_prints_the_comparison_and_nothing_else(onnx_file):
    path, _, run = onnx_file
    assert run.stderr == ""
    lines = run.stdout.splitlines()
    assert "seven.pth" in lines[0] and "fused norms" in lines[0] and "opset 18" in lines[0]
    assert "from 33 pixels" in lines[1]
    rows = [line.split() for line in lines[4:7]]
    assert [row[:3] for row in rows] == [
        ["1", "x", "64x96"],
        ["2", "x", "49x123"],
        ["1", "x", "33x33"],
    ]
    assert all(float(row[4]) < 1e-3 for row in rows)
    assert lines[-1] == f"{path}: {path.stat().st_size / 2**20:.1f} MiB"
    assert not [file for file in path.parent.iterdir() if file.name.startswith(".")]


@needs_onnx_exporter
def test_a_fixed_onnx_file_takes_its_size_alone(small, tmp_path):
    comparisons = export_onnx(small, tmp_path / "m.onnx", size=(40, 50), batch=2, opset=20)
    assert [(c.batch, c.size) for c in comparisons] == [(2, (40, 50))]
    exported = export_files.load_onnx(tmp_path / "m.onnx")
    with torch.no_grad():
        assert relative_error(exported(image(2, 3, 40, 50))[0], small(image(2, 3, 40, 50))) < 1e-3
    with pytest.raises(Exception, match="dimensions"):
        exported(image(2, 3, 40, 51))


@needs_onnx_exporter
def test_weights_over_the_limit_of_a_file_lie_beside_it(small, tmp_path, monkeypatch):
    monkeypatch.setattr(export_files, "_MAX_PROTOBUF", 1000)
    path = tmp_path / "m.onnx"
    export_onnx(small, path, size=(40, 50))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in (path, tmp_path / "m.onnx.data"):
        file.rename(moved / file.name)
    (comparison,) = compare(small, export_files.load_onnx(moved / path.name), [(1, 40, 50)])
    assert comparison.relative < 1e-3


@pytest.mark.parametrize("suffix", [".pt2", pytest.param(".program", marks=pytest.mark.slow)])
def test_programs_keep_their_declared_range(small, suffix, tmp_path):
    path = tmp_path / f"m{suffix}"
    comparisons = export_program(small, path, size=(64, 64), dynamic=True, metadata={"a": "b"})
    assert len(comparisons) == 3 and all(c.relative < 1e-3 for c in comparisons)
    with open(path, "rb") as file:
        extra = {export_files.METADATA_FILE: ""}
        module = torch.export.load(file, extra_files=extra).module()
    assert json.loads(extra[export_files.METADATA_FILE]) == {"a": "b"}
    x = image(5, 3, 33, 78)
    with torch.no_grad():
        assert relative_error(module(x), small(x)) < 1e-5
    with pytest.raises((AssertionError, RuntimeError), match="33"):
        module(image(1, 3, 32, 78))


def test_programs_hold_neither_a_device_nor_the_cpus_own_operators(small):
    from torch.export.passes import move_to_device_pass

    with torch.no_grad():
        program = export_files.trace(small, size=(64, 64), dynamic=True)
    targets = [str(node.target) for node in program.graph.nodes]
    assert any("conv2d" in target for target in targets)
    assert not any("mkldnn" in target for target in targets)
    assert not any("device" in node.kwargs for node in program.graph.nodes)
    moved = move_to_device_pass(program, "meta").module()
    assert moved(torch.empty(3, 3, 50, 70, device="meta")).shape == (3, 5)


def test_stage_maps_are_exported_in_the_order_asked_for(tmp_path, capsys):
    path = tmp_path / "maps.pt2"
    words = ["--features-only", "--out-indices", "2", "0", "--size", "64", "64", "--no-fuse"]
    assert main(["export", "timm:cas_vit_xs", str(path), *words]) == 0
    assert "random weights, plain norms, torch.export" in capsys.readouterr().out
    maps = export_files.load_program(path)(image(1, 3, 64, 64))
    assert [tuple(m.shape) for m in maps] == [(1, 112, 4, 4), (1, 48, 16, 16)]
    features = timm.create_model("cas_vit_xs", features_only=True, out_indices=(2, 0))
    assert export_files.output_names(features, maps) == ["stage2", "stage0"]
    assert export_files.smallest_size(features) == 17


def test_programs_that_need_densezoo_say_so(tmp_path, capsys):
    words = ["--features-only", "--out-indices", "0", "--size", "64", "64"]
    note = "import densezoo before torch.export.load"
    for name, is_needed in (("nat_mini", True), ("cas_vit_xs", False)):
        path = tmp_path / f"{name}.pt2"
        assert main(["export", name, str(path), *words]) == 0
        assert (note in capsys.readouterr().out) == is_needed
        load = f"import torch; torch.export.load({str(path)!r})"
        alone = subprocess.run([sys.executable, "-c", load], capture_output=True)
        assert (alone.returncode != 0) == is_needed
    script = f"import densezoo, torch; print(torch.export.load({str(tmp_path / 'nat_mini.pt2')!r}))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0 and "densezoo.neighborhood_attention" in run.stdout, run.stderr


def test_models_of_timm_are_exported_too(tmp_path, capsys):
    path = tmp_path / "mobilenet.pt2"
    assert (
        main(["export", "mobilenetv3_small_050", str(path), "--size", "64", "64", "--dynamic"]) == 0
    )
    assert "2 x 49x83" in capsys.readouterr().out
    assert export_files.load_program(path)(image(2, 3, 40, 60))[0].shape == (2, 1000)


def test_sizes_that_cannot_be_left_open_are_one_line(tmp_path, capsys):
    words = ["convnext_atto", str(tmp_path / "m.pt2"), "--size", "64", "64", "--dynamic"]
    assert main(["export", *words]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and not list(tmp_path.iterdir())
    assert "height and width cannot be left open as declared" in error and "64 <=" in error


def test_the_model_keeps_its_modes(small, tmp_path):
    model = CASViT((1, 1, 1, 1), (8, 8, 16, 16), num_classes=5).train()
    model.stages[1].eval()
    statistics = {name: value.clone() for name, value in model.named_buffers()}
    export_program(model, tmp_path / "m.pt2", size=(32, 32))
    assert model.training and model.stages[0].training and not model.stages[1].training
    assert all(torch.equal(value, statistics[name]) for name, value in model.named_buffers())


class _Fickle(nn.Module):
    """Computes something else when traced."""

    feature_info = [dict(reduction=4)]

    def __init__(self, off):
        super().__init__()
        self.off = off
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        off = self.off if torch.compiler.is_compiling() or isinstance(x, _fake()) else 0.0
        return x * self.scale * (1 + off)


def _fake():
    from torch._subclasses.fake_tensor import FakeTensor

    return FakeTensor


def test_an_export_that_differs_leaves_no_file(tmp_path):
    kept = tmp_path / "m.pt2"
    kept.write_bytes(b"before")
    with pytest.raises(ExportError, match="differs from the model by .* was not written") as failed:
        export_program(_Fickle(0.01), kept, size=(32, 32), overwrite=True)
    assert failed.value.comparisons[0].relative > 1e-3
    assert kept.read_bytes() == b"before" and list(tmp_path.iterdir()) == [kept]
    assert export_program(_Fickle(1e-5), kept, size=(32, 32), overwrite=True)


def test_a_difference_is_told_with_its_table_and_exit_code_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export_files, "MAX_DIFFERENCE", 0.0)
    path = tmp_path / "m.pt2"
    assert main(["export", "cas_vit_xs", str(path), "--size", "64", "64"]) == 1
    out, err = capsys.readouterr()
    assert "1 x 64x64" in out and "program ms" in out
    assert err.startswith("densezoo export: error: the exported model differs")
    assert err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_differences_are_told_in_standard_deviations():
    expected = torch.tensor([0.0, 2.0])
    assert export_files.relative_difference(expected + 0.5, expected) == pytest.approx(0.5)
    constant = torch.full((1, 1), 4.0)
    assert export_files.relative_difference(constant + 1, constant) == pytest.approx(0.25)
    zero = torch.zeros(3)
    assert export_files.relative_difference(zero, zero) == 0
    assert export_files.relative_difference(expected * float("nan"), expected) == np.inf


class _Branching(CASViT):
    """CAS-ViT that looks at its images. Not exported: it branches on the images."""

    unsupported_exports = {"torch_export": "it branches on the images"}

    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


@pytest.mark.parametrize("export", [export_onnx, export_program])
def test_a_family_that_cannot_be_exported_gives_its_reason(export, tmp_path):
    if export is export_onnx and not has_onnx_exporter():
        pytest.skip("ONNX export takes torch 2.7 or newer")
    model = _Branching((1, 1, 1, 1), (8, 8, 16, 16))
    with pytest.raises(ExportError, match="it branches on the images"):
        export(model, tmp_path / "m", size=(32, 32))
    assert not list(tmp_path.iterdir())


def test_a_model_that_yields_no_numbers_cannot_be_compared(small):
    class Broken(nn.Module):
        def forward(self, x):
            return x * float("nan")

    with pytest.raises(ExportError, match="not finite for 32x32 pixels"):
        compare(Broken(), Broken(), [(1, 32, 32)])


@pytest.mark.parametrize(
    "words, message",
    [
        (["cas_vit_xx", "m.pt2"], "unknown model 'cas_vit_xx': did you mean"),
        (["cas_vit_xs", "m.tflite"], "ends neither in .onnx nor in .pt2"),
        (["cas_vit_xs", "none/m.pt2"], "does not exist"),
        (["cas_vit_xs", "there.pt2"], "there.pt2 exists: pass --overwrite"),
        (["cas_vit_xs", "folder", "--format", "torch_export"], "is a folder"),
        (["cas_vit_xs", "m.pt2", "--dynamic", "--size", "32", "64"], "from 33 pixels"),
        (["cas_vit_xs", "m.pt2", "--size", "0", "64"], "at least 1 pixel"),
        (["cas_vit_xs", "m.pt2", "--batch", "0"], "--batch is 0"),
        (["cas_vit_xs", "m.pt2", "--num-classes", "-1"], "--num-classes is -1"),
        (["cas_vit_xs", "m.pt2", "--num-classes", "3", "--features-only"], "have no classes"),
        (["cas_vit_xs", "m.pt2", "--out-indices", "3"], "needs --features-only"),
        (["cas_vit_xs", "m.pt2", "--features-only", "--out-indices", "4"], "out_indices"),
        (["cas_vit_xs", "m.pt2", "--opset", "18"], "--opset belongs to ONNX"),
        (["resnet10t", "m.pt2", "--fuse"], "--fuse takes models of densezoo"),
        (["cas_vit_xs", "m.pt2", "--checkpoint", "none.pth"], "'none.pth' does not exist"),
        (["cas_vit_xs", "m.pt2", "--checkpoint", "headless.pth"], "holds no classifier"),
        (
            ["cas_vit_xs", "m.pt2", "--checkpoint", "three.pth", "--num-classes", "4"],
            "three.pth has 3 classes, not 4",
        ),
        (["cas_vit_s", "m.pt2", "--checkpoint", "three.pth"], "checkpoint of another"),
        pytest.param(
            ["cas_vit_xs", "m.onnx", "--opset", "17"], "opset is 17", marks=needs_onnx_exporter
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line_before_any_work(
    words, message, tmp_path, monkeypatch, capsys, headless
):
    (tmp_path / "there.pt2").write_bytes(b"mine")
    (tmp_path / "folder").mkdir()
    for name, state in headless.items():
        torch.save(state, tmp_path / name)
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    # Nothing is traced.
    monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: pytest.fail("traced"))
    assert main(["export", *words]) == 1
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1, err
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "there.pt2").read_bytes() == b"mine"


@pytest.fixture(scope="module")
def headless():
    state = timm.create_model("cas_vit_xs", num_classes=3).state_dict()
    return {
        "headless.pth": {k: v for k, v in state.items() if not k.startswith("head.")},
        "three.pth": state,
    }


def test_an_unwritable_folder_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export_files.os, "access", lambda path, mode: False)
    assert main(["export", "cas_vit_xs", str(tmp_path / "m.pt2")]) == 1
    assert "cannot be written to" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_missing_packages_are_named_with_their_extra(package, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name)
    )
    assert main(["export", "cas_vit_xs", str(tmp_path / "m.onnx")]) == 1
    error = capsys.readouterr().err
    assert f"ONNX export needs {package}: pip install 'densezoo[export]'" in error


def test_an_old_pytorch_is_told_for_onnx_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "__version__", "2.6.0+cpu")
    assert main(["export", "cas_vit_xs", str(tmp_path / "m.onnx")]) == 1
    assert "ONNX export needs torch 2.7 or newer, this is 2.6.0" in capsys.readouterr().err
    export_model.check_path(tmp_path / "m.pt2", overwrite=False)

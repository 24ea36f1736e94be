"""A mistake in a command line is one line that says what, where and what to do, and costs nothing.

Tables of cases: the command line or the error, its exit code, and parts of the line it says.
"""

import errno

import pytest
import torch
from mistakes import CONFIG, classifier_options, snapshot

from densezoo.tools import cli, list_models

# Command line, exit code, parts of the one line that it says.
COMMANDS = {
    "none": ("", 2, "COMMAND", "--help"),
    "unknown": ("trian x", 2, "no command 'trian'", "did you mean train"),
    "unknown-far": ("xyz", 2, "no command 'xyz'", "predict"),
    "option": ("list --filer x", 2, "--filer", "did you mean --filter"),
    "option-far": ("list --zzzzzz", 2, "--zzzzzz", "densezoo list --help"),
    "option-of-nested": ("data make d --imags 3", 2, "--imags", "did you mean --images"),
    "list-word": ("list x", 2, "unrecognized arguments: x"),
    "list-nothing": ("list --filter zzz", 1, "no model", "'zzz'", "densezoo list"),
    "macs-nothing": ("macs", 2, "required: model"),
    "macs-name": ("macs cas_vit_xxs", 1, "'cas_vit_xxs'", "did you mean cas_vit_"),
    "macs-tag": ("macs resnet50.nope", 1, "'resnet50.nope'", "alone is enough"),
    "macs-size-0": ("macs cas_vit_xs --size 0 3", 1, "size is 0 3", "at least 1 pixel"),
    "macs-size-word": ("macs cas_vit_xs --size a 3", 2, "--size", "invalid int value: 'a'"),
    "macs-size-one": ("macs cas_vit_xs --size 3", 2, "--size", "expected 2"),
    "macs-memory": (
        "macs cas_vit_xs --size 99999999 99999999",
        1,
        "not enough memory",
        "give a smaller --size",
    ),
    "bench-nothing": ("bench", 2, "required: MODEL"),
    "bench-name": ("bench nope", 1, "unknown model 'nope'", "densezoo list"),
    "bench-batch": ("bench cas_vit_xs --batch 0", 1, "batch is 0", "at least 1"),
    "bench-memory": ("bench cas_vit_xs --batch 99999999999", 1, "not enough memory", "--batch"),
    "bench-dtype": ("bench cas_vit_xs --dtype int8", 1, "dtype is 'int8'", "float32"),
    "bench-device": ("bench cas_vit_xs --device gpu", 1, "'gpu'", "cannot be used"),
    "bench-out-folder": ("bench cas_vit_xs --out {stage}/folder", 1, "folder", "another file"),
    "bench-out-file": ("bench cas_vit_xs --out {stage}/file", 1, "file", "another file"),
    "bench-out-nowhere": ("bench cas_vit_xs --out {stage}/no/x.csv", 1, "no/x.csv", "existing"),
    "bench-peer": ("bench cas_vit_xs --vs resnet18", 1, "timm:NAME", "'resnet18'"),
    "bench-repeats": ("bench cas_vit_xs --repeats 1", 1, "repeats is 1", "at least 20"),
    "bench-fuse": ("bench cas_vit_xs --train --fuse", 1, "--fuse is for inference"),
    "bench-threads": ("bench cas_vit_xs --threads 0", 1, "threads is 0", "at least 1"),
    "data-action": ("data mak", 2, "'mak'", "make"),
    "data-nowhere": ("data make", 2, "required: DIR"),
    "data-size": ("data make d --size 31", 1, "size is 31", "32 to 1024"),
    "data-images": ("data make d --images 0", 1, "images is 0", "at least 16"),
    "data-file": ("data make {stage}/file", 1, "file", "choose another folder"),
    "data-full": ("data make {stage}/folder", 1, "not empty", "choose another folder"),
    "data-under-file": ("data make {stage}/file/x", 1, "file'", "name another place"),
    "data-no-folder": ("data make /proc/none/x", 1, "/proc/none", "check the path"),
    "demo-seed": ("demo --seed -1", 1, "seed is -1", "0 or more"),
    "demo-file": ("demo --out {stage}/file", 1, "file", "choose a folder"),
    "demo-full": ("demo --out {stage}/folder", 1, "not empty", "another folder"),
    "demo-name": ("demo --out 'a b'", 1, "--out a b", "letters"),
    # configs
    "train-nothing": ("train", 2, "required: config"),
    "train-none": ("train retinanet_cas_vit_xs", 1, "'retinanet_cas_vit_xs'", "nearest: retinanet"),
    "train-blank": ("train ''", 1, "config ''", "nearest"),
    "train-folder": ("train {stage}/configs", 1, "configs'", "is a folder"),
    "train-empty": ("train {stage}/configs/empty.py", 1, "empty.py", "lacks model"),
    "train-few": ("train {stage}/configs/few.json", 1, "few.json", "lacks train_dataloader"),
    "train-syntax": ("train {stage}/configs/syntax.py", 1, "syntax.py", "SyntaxError", "line 1"),
    "train-base": ("train {stage}/configs/missing_base.py", 1, "nope.py", "check its _base_"),
    "train-circle": (
        "train {stage}/configs/circle.py",
        1,
        "inherits circle.py, which inherits it in turn",
    ),
    "train-exits": ("train {stage}/configs/exits.py", 1, "exits.py can't be read", "SystemExit"),
    "train-divides": ("train {stage}/configs/divides.py", 1, "divides.py", "ZeroDivisionError"),
    "train-broken": ("train {stage}/configs/broken.json", 1, "broken.json", "line 1 column"),
    "train-list": ("train {stage}/configs/list.json", 1, "list.json", "can't be read"),
    "train-text": ("train {stage}/configs/text.txt", 1, "text.txt", "another kind", ".py"),
    "train-latin": ("train {stage}/configs/latin.py", 1, "latin.py", "UnicodeDecodeError"),
    "train-imports": ("train {stage}/configs/imports.py", 1, "imports.py", "no_such_package"),
    "train-launcher": ("train {config} --launcher x", 2, "'x'", "pytorch"),
    "train-alone": ("train {config} --launcher pytorch", 1, "no launcher", "torchrun"),
    "train-seed": ("train {config} --seed a", 2, "--seed", "'a'"),
    "train-no-data": ("train {config}", 1, "data/imagenet", "train_dataloader.dataset.root=PATH"),
    "train-no-coco": ("train {detector}", 1, "data/coco", "train_dataloader.dataset.data_root="),
    "test-nothing": ("test {config}", 2, "required: checkpoint"),
    "test-none": ("test {config} none.pth", 1, "none.pth", "does not exist"),
    "predict-nothing": ("predict {config} x.pth", 2, "required: IMAGE"),
    "predict-threshold": ("predict {config} x.pth y.jpg --score-thr nan", 1, "nan", "0 to 1"),
    "predict-no-image": ("predict {config} x.pth y.jpg", 1, "y.jpg", "does not exist"),
    "predict-device": (
        "predict {config} x.pth {stage}/images/good.png --device gpu",
        1,
        "--device gpu",
        "can't be used",
    ),
    "predict-out": (
        "predict {config} x.pth {stage}/images/good.png --out {stage}/file",
        1,
        "file",
        "folder",
    ),
    "export-nothing": ("export cas_vit_xs", 2, "required: "),
    "export-name": ("export cas_vit_xxs m.onnx", 1, "'cas_vit_xxs'", "did you mean cas_vit_"),
    "export-suffix": ("export cas_vit_xs m.xyz", 1, "m.xyz", ".onnx"),
    "export-exists": ("export cas_vit_xs {stage}/folder/precious", 1, "precious"),
    "export-nowhere": ("export cas_vit_xs {stage}/no/m.onnx", 1, "m.onnx"),
    "export-size": ("export cas_vit_xs m.onnx --size 0 3", 1, "0 3"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_a_mistake_in_a_command_is_one_line_and_changes_nothing(case, run, stage, tmp_path):
    line, expected, *parts = COMMANDS[case]
    before = snapshot(stage)
    code, said = run(line)
    assert code == expected, said
    lines = [line for line in said.splitlines() if line.strip() and "%|" not in line]
    assert len(lines) == 1, said
    assert lines[0].startswith("densezoo"), said
    assert "error: " in lines[0]
    for part in parts:
        assert part in lines[0], lines[0]
    assert not list(tmp_path.iterdir()), "a command that can't start left files"
    assert snapshot(stage) == before


# Words beside those of a good run on the digits, and parts of the line that the command says.
RUNS = {
    "work-dir-file": (f"train {CONFIG} --work-dir {{stage}}/file", "file'", "--work-dir"),
    "work-dir-under": (f"train {CONFIG} --work-dir {{stage}}/file/x", "file/x'", "--work-dir"),
    "work-dir-proc": (f"train {CONFIG} --work-dir /proc/none", "/proc/none'", "--work-dir"),
    "work-dir-used": (f"train {CONFIG} --work-dir {{stage}}/checkpoints", "holds checkpoints of"),
    "resume-none": (f"train {CONFIG} --resume none.pth", "'none.pth' does not exist"),
    "resume-weights": (
        f"train {CONFIG} --resume {{stage}}/checkpoints/good.pth",
        "no state of an optimizer",
        "load_from=FILE",
    ),
    "test-out-file": (
        f"test {CONFIG} {{stage}}/checkpoints/good.pth --out {{stage}}/file",
        "file",
        "another file",
    ),
    "test-out-nowhere": (
        f"test {CONFIG} {{stage}}/checkpoints/good.pth --out {{stage}}/no/a.json",
        "no/a.json",
    ),
    "test-work-dir": (
        f"test {CONFIG} {{stage}}/checkpoints/good.pth --work-dir {{stage}}/file",
        "file'",
        "--work-dir",
    ),
    "test-other": (f"test {CONFIG} {{stage}}/checkpoints/other_family.pth", "another model"),
    "test-tta": (f"test {CONFIG} {{stage}}/checkpoints/good.pth --tta", "tta"),
    "train-scale": (f"train {CONFIG} --auto-scale-lr", "auto_scale_lr.base_batch_size"),
}


@pytest.mark.parametrize("case", RUNS)
def test_a_run_that_would_lose_something_does_not_start(case, run, stage, tmp_path):
    line, *parts = RUNS[case]
    before = snapshot(stage)
    options = classifier_options(stage)
    options += ["auto_scale_lr.base_batch_size=None"] if case == "train-scale" else []
    code, said = run(line, options)
    assert code == 1 and "Traceback" not in said, said
    last = said.strip().splitlines()[-1]
    assert last.startswith(f"densezoo {line.split()[0]}: error: ")
    for part in parts:
        assert part in last, last
    assert snapshot(stage) == before
    assert not list(tmp_path.rglob("*.pth"))


def _raising(monkeypatch, error):
    def raise_error(args):
        raise error

    monkeypatch.setattr(list_models, "run", raise_error)


SAID = {
    "no-space": (OSError(errno.ENOSPC, "No space left on device", "a.pth"), 1, "'a.pth': No space",
                 "free some space"),
    "read-only": (OSError(errno.EROFS, "Read-only file system", "/b"), 1, "'/b': Read-only",
                  "name a place"),
    "permission": (PermissionError(errno.EACCES, "Permission denied", "c"), 1, "'c'", "permission"),
    "memory": (MemoryError(), 1, "not enough memory", "other programs"),
    "gpu-memory": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 1,
                   "not enough memory (CUDA out of memory. Tried"),
    "worker-memory": (RuntimeError("Caught MemoryError in DataLoader worker process 0."), 1,
                      "not enough memory"),
    "lines": (ValueError("one\n  two\nthree"), 1, "error: one two three"),
    "wordless": (ValueError(), 1, "error: ValueError"),
    "interrupted": (KeyboardInterrupt(), 130, "densezoo list: interrupted"),
}  # fmt: skip


@pytest.mark.parametrize("case", SAID)
def test_errors_become_one_line_with_advice(case, monkeypatch, capsys):
    error, expected, *parts = SAID[case]
    _raising(monkeypatch, error)
    assert cli.main(["list"]) == expected
    (line,) = capsys.readouterr().err.splitlines()
    for part in parts:
        assert part in line, line


def test_memory_that_another_error_came_from_is_named(monkeypatch, capsys):
    error = RuntimeError("the run stopped: ...")
    error.__cause__ = MemoryError("cannot allocate 3 GiB")
    _raising(monkeypatch, error)
    assert cli.main(["list"]) == 1
    assert "not enough memory" in capsys.readouterr().err


def test_a_defect_keeps_its_traceback_and_says_what_to_do(monkeypatch, capsys):
    _raising(monkeypatch, AttributeError("'X' has no y"))
    assert cli.main(["list"]) == 70
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and "raise_error" in said
    last = said.splitlines()[-1]
    assert last.startswith("densezoo list: AttributeError: 'X' has no y")
    assert "defect of densezoo" in last and "report it" in last


@pytest.mark.parametrize(
    "error", [ValueError("x"), AttributeError("x"), MemoryError("x")], ids=repr
)
def test_debug_shows_every_traceback(error, monkeypatch):
    _raising(monkeypatch, error)
    with pytest.raises(type(error)):
        cli.main(["list", "--debug"])

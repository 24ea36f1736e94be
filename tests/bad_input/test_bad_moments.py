"""Ctrl-C and full disks are one line and leave no half a file; a closed pipe is no error.

Every command is a process of its own.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

from mistakes import CONFIG, classifier_options
from PIL import Image

from densezoo.backbones.checkpoints import read_checkpoint
from densezoo.tools import demo


def _start(words, folder, *, file_size=None):
    """Start the command in a process group of its own, whose files are limited to some bytes."""

    def limit():
        if file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))

    return subprocess.Popen(
        [sys.executable, "-m", "densezoo", *map(str, words)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdout=open(folder / "stdout", "w"),
        stderr=open(folder / "stderr", "w"),
        start_new_session=True,
        preexec_fn=limit,
    )


def _interrupt(process, is_time, seconds=120):
    """Press Ctrl-C, which the whole group gets, when `is_time()`; return the exit code."""
    end = time.monotonic() + seconds
    try:
        while not is_time():
            assert process.poll() is None, "it ended before it was interrupted"
            assert time.monotonic() < end, "the moment to interrupt it did not come"
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        return process.wait(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _assert_interrupted(code, folder, command):
    said = (folder / "stderr").read_text()
    assert code == 130, said
    assert said.splitlines()[-1] == f"{command}: interrupted"
    assert "Traceback" not in said


def _has(folder, name, text):
    return lambda: text in (folder / name).read_text(errors="replace").replace(" ", "")


def test_ctrl_c_during_the_imports(tmp_path):
    process = _start(["list"], tmp_path)
    maps = Path(f"/proc/{process.pid}/maps")
    code = _interrupt(process, lambda: "libtorch_python" in maps.read_text())
    _assert_interrupted(code, tmp_path, "densezoo")


def test_ctrl_c_during_a_training(stage, tmp_path):
    options = [*classifier_options(stage), "train_cfg.max_epochs=1000"]
    options += ["default_hooks.logger.interval=1", "train_dataloader.num_workers=1"]
    words = ["train", CONFIG, "--work-dir", "work", "--cfg-options", *options]
    process = _start(words, tmp_path)
    code = _interrupt(process, _has(tmp_path, "stdout", "Epoch(train)[3]"))
    _assert_interrupted(code, tmp_path, "densezoo train")
    left = sorted(path.name for path in (tmp_path / "work").glob("*.pth"))
    assert "epoch_2.pth" in left
    for name in left:
        assert read_checkpoint(tmp_path / "work" / name)["meta"]
    last = Path((tmp_path / "work" / "last_checkpoint").read_text().strip())
    assert last.name in left


def test_ctrl_c_during_predictions(stage, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(2000):
        os.link(stage / "images" / "good.png", tmp_path / "images" / f"{i}.png")
    words = ["predict", CONFIG, stage / "checkpoints" / "good.pth", "images", "--out", "drawn"]
    process = _start([*words, "--cfg-options", *classifier_options(stage)], tmp_path)
    code = _interrupt(process, lambda: len(list(tmp_path.glob("drawn/*.png"))) > 3)
    _assert_interrupted(code, tmp_path, "densezoo predict")
    for path in (tmp_path / "drawn").iterdir():
        if path.suffix == ".png":
            Image.open(path).load()
        else:
            assert path.suffix == ".json" and json.loads(path.read_text())


def test_ctrl_c_during_a_benchmark(tmp_path):
    words = ["bench", "cas_vit_xs", "--size", "32", "32", "--repeats", "100000", "--out", "a.csv"]
    process = _start(words, tmp_path)
    code = _interrupt(process, _has(tmp_path, "stderr", "bench:"))
    _assert_interrupted(code, tmp_path, "densezoo bench")
    assert not (tmp_path / "a.csv").exists()


def test_ctrl_c_while_data_is_made(tmp_path):
    (tmp_path / "place").mkdir()
    words = ["data", "make", "place/digits", "--images", "20000"]
    process = _start(words, tmp_path)
    code = _interrupt(process, lambda: list(tmp_path.glob("place/.digits.*/images/train/*.jpg")))
    _assert_interrupted(code, tmp_path, "densezoo data")
    assert not list((tmp_path / "place").iterdir())


def test_ctrl_c_during_the_demo(tmp_path):
    process = _start(["demo", "--out", "out"], tmp_path)
    code = _interrupt(process, lambda: (tmp_path / "out" / "logs" / "data.log").exists())
    _assert_interrupted(code, tmp_path, "densezoo demo")
    assert json.loads((tmp_path / "out" / demo.MARKER).read_text())["seconds"] == {}


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    line = f"{sys.executable} -m densezoo list | head -1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    # What a program ends with that such a signal killed, or success if all was read in time.
    assert done.returncode in (0, 128 + signal.SIGPIPE)


def test_a_full_disk_is_named_while_data_is_made(tmp_path):
    (tmp_path / "place").mkdir()
    process = _start(["data", "make", "place/digits", "--images", "16"], tmp_path, file_size=2048)
    assert process.wait(timeout=120) == 1
    line = (tmp_path / "stderr").read_text().splitlines()[-1]
    assert line.startswith("densezoo data: error: ") and "File too large" in line, line
    assert "ulimit -f" in line
    assert not list((tmp_path / "place").iterdir())


def test_a_full_disk_stops_predictions_without_half_a_picture(stage, tmp_path):
    words = ["predict", CONFIG, stage / "checkpoints" / "good.pth", stage / "images" / "good.png"]
    words += ["--out", "drawn", "--cfg-options", *classifier_options(stage)]
    process = _start(words, tmp_path, file_size=2048)
    assert process.wait(timeout=120) == 1
    line = (tmp_path / "stderr").read_text().splitlines()[-1]
    assert line.startswith("densezoo predict: error: ") and "File too large" in line, line
    assert not list(tmp_path.glob("drawn/*"))

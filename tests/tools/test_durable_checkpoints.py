"""Checkpoints survive kills, full disks and folders that can't be written."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from small_run import make_runner

from densezoo.backbones.checkpoints import read_checkpoint
from densezoo.tools.engine.checks import find_last_checkpoint, is_of_work_dir
from densezoo.tools.engine.durable_checkpoints import (
    DurableBackend,
    DurableCheckpointHook,
    write_durably,
)
from densezoo.tools.engine.errors import RunStopped
from densezoo.tools.engine.runs import run_loop

# What a file leads to whose writing fails, for root as well. The first is a disk without room,
# the second a folder without permission or a read-only one, as the machine has it.
OBSTACLES = {"/dev/full": {errno.ENOSPC}, "/sys/none": {errno.EACCES, errno.EPERM, errno.EROFS}}


class Obstacle(Hook):
    """From the second epoch on, let the writing of a file fail as `target` makes it."""

    priority = "HIGHEST"

    def __init__(self, path, target):
        self.path, self.target = path, target

    def before_train_epoch(self, runner):
        if runner.epoch == 1:
            self.path.with_name(f".{self.path.name}.unfinished").symlink_to(self.target)


class Listing(Hook):
    """Note the checkpoints that are there whenever one is about to be written."""

    def __init__(self):
        self.names = []

    def before_save_checkpoint(self, runner, checkpoint):
        self.names.append(_names(runner.work_dir))


def _names(folder):
    return sorted(path.name for path in Path(folder).glob("*.pth"))


def _stop(runner):
    with pytest.raises(RunStopped) as stopped:
        runner.train()
    message = str(stopped.value)
    assert "\n" not in message
    return message, stopped.value.__cause__


@pytest.mark.parametrize("target", OBSTACLES)
def test_a_failed_write_keeps_the_checkpoint_before_and_says_how_to_go_on(tmp_path, target):
    obstacle = Obstacle(tmp_path / "epoch_2.pth", target)
    message, cause = _stop(make_runner(tmp_path, hooks=[obstacle], max_keep_ckpts=1))
    assert cause.errno in OBSTACLES[target]
    assert f"'{tmp_path / 'epoch_2.pth'}' can't be written ({cause.strerror})" in message
    assert f"--resume {tmp_path / 'epoch_1.pth'}" in message
    assert _names(tmp_path) == ["epoch_1.pth"]
    assert not list(tmp_path.glob(".*.unfinished"))
    assert find_last_checkpoint(tmp_path) == tmp_path / "epoch_1.pth"
    make_runner(tmp_path, resume_from=tmp_path / "epoch_1.pth", max_keep_ckpts=1).train()
    assert _names(tmp_path) == ["epoch_5.pth"]


def test_a_first_checkpoint_that_fails_says_that_there_is_none(tmp_path):
    (tmp_path / "file").write_text("")
    message, _ = _stop(make_runner(tmp_path / "run", out_dir=str(tmp_path / "file")))
    assert str(tmp_path / "file" / "run" / "epoch_1.pth") in message
    assert "none was written before" in message


def test_where_the_record_alone_fails_the_checkpoint_is_named(tmp_path):
    obstacle = Obstacle(tmp_path / "last_checkpoint", "/dev/full")
    message, _ = _stop(make_runner(tmp_path, hooks=[obstacle]))
    assert "last_checkpoint' can't be written" in message
    assert f"--resume {tmp_path / 'epoch_2.pth'}" in message
    assert (tmp_path / "last_checkpoint").read_text() == str(tmp_path / "epoch_1.pth")
    assert read_checkpoint(tmp_path / "epoch_2.pth")["meta"]["epoch"] == 2


def test_a_best_checkpoint_that_fails_leaves_the_best_one_before(tmp_path):
    obstacle = Obstacle(tmp_path / "best_score_epoch_2.pth", "/dev/full")
    options = dict(figures=[1, 2], save_best="score", rule="greater", hooks=[obstacle])
    message, _ = _stop(make_runner(tmp_path, **options))
    assert "best_score_epoch_2.pth" in message
    assert _names(tmp_path) == ["best_score_epoch_1.pth", "epoch_1.pth", "epoch_2.pth"]


def test_a_file_beyond_the_limit_of_the_process_is_refused_and_named(tmp_path):
    script = (
        "import resource, sys; from small_run import make_runner\n"
        "runner = make_runner(sys.argv[1], size=10**6)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))\n"  # bytes, of 4 * 10**6
        "runner.train()"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    last_line = done.stderr.strip().splitlines()[-1]
    assert "RunStopped" in last_line and os.strerror(errno.EFBIG) in last_line
    assert str(tmp_path / "epoch_1.pth") in last_line
    assert not list(tmp_path.glob("*.pth")) and not list(tmp_path.glob(".*.unfinished"))


def test_outdated_checkpoints_go_after_the_new_one_is_there(tmp_path):
    listing = Listing()
    figures = [1, 2, 0, 0, 0]
    options = dict(figures=figures, save_best="score", rule="greater", max_keep_ckpts=2)
    make_runner(tmp_path, hooks=[listing], **options).train()
    best = ["best_score_epoch_1.pth", "best_score_epoch_2.pth"]
    # Each epoch writes its checkpoint; one that is the best writes the best and its own again.
    assert listing.names == [
        [],
        ["epoch_1.pth"],
        [best[0], "epoch_1.pth"],
        [best[0], "epoch_1.pth"],
        [best[0], "epoch_1.pth", "epoch_2.pth"],
        [*best, "epoch_1.pth", "epoch_2.pth"],
        [best[1], "epoch_1.pth", "epoch_2.pth"],
        [best[1], "epoch_2.pth", "epoch_3.pth"],
        [best[1], "epoch_3.pth", "epoch_4.pth"],
    ]
    assert _names(tmp_path) == [best[1], "epoch_4.pth", "epoch_5.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == str(tmp_path / "epoch_5.pth")


class Leaving(Hook):
    """End a run as a kill does right before the first checkpoint is removed."""

    priority = "LOWEST"

    def before_train(self, runner):
        hook = next(hook for hook in runner.hooks if isinstance(hook, DurableCheckpointHook))
        hook.file_backend.remove = self._leave

    def _leave(self, path):
        raise KeyboardInterrupt


def test_a_kill_before_the_removal_leaves_no_checkpoint_too_many_after_resuming(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make_runner(tmp_path, hooks=[Leaving()], max_keep_ckpts=2).train()
    assert _names(tmp_path) == ["epoch_1.pth", "epoch_2.pth", "epoch_3.pth"]
    assert find_last_checkpoint(tmp_path) == tmp_path / "epoch_3.pth"
    make_runner(tmp_path, resume_from=tmp_path / "epoch_3.pth", max_keep_ckpts=2).train()
    assert _names(tmp_path) == ["epoch_4.pth", "epoch_5.pth"]


def test_a_run_that_goes_back_writes_its_checkpoints_again_and_keeps_them(tmp_path):
    figures = dict(save_best="score", rule="greater", max_keep_ckpts=3)
    make_runner(tmp_path, figures=[1, 2, 3, 4, 5], **figures).train()
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in _names(tmp_path)}
    assert list(before) == ["best_score_epoch_5.pth", "epoch_3.pth", "epoch_4.pth", "epoch_5.pth"]
    runner = make_runner(tmp_path, figures=[4, 6], resume_from=tmp_path / "epoch_3.pth", **figures)
    runner.train()
    assert _names(tmp_path) == list(before)
    for name in ("epoch_4.pth", "epoch_5.pth", "best_score_epoch_5.pth"):
        assert (tmp_path / name).stat().st_mtime_ns > before[name]


def test_what_a_killed_run_left_unfinished_is_no_checkpoint_and_is_removed(tmp_path):
    (tmp_path / ".epoch_9.pth.unfinished").write_bytes(b"half")
    (tmp_path / ".gitignore").write_text("*")
    assert find_last_checkpoint(tmp_path) is None
    make_runner(tmp_path).train()
    assert not list(tmp_path.glob(".*.unfinished"))
    assert (tmp_path / ".gitignore").exists()


def test_published_keys_are_all_that_a_published_checkpoint_holds(tmp_path):
    make_runner(tmp_path, published_keys=["state_dict"], max_keep_ckpts=1).train()
    published = next(path for path in tmp_path.glob("epoch_5-*.pth"))
    assert list(read_checkpoint(published)) == ["state_dict"]
    assert read_checkpoint(tmp_path / "epoch_5.pth").keys() > {"state_dict", "optimizer"}


def test_other_stores_are_left_to_mmengine(tmp_path):
    runner = make_runner(tmp_path, backend_args=dict(backend="local"), max_keep_ckpts=1)
    runner.train()
    hook = next(hook for hook in runner.hooks if isinstance(hook, DurableCheckpointHook))
    assert not isinstance(hook.file_backend, DurableBackend)
    assert _names(tmp_path) == ["epoch_5.pth"]


def test_a_write_that_is_broken_off_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "file"
    write_durably(path, b"old")
    with pytest.raises(TypeError):
        write_durably(path, "no bytes")
    assert path.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_log_that_finds_no_room_ends_a_run_in_one_line():
    def write():
        with open("/dev/full", "w") as file:
            file.write("a line")

    with pytest.raises(RunStopped, match="No space left on device.*--resume"):
        run_loop(write)


@pytest.mark.parametrize("kills", [4, pytest.param(12, marks=pytest.mark.slow)])
def test_runs_killed_at_random_moments_leave_a_last_checkpoint_that_loads(kills, tmp_path):
    script = Path(__file__).with_name("small_run.py")
    command = [sys.executable, str(script), str(tmp_path), "0", str(kills)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    assert "iterations reached:" in done.stdout


DAMAGES = {
    "missing": lambda record, last: record.unlink(),
    "empty": lambda record, last: record.write_text(""),
    "zeros": lambda record, last: record.write_bytes(bytes(40)),
    "names nothing": lambda record, last: record.write_text("/nowhere/epoch_9.pth"),
    "names a folder": lambda record, last: record.write_text(str(record.parent)),
    "names half a file": lambda record, last: os.truncate(last, last.stat().st_size // 2),
    "names an empty file": lambda record, last: os.truncate(last, 0),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_leads_to_the_newest_whole_checkpoint(tmp_path, damage, capfd):
    make_runner(tmp_path, figures=[1] * 5, save_best="score", rule="greater").train()
    torch.save({"state_dict": {}}, tmp_path / "later.pth")  # nothing to resume from
    whole = tmp_path / ("epoch_4.pth" if damage.endswith("file") else "epoch_5.pth")
    DAMAGES[damage](tmp_path / "last_checkpoint", tmp_path / "epoch_5.pth")
    capfd.readouterr()
    assert find_last_checkpoint(tmp_path) == whole
    said = "".join(capfd.readouterr())
    assert str(whole) in said and "last_checkpoint" in said


def test_a_damaged_checkpoint_that_is_the_only_one_is_named(tmp_path):
    (tmp_path / "epoch_1.pth").write_bytes(b"damaged")
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "epoch_1.pth"))
    assert find_last_checkpoint(tmp_path) == tmp_path / "epoch_1.pth"
    with pytest.raises(ValueError, match=r"epoch_1.pth.*truncated, damaged"):
        read_checkpoint(tmp_path / "epoch_1.pth")


def test_checkpoints_that_lie_elsewhere_are_of_the_run(tmp_path):
    work_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    make_runner(work_dir, out_dir=str(elsewhere)).train()
    last = find_last_checkpoint(work_dir)
    assert last.parent.parent == elsewhere
    assert is_of_work_dir(last, work_dir)
    assert not is_of_work_dir(last.with_name("epoch_1.pth"), work_dir)
    assert not is_of_work_dir(None, work_dir)
    (work_dir / "last_checkpoint").write_text("s3://bucket/run/epoch_3.pth")
    assert find_last_checkpoint(work_dir) == "s3://bucket/run/epoch_3.pth"
    assert is_of_work_dir("s3://bucket/run/epoch_3.pth", work_dir)
    assert not is_of_work_dir("s3://bucket/other/epoch_3.pth", work_dir)

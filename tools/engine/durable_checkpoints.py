"""Checkpoints that a killed run, a full disk or a folder that can't be written leave whole."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import logging
import pickle
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process, master_only
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.logging import print_log
from mmengine.runner import Runner, save_checkpoint

from ...backbones.checkpoints import read_checkpoint
from ..durable_files import UNFINISHED, write_durably
from .checks import find_last_checkpoint
from .errors import RunStopped

BACKEND = "durable"


@register_backend(BACKEND, force=True)
class DurableBackend(LocalBackend):
    """mmengine's local files, written durably; removals can be put off until a file is safe."""

    def __init__(self) -> None:
        self._is_postponing = False
        self._postponed: list[str] = []

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write a file durably, after making its folder."""
        write_durably(filepath, obj)

    def remove(self, filepath: str | Path) -> None:
        """Remove a file, or note that it is to be removed."""
        if self._is_postponing:
            self._postponed.append(str(filepath))
        else:
            super().remove(filepath)

    @contextlib.contextmanager
    def postpone_removals(self) -> Iterator[list[str]]:
        """Put off removals while the context lasts, and forget them where it ends in an error.

        Yields the paths that will be removed in the end, from which some can be taken.
        """
        self._is_postponing, self._postponed = True, []
        try:
            yield self._postponed
        finally:
            self._is_postponing = False
        for path in self._postponed:
            super().remove(path)


# What the hook hands on to Runner.save_checkpoint.
_SAVE_OPTIONS = ("save_optimizer", "save_param_scheduler", "meta")


class DurableCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook, whose files outlive what may happen to the run and its disk.

    A checkpoint is written to a temporary file in the same folder, synced and renamed, and so is
    ``last_checkpoint``, after it. Only then are outdated checkpoints removed. Where a checkpoint
    can't be written, the run stops with one line and all earlier files are untouched.

    Arguments are those of mmengine's hook. An `out_dir` on a remote store, or one with
    `backend_args`, is left to mmengine.

    Raises:
        ValueError: an argument is unknown (mmengine's hook hands it on, and fails at the first
            checkpoint).
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for name in self.args:
            if name not in _SAVE_OPTIONS:
                known = [*signature(CheckpointHook.__init__).parameters, *_SAVE_OPTIONS]
                near = difflib.get_close_matches(name, known, n=2)
                hint = f"; did you mean {' or '.join(near)}?" if near else ""
                raise ValueError(f"the checkpoint hook takes no {name!r}{hint}")

    def before_train(self, runner: Runner) -> None:
        """Choose the file backend, and remove what a killed run left unfinished."""
        out_dir = str(self.out_dir or runner.work_dir)
        if self.backend_args is None and self.file_client_args is None and "://" not in out_dir:
            self.backend_args = {"backend": BACKEND}
        super().before_train(runner)
        if is_main_process() and self._is_durable:
            for folder in {Path(self.out_dir), Path(runner.work_dir)}:
                for path in folder.glob(f".*{UNFINISHED}"):
                    path.unlink(missing_ok=True)

    @property
    def _is_durable(self) -> bool:
        return isinstance(self.file_backend, DurableBackend)

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        """Save a checkpoint, record it as the last one, then remove those that are too many."""
        if not self._is_durable:
            super()._save_checkpoint_with_step(runner, step, meta)
            return
        outdated = []
        if self.max_keep_ckpts > 0:
            kept = [*(known for known in self.keep_ckpt_ids if known != step), step]
            outdated = kept[: -self.max_keep_ckpts]
            self.keep_ckpt_ids.clear()
            self.keep_ckpt_ids.extend(kept)  # holds as many as are to be kept
            # With those that are there still: a run that is killed now removes them on resuming.
            runner.message_hub.update_info("keep_ckpt_ids", kept)
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        with self._stopping_on_errors(runner):
            runner.save_checkpoint(
                self.out_dir,
                name,
                save_optimizer=self.save_optimizer,
                save_param_scheduler=self.save_param_scheduler,
                meta=meta,
                by_epoch=self.by_epoch,
                backend_args=self.backend_args,
                **self.args,
            )
        if is_main_process():
            self._read_back(self.last_ckpt, runner)
            record = Path(runner.work_dir, "last_checkpoint")
            with self._stopping_on_errors(runner, self.last_ckpt):
                write_durably(record, str(self.last_ckpt).encode())
            for known in outdated:
                path = self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(known))
                if self.file_backend.isfile(path):
                    self.file_backend.remove(path)
        if outdated:
            runner.message_hub.update_info("keep_ckpt_ids", list(self.keep_ckpt_ids))

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        """Save a checkpoint that is the best so far, then remove the one that was."""
        if not self._is_durable:
            super()._save_best_checkpoint(runner, metrics)
            return
        with (
            self._stopping_on_errors(runner),
            self.file_backend.postpone_removals() as outdated,
        ):
            super()._save_best_checkpoint(runner, metrics)
            best = {getattr(self, "best_ckpt_path", None)}
            best |= set(getattr(self, "best_ckpt_path_dict", {}).values())
            # A run that goes through an epoch again writes the file that it would remove.
            outdated[:] = [path for path in outdated if path not in best]

    @master_only
    def _publish_model(self, runner: Runner, ckpt_path: str) -> None:
        """Write a checkpoint's `published_keys` alone to a file named by its contents."""
        if not self._is_durable:
            super()._publish_model(runner, ckpt_path)
            return
        checkpoint = read_checkpoint(ckpt_path)
        published = {key: checkpoint[key] for key in self.published_keys if key in checkpoint}
        digest = hashlib.sha256(pickle.dumps(published)).hexdigest()
        path = Path(ckpt_path)
        path = path.with_name(f"{path.stem}-{digest[:8]}.pth")
        with self._stopping_on_errors(runner):
            save_checkpoint(published, str(path), backend_args=self.backend_args)
        print_log(f"{', '.join(published)} of {ckpt_path} are published in {path}", runner.logger)

    def _read_back(self, path: str, runner: Runner) -> None:
        """Say at once if a checkpoint holds what no safe reader takes, such as odd metainfo."""
        try:
            read_checkpoint(path)
        except ValueError as error:
            print_log(
                f"the checkpoint just saved can't be resumed from or tested: {error}",
                runner.logger,
                logging.ERROR,
            )

    @contextlib.contextmanager
    def _stopping_on_errors(self, runner: Runner, newest: str | None = None) -> Iterator[None]:
        """Turn an error of the file system into the end of the run, in one line.

        `newest` is a checkpoint that is known to be there; by default the last one recorded.
        """
        try:
            yield
        except OSError as error:
            newest = newest or find_last_checkpoint(Path(runner.work_dir))
            way_on = (
                f"{str(newest)!r} is whole: make room or give access, then continue from it with "
                f"--resume {newest}"
                if newest
                else "none was written before: make room or give access, then start again"
            )
            raise RunStopped(
                f"the run stopped, since checkpoint {error.filename!r} can't be written "
                f"({error.strerror or error}); {way_on}"
            ) from error

"""Checks of what a run needs, made before it starts, so that a mistake costs seconds.

Each raises a ValueError or an OSError of one line that says what to change.
"""

from __future__ import annotations

import difflib
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mmengine.logging import print_log
from mmengine.optim import OPTIMIZERS
from torch import Tensor, nn

from ...backbones.checkpoints import check_numbers, read_checkpoint
from ...layers.arguments import check_mapping, check_number, check_whole_number
from .config_files import walk_dicts
from .image_data import TimmImages, TimmStream, reader_kind

LOADERS = {"train": ("train_dataloader", "val_dataloader"), "test": ("test_dataloader",)}
EVALUATORS = {"train": ("val_evaluator",), "test": ("test_evaluator",)}


def check_settings(cfg: dict, task: str) -> None:
    """Check the settings that mmengine takes as they come, and fails on late or not at all.

    Args:
        cfg: the config.
        task: "train" or "test".

    Raises:
        ValueError: naming the first one that is no good, and what is taken.
    """
    parts = [("model", cfg["model"])]
    loaders = [loader for loader in LOADERS[task] if cfg.get(loader)]
    for loader in loaders:
        check_mapping(loader, cfg[loader])
        check_whole_number(f"{loader}.batch_size", cfg[loader].get("batch_size", 1), 1)
        check_whole_number(f"{loader}.num_workers", cfg[loader].get("num_workers", 0), 0)
        parts.append((f"{loader}.dataset", cfg[loader].get("dataset")))
    for key, part in parts:
        check_mapping(key, part)
        if not isinstance(part.get("type"), str):
            raise ValueError(f"{key}.type is {part.get('type')!r}: the name of a class is taken")
    seed = (cfg.get("randomness") or {}).get("seed")
    if seed is not None:
        check_whole_number("the seed", seed, 0, 2**32 - 1)
    if task == "train":
        check_mapping("train_cfg", cfg["train_cfg"])
        for name in ("max_epochs", "max_iters", "val_interval"):
            if cfg["train_cfg"].get(name) is not None:
                check_whole_number(f"train_cfg.{name}", cfg["train_cfg"][name], 1)
        check_mapping("optim_wrapper", cfg["optim_wrapper"])
        counts = cfg["optim_wrapper"].get("accumulative_counts", 1)
        check_whole_number("optim_wrapper.accumulative_counts", counts, 1)
        optimizer = cfg["optim_wrapper"].get("optimizer")
        check_mapping("optim_wrapper.optimizer", optimizer)
        kind = optimizer.get("type")
        if isinstance(kind, str) and OPTIMIZERS.get(kind) is None:
            near = difflib.get_close_matches(kind, OPTIMIZERS.module_dict, n=3) or ["AdamW", "SGD"]
            raise ValueError(
                f"optim_wrapper.optimizer.type is {kind!r}, which is no optimizer; did you mean "
                f"{', '.join(near)}?"
            )
        if "lr" in optimizer:
            check_number("optim_wrapper.optimizer.lr", optimizer["lr"], 0)


def _require(path: Path, key: str, what: str) -> None:
    """Raise a FileNotFoundError unless `path` exists, or is on a remote store of mmengine's."""
    if not path.exists() and ":/" not in str(path):
        raise FileNotFoundError(
            f"{what} {str(path)!r} does not exist; link the data there, or set it with "
            f"--cfg-options {key}=PATH"
        )


def check_data(cfg: dict, task: str) -> None:
    """Check that the folders and annotation files of the data sets of `cfg` exist.

    Args:
        cfg: the config.
        task: "train" (training and validation data) or "test".

    Raises:
        FileNotFoundError: naming the first one that is missing, and the option that sets it.
    """
    for loader in LOADERS[task]:
        if not cfg.get(loader):
            continue
        for key, dataset in walk_dicts(cfg[loader]["dataset"], f"{loader}.dataset"):
            if dataset.get("type") == "TimmDataset":
                if not isinstance(dataset.get("root"), (str, os.PathLike)):
                    raise ValueError(f"{key}.root is {dataset.get('root')!r}: a path is taken")
                if reader_kind(dataset.get("name", "")) in ("", "wds"):
                    _require(Path(dataset["root"]), f"{key}.root", "data folder")
            elif "type" in dataset and ("ann_file" in dataset or "data_prefix" in dataset):
                _check_annotated(dataset, key)
    for evaluator in EVALUATORS[task]:
        for key, metric in walk_dicts(cfg.get(evaluator), evaluator):
            if metric.get("ann_file"):
                _require(Path(metric["ann_file"]), f"{key}.ann_file", "annotation file")


def _check_annotated(dataset: dict, key: str) -> None:
    """Check one of mmengine's BaseDataset, whose paths are relative to its data_root."""
    if (dataset.get("backend_args") or {}).get("backend", "local") != "local":
        return  # on a store that may map local paths to its own
    root = Path(dataset.get("data_root") or "")
    if dataset.get("data_root"):
        _require(root, f"{key}.data_root", "data folder")
    if dataset.get("ann_file"):
        _require(root / dataset["ann_file"], f"{key}.ann_file", "annotation file")
    prefixes = dataset.get("data_prefix") or {}
    for name, folder in prefixes.items() if isinstance(prefixes, dict) else ():
        if isinstance(folder, str) and folder:
            _require(root / folder, f"{key}.data_prefix.{name}", "data folder")


def check_initial_weights(cfg: dict) -> None:
    """Check that the files that ``init_cfg`` of the model starts from exist and can be read.

    Raises:
        FileNotFoundError: naming the file, the model and how to choose another or none.
        ValueError: a file is no checkpoint, or holds more than one may.
    """
    for key, module in walk_dicts(cfg["model"], "model"):
        checkpoint = (module.get("init_cfg") or {}).get("checkpoint")
        if isinstance(checkpoint, str) and "://" not in checkpoint:
            if not Path(checkpoint).is_file():
                name = module.get("model_name", module.get("type"))
                raise FileNotFoundError(
                    f"the initial weights of {name} are not at {checkpoint!r}: download them "
                    f"there (`densezoo list` says from where), or give --cfg-options "
                    f"{key}.init_cfg.checkpoint=FILE, or {key}.init_cfg=None to start from "
                    "random weights"
                )
            read_checkpoint(checkpoint)


def check_work_dir(work_dir: Path, resume: bool) -> None:
    """Make the work dir, and check that it can be written and holds no other run's checkpoints.

    Raises:
        FileExistsError: if it holds checkpoints and the run is not to resume.
        OSError: if it can't be made or written.
    """
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=work_dir):
            pass
    except OSError as error:
        raise type(error)(
            f"work dir {str(work_dir)!r} can't be written ({error.strerror}); give another with "
            "--work-dir"
        ) from error
    if not resume and (any(work_dir.glob("*.pth")) or (work_dir / "last_checkpoint").exists()):
        raise FileExistsError(
            f"work dir {str(work_dir)!r} holds checkpoints of an earlier run, which this one would "
            "overwrite; continue it with --resume (--resume CHECKPOINT where last_checkpoint is "
            "gone), or give another --work-dir"
        )


def is_of_work_dir(checkpoint: Path | str | None, work_dir: Path) -> bool:
    """Tell whether a run that resumes from a checkpoint goes on in the same work dir.

    It does where the checkpoint lies in it, or is the one that ``last_checkpoint`` names, which
    may lie elsewhere (``default_hooks.checkpoint.out_dir``).
    """
    if checkpoint is None:
        return False
    record = work_dir / "last_checkpoint"
    if record.is_file() and record.read_bytes().decode(errors="replace").strip() == str(checkpoint):
        return True
    return "://" not in str(checkpoint) and Path(checkpoint).resolve().parent == work_dir.resolve()


def find_last_checkpoint(work_dir: Path) -> Path | str | None:
    """Find the checkpoint that ``--resume`` continues from; None if the work dir holds none.

    A work dir that was moved is found too: the file name counts, not the recorded folder. Where
    ``last_checkpoint`` is missing, damaged or names a file that does not load, it is the newest
    checkpoint in the folder that does, and the log says so. A URL is returned as it is recorded.
    """
    record = work_dir / "last_checkpoint"
    recorded = record.read_bytes().decode(errors="replace").strip() if record.is_file() else ""
    if "://" in recorded:
        return recorded
    named = Path(recorded) if recorded and "\0" not in recorded else None
    if named and not named.is_file():
        named = work_dir / named.name
    if named and _time_saved(named):
        return named
    others = {path: _time_saved(path) for path in work_dir.glob("*.pth")}
    others = {path: time for path, time in others.items() if time}
    if not others:
        return named  # where it is damaged, reading it says what is wrong
    newest = max(others, key=others.get)
    reason = f"names {named}, which is not whole" if named else "is missing or damaged"
    print_log(
        f"{record} {reason}; the newest checkpoint beside it that can be resumed from is {newest}",
        level=logging.WARNING,
    )
    return newest


def _time_saved(path: Path) -> tuple[str, int] | None:
    """Tell when a checkpoint was saved, as its own text and iteration; None if it can't be resumed.

    The file's own date is that of the last copy.
    """
    try:
        checkpoint = read_checkpoint(path)
        if "optimizer" in checkpoint:
            return str(checkpoint["meta"]["time"]), int(checkpoint["meta"]["iter"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None


def check_checkpoint(
    model: nn.Module, checkpoint: dict, path: str | Path, *, is_whole: bool = True
) -> None:
    """Check that a checkpoint belongs to a model.

    Args:
        model: the model of the Runner.
        checkpoint: what :func:`read_checkpoint` returned.
        path: where it came from, for the message.
        is_whole: every parameter and buffer must be there with its shape, as for testing and
            resuming; otherwise half of them, as for fine-tuning.

    Raises:
        ValueError: if it does not, or holds NaN.
    """
    weights = checkpoint.get("state_dict", checkpoint)
    weights = {key.removeprefix("module."): value for key, value in weights.items()}
    model = getattr(model, "module", model)
    expected = {
        key: tensor
        for key, tensor in model.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    missing = [key for key in expected if not isinstance(weights.get(key), Tensor)]
    reshaped = [
        key
        for key, tensor in expected.items()
        if isinstance(weights.get(key), Tensor) and weights[key].shape != tensor.shape
    ]
    try:
        check_numbers({key: weights[key] for key in expected.keys() - set(missing)})
    except ValueError as error:
        raise ValueError(f"checkpoint {str(path)!r}: {error}") from error
    num_matched = len(expected) - len(missing) - len(reshaped)
    if num_matched == len(expected) or (not is_whole and 2 * num_matched >= len(expected)):
        return
    message = (
        f"checkpoint {str(path)!r} is not of this {type(model).__name__}: {num_matched} of "
        f"{len(expected)} entries fit"
    )
    if missing:
        message += f"; {len(missing)} are missing, such as {missing[0]}"
    if reshaped:
        key = reshaped[0]
        message += (
            f"; {len(reshaped)} have another shape, such as {key} with {tuple(weights[key].shape)} "
            f"instead of {tuple(expected[key].shape)} (another num_classes?)"
        )
    raise ValueError(message + "; give the checkpoint that belongs to the config")


def check_classes(datasets: Sequence[object], model: nn.Module) -> None:
    """Check that the class folders of a classifier's data sets agree with each other and with it.

    Raises:
        ValueError: if they do not; labels would be wrong without a word.
    """
    model = getattr(model, "module", model)
    datasets = [data for data in datasets if isinstance(data, (TimmImages, TimmStream))]
    names = [data.metainfo["classes"] for data in datasets if data.metainfo["classes"]]
    for classes in names:
        if len(classes) != model.num_classes:
            raise ValueError(
                f"the data has {len(classes)} classes and the model num_classes="
                f"{model.num_classes}; set --cfg-options model.num_classes={len(classes)}, or give "
                "the data sets a class_map"
            )
        if classes != names[0]:
            odd = sorted(set(classes) ^ set(names[0]))[:3]
            raise ValueError(
                f"training and validation data have different classes, such as {', '.join(odd)}"
            )

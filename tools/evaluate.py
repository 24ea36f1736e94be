"""``densezoo test``: evaluate a checkpoint with a config's metrics."""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

from .ranks import check_launcher, launched_rank
from .train import add_config_arguments, require_mmengine

if TYPE_CHECKING:
    from mmengine.config import Config

EXAMPLE = "densezoo test retinanet_cas_vit_xs_fpn_1x_coco work_dirs/retinanet/epoch_12.pth"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``densezoo test``."""
    add_config_arguments(parser)
    parser.add_argument(
        "checkpoint",
        help="a checkpoint of `densezoo train`; for a classifier also a published one",
    )
    parser.add_argument("--out", metavar="FILE", help="write the figures as JSON")
    parser.add_argument(
        "--tta",
        action="store_true",
        help="test-time augmentation: merge the predictions of each image flipped and at several "
        "sizes, as the config's tta_model and tta_pipeline say (detection and segmentation)",
    )


def run(args: argparse.Namespace) -> None:
    """Evaluate as the arguments say.

    Raises:
        ValueError, OSError, ImportError: for a user's mistake, before any work is done.
    """
    require_mmengine()
    check_launcher(args.launcher)
    from mmengine.logging import print_log

    from ..backbones.mmlab import read_from_anywhere
    from .engine import checks
    from .engine.annotation_checks import check_annotations
    from .engine.config_files import find_config, load_config, require_keys
    from .engine.process_group import process_group
    from .engine.runs import build_runner, run_loop

    cfg = load_config(args.config, args.cfg_options)
    require_keys(cfg, ("model", "test_dataloader", "test_evaluator"), "test")
    checks.check_settings(cfg, "test")
    is_classifier = cfg.model.type == "ImageClassifier"
    if args.tta:
        augment(cfg)
    name = find_config(args.config).stem
    # Not the folder of the training run, whose copy of the config mmengine would overwrite.
    cfg.work_dir = args.work_dir or str(Path("work_dirs", name, "test"))
    cfg.launcher = args.launcher
    out = Path(args.out) if args.out else None
    if out:
        _check_out(out)
    checkpoint = read_from_anywhere(args.checkpoint)
    checks.check_data(cfg, "test")
    is_first = args.launcher == "none" or not launched_rank()
    notes = check_annotations(cfg, "test") if is_first else []
    checks.check_work_dir(Path(cfg.work_dir), resume=True)

    weights = checkpoint.get("state_dict", checkpoint)
    is_published = is_classifier and not any(
        key.removeprefix("module.").startswith("backbone.") for key in weights
    )
    cfg.resume = False
    cfg.load_from = None if is_published else args.checkpoint
    with process_group(cfg):
        runner = build_runner(cfg, "test")
        for note in notes:
            print_log(note, runner.logger, logging.WARNING)
        model = runner.model
        while hasattr(model, "module"):  # that of several processes, that of augmented views
            model = model.module
        if is_published:
            model.load_backbone(args.checkpoint)
        else:
            checks.check_checkpoint(model, checkpoint, args.checkpoint)
        metrics = run_loop(runner.test)
    if out and runner.rank == 0:
        write_figures(metrics, out)


def augment(cfg: Config) -> None:
    """Make a config test with its `tta_model` and `tta_pipeline`, in place.

    Raises:
        ValueError: if it has none, or its predictions can't be merged.
    """
    from .engine.config_files import walk_dicts

    missing = [key for key in ("tta_model", "tta_pipeline") if not cfg.get(key)]
    if missing:
        raise ValueError(
            f"config {cfg.filename} can't be tested with --tta: it lacks {' and '.join(missing)}, "
            "which densezoo's configs for detection and segmentation have, and none for "
            "classification"
        )
    if cfg.tta_model.get("type") == "DetTTAModel":
        heads = [key for key, part in walk_dicts(cfg.model, "model") if part.get("mask_head")]
        if heads:
            raise ValueError(
                "DetTTAModel of --tta merges boxes, not masks; leave --tta out, or test the boxes "
                f"alone with --cfg-options {heads[0]}.mask_head=None test_evaluator.metric=bbox"
            )
    if not (cfg.model.get("test_cfg") or {}).get("keep_logits", True):
        raise ValueError(
            "--tta averages what model.test_cfg.keep_logits=False leaves out; set it to True"
        )
    parts = [part for _, part in walk_dicts(cfg.test_dataloader.dataset) if "pipeline" in part]
    if not parts:
        raise ValueError("test_dataloader.dataset has no pipeline that --tta could replace")
    for part in parts:
        part["pipeline"] = deepcopy(cfg.tta_pipeline)
    cfg.model = {**cfg.tta_model, "module": cfg.model}


def _check_out(out: Path) -> None:
    """Check that the file of ``--out`` can be written and is not there, before any work is done."""
    if out.exists():
        raise FileExistsError(f"--out {out} exists; choose another file or remove it")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"the folder of --out {out} does not exist")
    try:
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise type(error)(f"--out {out} can't be written: {error.strerror}") from error


def write_figures(metrics: dict, out: Path) -> None:
    """Write metrics as JSON to a file, which is replaced whole or left as it was."""
    partial = out.with_name(f"{out.name}.partial")
    try:
        partial.write_text(json.dumps(metrics, indent=1, default=float) + "\n")
        os.replace(partial, out)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


if __name__ == "__main__":
    from .cli import run_module

    run_module("test")

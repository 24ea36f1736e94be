"""``densezoo test``: evaluate a checkpoint with a config's metrics."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .train import add_config_arguments, require_mmengine

EXAMPLE = "densezoo test retinanet_cas_vit_xs_fpn_1x_coco work_dirs/retinanet/epoch_12.pth"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``densezoo test``."""
    add_config_arguments(parser)
    parser.add_argument(
        "checkpoint",
        help="a checkpoint of `densezoo train`; for a classifier also a published one",
    )
    parser.add_argument("--out", metavar="FILE", help="write the figures as JSON")


def run(args: argparse.Namespace) -> None:
    """Evaluate as the arguments say.

    Raises:
        ValueError, OSError, ImportError: for a user's mistake, before any work is done.
    """
    require_mmengine()
    from ..backbones.checkpoints import read_checkpoint
    from .engine import checks
    from .engine.config_files import find_config, load_config, require_keys
    from .engine.runs import build_runner, run_loop

    cfg = load_config(args.config, args.cfg_options)
    require_keys(cfg, ("model", "test_dataloader", "test_evaluator"), "test")
    name = find_config(args.config).stem
    # Not the folder of the training run, whose copy of the config mmengine would overwrite.
    cfg.work_dir = args.work_dir or str(Path("work_dirs", name, "test"))
    cfg.launcher = args.launcher
    out = Path(args.out) if args.out else None
    if out and out.exists():
        raise FileExistsError(f"--out {args.out} exists; choose another file or remove it")
    if out and not out.parent.is_dir():
        raise FileNotFoundError(f"the folder of --out {args.out} does not exist")
    checkpoint = read_checkpoint(args.checkpoint)
    checks.check_data(cfg, "test")
    checks.check_work_dir(Path(cfg.work_dir), resume=True)

    weights = checkpoint.get("state_dict", checkpoint)
    is_published = cfg.model.type == "ImageClassifier" and not any(
        key.removeprefix("module.").startswith("backbone.") for key in weights
    )
    cfg.resume = False
    cfg.load_from = None if is_published else args.checkpoint
    runner = build_runner(cfg, "test")
    if is_published:
        getattr(runner.model, "module", runner.model).load_backbone(args.checkpoint)
    else:
        checks.check_checkpoint(runner.model, checkpoint, args.checkpoint)
    metrics = run_loop(runner.test)
    if out:
        out.write_text(json.dumps(metrics, indent=1, default=float) + "\n")


if __name__ == "__main__":
    from .cli import run_module

    run_module("test")

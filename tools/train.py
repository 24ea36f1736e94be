"""``densezoo train``: train a classifier, detector or segmenter from a config."""

from __future__ import annotations

import argparse
import importlib.util
import logging
from pathlib import Path

from .ranks import check_launcher, launched_rank

EXAMPLE = (
    "densezoo train retinanet_cas_vit_xs_fpn_1x_coco --amp\n"
    "  torchrun --nproc_per_node 8 -m densezoo train cas_vit_xs_8xb128_300e_in1k "
    "--launcher pytorch"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``densezoo train``."""
    add_config_arguments(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="continue a run: from its last checkpoint in the work dir, or from a given one",
    )
    parser.add_argument(
        "--amp", action="store_true", help="mixed precision (float16; bfloat16 on the CPU)"
    )
    parser.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="scale the learning rate with the batch size, relative to the config's own",
    )
    parser.add_argument("--seed", type=int, help="seed of weights, sampling and augmentation")


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `train` and `test` share."""
    parser.add_argument("config", help="a config file, or the name of a config of densezoo")
    parser.add_argument("--work-dir", help="where logs and checkpoints go")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="change the config, for example train_dataloader.batch_size=8",
    )
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm", "mpi"],
        default="none",
        help="what started the processes of distributed work (torchrun is pytorch)",
    )


def require_mmengine() -> None:
    """Raise an ImportError that says what to install when mmengine is missing."""
    if importlib.util.find_spec("mmengine") is None:
        raise ImportError("this needs mmengine: pip install 'densezoo[openmmlab]'")


def run(args: argparse.Namespace) -> None:
    """Train as the arguments say, after checking everything that the run needs.

    Raises:
        ValueError, OSError, ImportError: for a user's mistake, before any work is done.
    """
    require_mmengine()
    check_launcher(args.launcher)
    from mmengine.logging import print_log

    from ..backbones.mmlab import read_from_anywhere
    from ..layers.arguments import check_whole_number
    from .engine import checks
    from .engine.annotation_checks import check_annotations
    from .engine.config_files import find_config, load_config, require_keys, walk_dicts
    from .engine.process_group import process_group
    from .engine.runs import build_runner, run_loop

    cfg = load_config(args.config, args.cfg_options)
    name = find_config(args.config).stem
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or str(Path("work_dirs", name))
    cfg.launcher = args.launcher
    require_keys(cfg, ("model", "train_dataloader", "train_cfg", "optim_wrapper"), "train")
    if args.seed is not None:
        cfg.randomness = {**cfg.get("randomness", {}), "seed": args.seed}
    if args.amp:
        _enable_amp(cfg)
    if args.auto_scale_lr:
        base = (cfg.get("auto_scale_lr") or {}).get("base_batch_size")
        check_whole_number("auto_scale_lr.base_batch_size of the config", base, 1)
        cfg.auto_scale_lr.enable = True

    work_dir = Path(cfg.work_dir)
    checks.check_settings(cfg, "train")
    checks.check_data(cfg, "train")
    resume_from = None
    if args.resume == "auto":
        resume_from = checks.find_last_checkpoint(work_dir)
        if resume_from is None and not launched_rank():
            print_log(f"{work_dir} holds nothing to resume; the run starts from the beginning")
    elif args.resume:
        resume_from = args.resume if "://" in args.resume else Path(args.resume)
    cfg.resume = resume_from is not None
    if resume_from:
        cfg.load_from = str(resume_from)
    if cfg.get("load_from"):
        # A checkpoint of the whole model replaces the initial weights, whose file may be gone.
        for _, module in walk_dicts(cfg.model):
            if module.get("init_cfg"):
                module["init_cfg"] = None
    else:
        checks.check_initial_weights(cfg)
    checkpoint = read_from_anywhere(cfg.load_from) if cfg.get("load_from") else None
    if resume_from and "optimizer" not in checkpoint:
        raise ValueError(
            f"checkpoint {cfg.load_from!r} has no state of an optimizer to resume; to start from "
            "its weights give --cfg-options load_from=FILE"
        )
    is_first = args.launcher == "none" or not launched_rank()
    notes = check_annotations(cfg, "train") if is_first else []
    goes_on = checks.is_of_work_dir(resume_from, work_dir)
    checks.check_work_dir(work_dir, resume=goes_on)

    with process_group(cfg):
        runner = build_runner(cfg, "train")
        for note in notes:
            print_log(note, runner.logger, logging.WARNING)
        if checkpoint:
            checks.check_checkpoint(
                runner.model, checkpoint, cfg.load_from, is_whole=resume_from is not None
            )
        run_loop(runner.train)
    print_log(f"Logs and checkpoints are in {work_dir}", runner.logger, logging.INFO)


def _enable_amp(cfg: dict) -> None:
    """Make the config's optimizer wrapper one of mixed precision."""
    kind = cfg["optim_wrapper"].get("type", "OptimWrapper")
    if kind not in ("OptimWrapper", "AmpOptimWrapper"):
        raise ValueError(
            f"--amp works with optim_wrapper.type OptimWrapper, and the config has {kind}"
        )
    cfg["optim_wrapper"]["type"] = "AmpOptimWrapper"
    cfg["optim_wrapper"].setdefault("loss_scale", "dynamic")


if __name__ == "__main__":
    from .cli import run_module

    run_module("train")

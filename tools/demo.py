"""``densezoo demo``: train and evaluate the three tasks on the embedded data, with a report.

There is no training code here. The demo writes the data set of ``densezoo data make``, then runs
``densezoo train``, ``densezoo test`` and ``densezoo predict`` on the ordinary configs, fitted to
the small data by ``--cfg-options``: a classifier on the class folders, and from its weights a
RetinaNet and a Semantic FPN on the scenes. The same models as they are initialised are evaluated
beside them. ``report.html`` shows what came out, and the commands.

A step that was finished is not run again, so the demo continues where it was interrupted.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from .demo_data import CLASSES, SEGMENTATION_CLASSES
from .demo_report import (
    Figure,
    Section,
    format_figures,
    pair_pictures,
    read_curves,
    segmentation_palette,
    write_report,
)
from .predict import make_palette

EXAMPLE = "densezoo demo --out demo"

MARKER = "densezoo-demo.json"
REPORT = "report.html"
_NUM_SCENES = 6  # drawn for detection and segmentation
_DATA_WEIGHT, _START_WEIGHT = 6, 8  # of making the data, and of a command that trains nothing
_SPLITS = {"train": "train", "val": "val", "test": "val"}  # of each loader
# "Epoch(train)  [2][25/98]" and "Iter(train) [ 50/200]" in mmengine's log
_PROGRESS = re.compile(r"\w+\((?:train|test)\)\s+(?:\[\s*(\d+)\])?\[\s*(\d+)/(\d+)\]")
_PLAIN_PATH = re.compile(r"[\w./+-]+")


@dataclass(frozen=True)
class Schedule:
    """How much is trained, on how much data.

    Attributes:
        images: Training scenes; a quarter as many are held out.
        size: Side of a scene, pixels.
        class_size: Side of the classifier's input, pixels.
        class_epochs: Epochs of the classifier, 2 or more.
        detection_epochs: Epochs of the RetinaNet.
        segmentation_iterations: Iterations of the Semantic FPN.
    """

    images: int = 800
    size: int = 128
    class_size: int = 48
    class_epochs: int = 7
    detection_epochs: int = 3
    segmentation_iterations: int = 400


@dataclass(frozen=True)
class Task:
    """One of the three tasks: an ordinary config, and what fits it to the data.

    Attributes:
        name: Its folder, and the beginning of its steps' names.
        model: What is trained, for the report.
        config: Name of the shipped config.
        options: ``--cfg-options`` of all of its commands.
        train_options: Those of the training alone.
        epochs: Epochs of the training, 1 where iterations count.
        last_checkpoint: Name of the file that the training ends with.
        figures: Key of a figure that ``densezoo test`` measures -> its name and the factor that
            makes it percent; the first is the one that `aim` is for.
        aim: Percent.
        weight: Duration of the training, about seconds on two cores.
    """

    name: str
    model: str
    config: str
    options: tuple[str, ...]
    train_options: tuple[str, ...]
    epochs: int
    last_checkpoint: str
    figures: dict[str, tuple[str, float]]
    aim: float
    weight: float


@dataclass(frozen=True)
class Step:
    """A command of the demo.

    Attributes:
        name: Its name in the record, and of its log.
        words: The command's words after ``densezoo``.
        weight: Its duration, about seconds on two cores.
        epochs: Epochs that its log counts.
    """

    name: str
    words: tuple[str, ...]
    weight: float
    epochs: int = 1

    @property
    def command(self) -> str:
        """The command as one types it."""
        return shlex.join(("densezoo", *self.words))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``densezoo demo``."""
    parser.add_argument(
        "--out", metavar="DIR", default="demo", help="folder of everything (default: demo)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of data and trainings (default: 0)"
    )


def run(args: argparse.Namespace) -> None:
    """Run ``densezoo demo``."""
    report = run_demo(args.out, seed=args.seed)
    print(f"\nreport: {report}")


def run_demo(
    out_dir: str | os.PathLike, *, seed: int = 0, schedule: Schedule | None = None
) -> Path:
    """Run the demo, or what is left of it, and write its report.

    Args:
        out_dir: Folder of everything. If it is not empty, it must hold a demo of the same seed
            and schedule.
        seed: Seed of the data and the trainings.
        schedule: How much is trained; by default what takes minutes on two cores.

    Returns:
        The report, an HTML page that needs no other file.

    Raises:
        ValueError: The seed is negative, or the folder's name can't stand in a config option.
        FileExistsError: The folder holds anything else.
        ChildProcessError: A step failed; says where its log is.
        ImportError: A package that the demo needs is missing.
    """
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must be 0 or more")
    _check_packages()
    schedule = schedule or Schedule()
    # Commands are shown and run with paths relative to here, as one would type them.
    out_dir = Path(os.path.relpath(out_dir))
    if not _PLAIN_PATH.fullmatch(out_dir.as_posix()):
        raise ValueError(
            f"--out {out_dir} holds a character that --cfg-options can't carry; use letters, "
            "digits and ./_-+ alone"
        )
    settings = {"seed": seed, **asdict(schedule)}
    record = _read_record(out_dir, settings)
    out_dir.mkdir(parents=True, exist_ok=True)
    _write_record(out_dir, record)

    tasks = make_tasks(out_dir, schedule)
    total = _DATA_WEIGHT + sum(task.weight + 3 * _START_WEIGHT for task in tasks)
    with tqdm(
        total=total,
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed} elapsed, {remaining} left",
        smoothing=0,  # steps differ in pace, so the mean pace foretells best
    ) as progress:
        data_step = make_data_step(out_dir, seed, schedule)
        _run_steps([data_step], out_dir, record, progress)
        _write_untrained(out_dir, seed, tasks)
        steps = [data_step]
        for task in tasks:
            steps += make_task_steps(task, out_dir, seed)
        _run_steps(steps[1:], out_dir, record, progress)

    commands = {step.name: (step.command, record["seconds"][step.name]) for step in steps}
    sections = [_collect_section(task, out_dir, commands) for task in tasks]
    write_report(out_dir / REPORT, sections, commands["data"], seed)
    print(format_figures(sections))
    return out_dir / REPORT


def _collect_section(task: Task, out_dir: Path, commands: dict[str, tuple[str, float]]) -> Section:
    """Collect what the report shows of a task."""
    folder = out_dir / task.name
    measured = {
        name: json.loads((folder / f"{name}.json").read_text()) for name in ("untrained", "trained")
    }
    # A detector that finds nothing measures nothing: its average precision is 0.
    figures = [
        Figure(
            name,
            *(factor * measured[state].get(key, 0.0) for state in ("untrained", "trained")),
            aim=None if position else task.aim,
        )
        for position, (key, (name, factor)) in enumerate(task.figures.items())
    ]
    key, (name, factor) = next(iter(task.figures.items()))
    data = out_dir / "data"
    return Section(
        name=task.name,
        model=task.model,
        figures=figures,
        curves=read_curves(folder / "training", key, name, factor),
        pictures=pair_pictures(
            task.name, data, list_examples(data, task.name), folder / "predictions"
        ),
        commands=[
            command for name, command in commands.items() if name.startswith(f"{task.name} ")
        ],
    )


def make_tasks(out_dir: Path, schedule: Schedule) -> list[Task]:
    """Say how each task's config is fitted to the data."""
    data = (out_dir / "data").as_posix()
    weights = out_dir / "classification" / "training" / f"epoch_{schedule.class_epochs}.pth"
    return [
        _make_classification(data, schedule),
        _make_detection(data, schedule, weights.as_posix()),
        _make_segmentation(data, schedule, weights.as_posix()),
    ]


def _make_classification(data: str, schedule: Schedule) -> Task:
    """Fit the ImageNet recipe to the class folders."""
    epochs = schedule.class_epochs
    options = [f"model.num_classes={len(CLASSES)}", "model.drop_path_rate=0"]
    for loader in _SPLITS:
        options += _loader_options(
            loader, "dataset", root=f"{data}/classes", input_size=schedule.class_size
        )
    # A mirrored digit is another sign; and a short training learns most from mild changes.
    options += _loader_options(
        "train",
        "dataset.transform",
        auto_augment=None,
        hflip=0,
        scale="(0.7,1)",
        ratio="(0.8,1.25)",
        color_jitter=0.2,
    )
    for loader in ("val", "test"):
        options += _loader_options(loader, "dataset.transform", crop_pct=1)
    return Task(
        name="classification",
        model="classifier",
        config="cas_vit_xs_8xb128_300e_in1k",
        options=tuple(options + _process_options()),
        train_options=(
            "train_dataloader.batch_size=32",
            "optim_wrapper.type=OptimWrapper",
            "optim_wrapper.accumulative_counts=1",
            "optim_wrapper.optimizer.lr=2e-3",
            "optim_wrapper.clip_grad.max_norm=5",
            "custom_hooks=[]",
            f"train_cfg.max_epochs={epochs}",
            "param_scheduler.0.end=1",
            "param_scheduler.1.begin=1",
            f"param_scheduler.1.end={epochs}",
            f"param_scheduler.1.T_max={epochs - 1}",
            *_hook_options(),
        ),
        epochs=epochs,
        last_checkpoint=f"epoch_{epochs}.pth",
        figures={"accuracy/top1": ("top-1", 1), "accuracy/top5": ("top-5", 1)},
        aim=95,
        weight=16 * epochs,
    )


def _make_detection(data: str, schedule: Schedule, weights: str) -> Task:
    """Fit RetinaNet's COCO recipe to the scenes and their boxes."""
    epochs, scale = schedule.detection_epochs, f"({schedule.size},{schedule.size})"
    options = [
        f"model.bbox_head.num_classes={len(CLASSES)}",
        # The published head costs ten times the backbone; this one costs as much.
        "model.neck.out_channels=128",
        "model.bbox_head.in_channels=128",
        "model.bbox_head.feat_channels=128",
        "model.bbox_head.stacked_convs=2",
    ]
    for loader, split in _SPLITS.items():
        options += _loader_options(
            loader,
            "dataset",
            data_root=data,
            ann_file=f"annotations/instances_{split}.json",
            **{"data_prefix.img": f"images/{split}/", "metainfo.classes": _tuple(CLASSES)},
        )
    options += _loader_options("train", "dataset.pipeline", **{"2.scale": scale, "3.prob": 0.0})
    options.append(_palette_option(make_palette(len(CLASSES))))
    for loader in ("val", "test"):
        options += [
            f"{loader}_dataloader.dataset.pipeline.1.scale={scale}",
            f"{loader}_dataloader.batch_size=8",
            f"{loader}_evaluator.ann_file={data}/annotations/instances_val.json",
        ]
    return Task(
        name="detection",
        model="RetinaNet",
        config="retinanet_cas_vit_xs_fpn_1x_coco",
        options=tuple(options + _process_options()),
        train_options=(
            f"model.backbone.init_cfg.checkpoint={weights}",
            "train_dataloader.batch_size=8",
            "optim_wrapper.optimizer.lr=5e-4",
            "optim_wrapper.clip_grad.max_norm=5",
            f"train_cfg.max_epochs={epochs}",
            "param_scheduler.0.end=50",
            f"param_scheduler.1.end={epochs}",
            f"param_scheduler.1.milestones=[{epochs - 1}]",
            *_hook_options(),
        ),
        epochs=epochs,
        last_checkpoint=f"epoch_{epochs}.pth",
        figures={"coco/bbox_mAP_50": ("box AP50", 100), "coco/bbox_mAP": ("box AP", 100)},
        aim=40,
        weight=35 * epochs,
    )


def _make_segmentation(data: str, schedule: Schedule, weights: str) -> Task:
    """Fit Semantic FPN's ADE20K recipe to the scenes and their masks."""
    iterations, scale = schedule.segmentation_iterations, f"({schedule.size},{schedule.size})"
    options = [
        f"model.decode_head.num_classes={len(SEGMENTATION_CLASSES)}",
        "model.neck.out_channels=128",
        "model.decode_head.in_channels=[128,128,128,128]",
        "model.decode_head.channels=64",
        f"model.data_preprocessor.size={scale}",
    ]
    for loader, split in _SPLITS.items():
        options += _loader_options(
            loader,
            "dataset",
            type="BaseSegDataset",
            data_root=data,
            **{
                "data_prefix.img_path": f"images/{split}",
                "data_prefix.seg_map_path": f"masks/{split}",
                "metainfo.classes": _tuple(SEGMENTATION_CLASSES),
            },
        )
    options.append(_palette_option(segmentation_palette()))
    options += _loader_options(
        "train",
        "dataset.pipeline",
        **{
            "1.reduce_zero_label": False,
            "2.scale": scale,
            "2.ratio_range": "(0.75,1.5)",
            "3.crop_size": scale,
            "3.cat_max_ratio": 1,  # most of a scene is background
            "4.prob": 0.0,
        },
    )
    for loader in ("val", "test"):
        options += _loader_options(
            loader, "dataset.pipeline", **{"1.scale": scale, "3.reduce_zero_label": False}
        )
        options.append(f"{loader}_dataloader.batch_size=8")
    return Task(
        name="segmentation",
        model="Semantic FPN",
        config="fpn_cas_vit_xs_40k_ade20k",
        options=tuple(options + _process_options()),
        train_options=(
            f"model.backbone.init_cfg.checkpoint={weights}",
            # Nine of ten pixels are background, on which a short training would end.
            f"model.decode_head.loss_decode.class_weight={_class_weights()}",
            "train_dataloader.batch_size=8",
            "optim_wrapper.optimizer.lr=5e-4",
            "optim_wrapper.clip_grad.max_norm=5",
            f"train_cfg.max_iters={iterations}",
            f"train_cfg.val_interval={max(1, iterations // 4)}",
            f"param_scheduler.0.end={iterations}",
            f"default_hooks.checkpoint.interval={max(1, iterations // 4)}",
            *_hook_options(),
        ),
        epochs=1,
        last_checkpoint=f"iter_{iterations}.pth",
        figures={"mIoU": ("mIoU", 1), "aAcc": ("pixel accuracy", 1)},
        aim=50,
        weight=0.28 * iterations,
    )


def _class_weights() -> str:
    """Write the weights of background and digits in the segmenter's loss."""
    return f"[{','.join(['0.2', *('1' for _ in CLASSES)])}]"


def _loader_options(loader: str, part: str, **values: object) -> list[str]:
    """Write options of a part of a loader's config."""
    return [f"{loader}_dataloader.{part}.{key}={value}" for key, value in values.items()]


def _palette_option(palette: Sequence[tuple[int, int, int]]) -> str:
    """Write the option that gives the classes their colours; they go into the checkpoint."""
    colours = ",".join(f"({red},{green},{blue})" for red, green, blue in palette)
    return f"train_dataloader.dataset.metainfo.palette=[{colours}]"


def _process_options() -> list[str]:
    """Write options that load data in the training's own process: two cores have no other."""
    return [
        f"{loader}_dataloader.{option}"
        for loader in _SPLITS
        for option in ("num_workers=0", "persistent_workers=False")
    ]


def _hook_options() -> list[str]:
    """Write options that log often and keep the last checkpoint alone."""
    return ["default_hooks.logger.interval=10", "default_hooks.checkpoint.max_keep_ckpts=1"]


def _tuple(names: Sequence[str]) -> str:
    """Write names as ``--cfg-options`` reads a tuple."""
    return f"({','.join(names)})"


def make_data_step(out_dir: Path, seed: int, schedule: Schedule) -> Step:
    """Return the command that writes the data."""
    numbers = {"seed": seed, "images": schedule.images, "size": schedule.size}
    options = [word for key, value in numbers.items() for word in (f"--{key}", str(value))]
    return Step("data", ("data", "make", (out_dir / "data").as_posix(), *options), _DATA_WEIGHT)


def make_task_steps(task: Task, out_dir: Path, seed: int) -> list[Step]:
    """Return the commands of a task. The data must be there, since they name images of it."""
    folder = out_dir / task.name
    checkpoint = (folder / "training" / task.last_checkpoint).as_posix()

    def evaluate(name: str, weights: str) -> Step:
        words = ("test", task.config, weights, "--work-dir", (folder / f"{name}-test").as_posix())
        words += ("--out", (folder / f"{name}.json").as_posix(), "--cfg-options", *task.options)
        return Step(f"{task.name} {name} test", words, _START_WEIGHT)

    train = ("train", task.config, "--work-dir", (folder / "training").as_posix())
    train += ("--seed", str(seed), "--cfg-options", *task.options, *task.train_options)
    images = (path.as_posix() for path in list_examples(out_dir / "data", task.name))
    predict = ("predict", task.config, checkpoint, *images)
    predict += ("--out", (folder / "predictions").as_posix(), "--overwrite")
    return [
        evaluate("untrained", (folder / "untrained.pth").as_posix()),
        Step(f"{task.name} training", train, task.weight, task.epochs),
        evaluate("trained", checkpoint),
        Step(f"{task.name} pictures", (*predict, "--cfg-options", *task.options), _START_WEIGHT),
    ]


def list_examples(data: Path, task: str) -> list[Path]:
    """List the held-out images that are drawn: a crop of each class, or the first scenes."""
    if task == "classification":
        folders = (data / "classes" / "val" / name for name in CLASSES)
        return [min(folder.iterdir()) for folder in folders]
    return sorted((data / "images" / "val").iterdir())[:_NUM_SCENES]


def _check_packages() -> None:
    """Raise an ImportError when a package is missing that a later step needs."""
    needed = ("mmengine", "mmdet", "mmseg", "pycocotools", "sklearn", "matplotlib")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"the demo needs {', '.join(missing)}: pip install 'densezoo[openmmlab,demo]'"
        )


def _read_record(out_dir: Path, settings: dict) -> dict:
    """Read which steps were finished in the folder, after checking that it may be written."""
    if out_dir.exists() and not out_dir.is_dir():
        raise FileExistsError(f"--out {out_dir} is a file; choose a folder")
    if not out_dir.exists() or not any(out_dir.iterdir()):
        return {"settings": settings, "seconds": {}}
    try:
        record = json.loads((out_dir / MARKER).read_text())
    except FileNotFoundError as error:
        raise FileExistsError(
            f"{out_dir} is not empty and was not written by 'densezoo demo' (it has no {MARKER}); "
            "choose another folder with --out"
        ) from error
    except json.JSONDecodeError as error:
        raise FileExistsError(
            f"{out_dir / MARKER} is damaged; delete {out_dir} or choose another folder with --out"
        ) from error
    if record["settings"] != settings:
        raise FileExistsError(
            f"{out_dir} holds a demo with {record['settings']}, not {settings}; delete it or "
            "choose another folder with --out"
        )
    return record


def _write_record(out_dir: Path, record: dict) -> None:
    """Note the finished steps, so that an interruption never leaves half of the note."""
    partial = out_dir / f"{MARKER}.partial"
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(out_dir / MARKER)


def _write_untrained(out_dir: Path, seed: int, tasks: Sequence[Task]) -> None:
    """Write each task's model as its config initialises it, without trained weights."""
    paths = {task.name: out_dir / task.name / "untrained.pth" for task in tasks}
    if all(path.exists() for path in paths.values()):
        return
    import torch
    from mmengine.logging import MMLogger
    from mmengine.registry import MODELS, init_default_scope

    from .engine.config_files import load_config

    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel("ERROR")  # else it names every parameter that it initialised
    for task in tasks:
        cfg = load_config(task.config, task.options)
        if "init_cfg" in cfg.model.get("backbone", {}):
            cfg.model.backbone.init_cfg = None
        init_default_scope(cfg.default_scope)
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the commands say them again, into their logs
            model = MODELS.build(cfg.model)
            model.init_weights()
        paths[task.name].parent.mkdir(exist_ok=True)
        torch.save({"state_dict": model.state_dict()}, paths[task.name])
    logger.setLevel(level)


def _run_steps(steps: Sequence[Step], out_dir: Path, record: dict, progress: tqdm) -> None:
    """Run the steps that are not finished, in order, and note each one."""
    for step in steps:
        progress.set_description_str(step.name)
        end = progress.n + step.weight
        if step.name in record["seconds"]:
            progress.initial += step.weight  # it does not count towards the pace
        else:
            progress.write(f"\n{step.command}")
            start = time.perf_counter()
            _run_command(step, out_dir, progress)
            record["seconds"][step.name] = time.perf_counter() - start
            _write_record(out_dir, record)
        progress.update(end - progress.n)


def _run_command(step: Step, out_dir: Path, progress: tqdm) -> None:
    """Run a command in a process of its own, with its output in a log.

    A training that was interrupted is resumed; a figure that was written by a step that was not
    finished is measured anew.
    """
    words = list(step.words)
    if words[0] == "train" and (out_dir / step.name.split()[0] / "training").exists():
        words.insert(1, "--resume=auto")
    if words[0] == "test":
        Path(words[words.index("--out") + 1]).unlink(missing_ok=True)
    log_path = out_dir / "logs" / f"{step.name.replace(' ', '-')}.log"
    log_path.parent.mkdir(exist_ok=True)
    environment = {
        # A thread that waits soon leaves its core to others: without it a second busy program on
        # the machine makes training ten times slower.
        "GOMP_SPINCOUNT": "1000",
        **os.environ,
        # The current folder may be a checkout, whose densezoo folder is not the whole package.
        "PYTHONSAFEPATH": "1",
    }
    start, last_line = progress.n, ""
    with (
        log_path.open("w") as log,
        subprocess.Popen(
            [sys.executable, "-m", "densezoo", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        ) as process,
    ):
        for line in process.stdout:
            log.write(line)
            last_line = line.strip() or last_line
            reached = start + step.weight * _read_share(line, step)
            progress.update(max(0, reached - progress.n))
    if process.returncode:
        raise ChildProcessError(f"{step.name} failed: {last_line}; the whole log is {log_path}")


def _read_share(line: str, step: Step) -> float:
    """Return the share of a step that a line of its log says is done; 0 where it says nothing."""
    found = _PROGRESS.search(line)
    if not found:
        return 0.0
    epoch, done, total = (int(number or 1) for number in found.groups())
    return (epoch - 1 + done / total) / step.epochs


if __name__ == "__main__":
    from .cli import run_module

    run_module("demo")

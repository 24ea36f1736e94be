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

from .demo_data import CLASSES
from .demo_report import (
    Figure,
    Section,
    format_figures,
    pair_pictures,
    read_curves,
    write_report,
)
from .demo_tasks import Schedule, Task, make_tasks

EXAMPLE = "densezoo demo --out demo"

MARKER = "densezoo-demo.json"
REPORT = "report.html"
_NUM_SCENES = 6  # drawn for detection and segmentation
_DATA_WEIGHT, _START_WEIGHT = 6, 8  # of making the data, and of a command that trains nothing
# "Epoch(train)  [2][25/98]" and "Iter(train) [ 50/200]" in mmengine's log
_PROGRESS = re.compile(r"\w+\((?:train|test)\)\s+(?:\[\s*(\d+)\])?\[\s*(\d+)/(\d+)\]")
_PLAIN_PATH = re.compile(r"[\w./+-]+")


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

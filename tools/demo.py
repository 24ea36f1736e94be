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
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from .demo_data import CLASSES, SEGMENTATION_CLASSES, is_folder_free

EXAMPLE = "densezoo demo --out demo"

MARKER = "densezoo-demo.json"
REPORT = "report.html"
TASKS = ("classification", "detection", "segmentation")
_LOADERS = {"train": "train", "val": "val", "test": "val"}  # loader -> split
# "Epoch(train)  [2][25/98]" and "Iter(train) [ 50/200]" in mmengine's log
_PROGRESS = re.compile(r"\w+\((?:train|test)\)\s+(?:\[\s*(\d+)\])?\[\s*(\d+)/(\d+)\]")


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
        predictions: Held-out images that are drawn for each task.
    """

    images: int = 800
    size: int = 128
    class_size: int = 48
    class_epochs: int = 8
    detection_epochs: int = 2
    segmentation_iterations: int = 200
    predictions: int = 8


@dataclass(frozen=True)
class Training:
    """A task's training as commands say it.

    Attributes:
        config: Name of the shipped config.
        options: ``--cfg-options`` of all of the task's commands.
        train_options: Those of its training alone.
        epochs: Epochs, or 1 where iterations count.
        last_checkpoint: Name of the file that the training ends with.
    """

    config: str
    options: tuple[str, ...]
    train_options: tuple[str, ...]
    epochs: int
    last_checkpoint: str


@dataclass(frozen=True)
class Step:
    """A command of the demo.

    Attributes:
        name: Its name in the record and of its log.
        words: The command's words after ``densezoo``.
        weight: Its share of the whole time, about seconds on two cores.
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
    run_demo(args.out, seed=args.seed)


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
        ValueError: The seed is negative.
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
    settings = {"seed": seed, **asdict(schedule)}
    record = _read_record(out_dir, settings)
    out_dir.mkdir(parents=True, exist_ok=True)
    _write_record(out_dir, record)

    steps = make_steps(out_dir, seed, schedule)
    left = [step for step in steps if step.name not in record["seconds"]]
    with tqdm(
        total=round(sum(step.weight for step in steps)),
        initial=round(sum(step.weight for step in steps if step not in left)),
        bar_format="{l_bar}{bar}| {elapsed} elapsed, about {remaining} left",
        smoothing=0,  # steps differ in pace, so the mean pace foretells best
    ) as progress:
        for step in left:
            number = steps.index(step) + 1
            progress.set_description(step.name)
            progress.write(f"[{number}/{len(steps)}] {step.command}")
            if step.name.endswith(" training"):
                _write_untrained(out_dir, step, seed, make_trainings(out_dir, schedule))
            record["seconds"][step.name] = _run_step(out_dir, step, progress)
            _write_record(out_dir, record)

    from .demo_report import write_report

    report = write_report(out_dir, steps, schedule, record)
    return report

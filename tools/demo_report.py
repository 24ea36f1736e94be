"""The page of ``densezoo demo``: figures, curves, predictions and commands, in one HTML file."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
from PIL import Image

from .demo_data import CLASSES, SEGMENTATION_CLASSES
from .draw_predictions import Detections, LabelMap, draw, make_palette
from .read_images import read_image

_PICTURE_WIDTH = 288  # pixels
_PACKAGES = ("torch", "torchvision", "timm", "mmengine", "mmcv", "mmdet", "mmseg", "numpy")
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #ccc }
td.number { text-align: right; font-variant-numeric: tabular-nums }
td.missed { color: #b00020 }
figure { display: inline-block; margin: .3rem; vertical-align: top }
figcaption { font-size: .8rem; color: #555 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f5f5; padding: .6rem }
img { max-width: 100% }
"""


@dataclass
class Figure:
    """A measured figure, in percent, before and after training; `aim` only where one is set."""

    name: str
    untrained: float
    trained: float
    aim: float | None = None


@dataclass
class Curve:
    """Values over the course of a training: what, over what, and the points."""

    name: str
    unit: str
    x: list[float]
    y: list[float]


@dataclass
class Section:
    """What the page shows of one task.

    Attributes:
        name: The task.
        model: What was trained.
        figures: What was measured on the held-out split.
        curves: Training loss and held-out figure.
        pictures: Captions and pictures, in the order in which they are shown.
        commands: Each command with the seconds it took.
    """

    name: str
    model: str
    figures: list[Figure]
    curves: list[Curve]
    pictures: list[tuple[str, Image.Image]]
    commands: list[tuple[str, float]]

    @property
    def seconds(self) -> float:
        """How long all of its commands took."""
        return sum(seconds for _, seconds in self.commands)


def read_curves(work_dir: Path, metric: str, name: str, factor: float) -> list[Curve]:
    """Read the training loss and a held-out figure from what mmengine logged into a work dir.

    Args:
        work_dir: Of the training; its runs, if it was resumed, are read in order.
        metric: Key of the figure in the log.
        name: What the figure is called.
        factor: Multiplies the figure.
    """
    losses: dict[int, float] = {}
    measured: dict[int, float] = {}
    unit = "iteration"
    for path in sorted(work_dir.glob("*/vis_data/scalars.json")):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            # A resumed run repeats what its predecessor did after its last checkpoint.
            if "loss" in entry:
                losses[entry["step"]] = entry["loss"]
                unit = "epoch" if "epoch" in entry else "iteration"
            elif metric in entry:
                measured[entry["step"]] = factor * entry[metric]
    return [
        Curve("training loss", "iteration", sorted(losses), [losses[x] for x in sorted(losses)]),
        Curve(
            f"held-out {name}, %", unit, sorted(measured), [measured[x] for x in sorted(measured)]
        ),
    ]


def pair_pictures(
    task: str, data: Path, paths: Sequence[Path], predictions: Path
) -> list[tuple[str, Image.Image]]:
    """Put the ground truth of each held-out image beside what was predicted.

    Args:
        task: classification, detection or segmentation.
        data: Folder of the data set.
        paths: The images.
        predictions: Folder of the pictures that ``densezoo predict`` drew.
    """
    pictures = []
    for path in paths:
        predicted = read_image(predictions / f"{path.stem}.png")
        if task == "classification":
            pictures.append((f"truth: {path.parent.name}", predicted))
        else:
            pictures.append(("truth", draw_truth(task, data, path)))
            pictures.append(("prediction", predicted))
    return pictures


def draw_truth(task: str, data: Path, path: Path) -> Image.Image:
    """Draw a held-out scene's boxes or classes of pixels."""
    image = read_image(path)
    if task == "segmentation":
        labels = np.asarray(Image.open(data / "masks" / "val" / f"{path.stem}.png"))
        return draw(image, LabelMap(labels), SEGMENTATION_CLASSES, segmentation_palette())
    content = json.loads((data / "annotations" / "instances_val.json").read_text())
    found = [entry for entry in content["annotations"] if entry["image_id"] == int(path.stem)]
    boxes = np.array([entry["bbox"] for entry in found], np.float64)
    boxes[:, 2:] += boxes[:, :2]
    labels = np.array([entry["category_id"] - 1 for entry in found])
    return draw(image, Detections(boxes, labels), CLASSES, make_palette(len(CLASSES)))


def segmentation_palette() -> list[tuple[int, int, int]]:
    """Return the colours of background and digits; a digit has that of its boxes."""
    return [(0, 0, 0), *make_palette(len(CLASSES))]


def format_figures(sections: Sequence[Section]) -> str:
    """Write the figures as a table for the terminal."""
    rows = [("", "held-out figure", "untrained", "trained", "aim")]
    for section in sections:
        for figure in section.figures:
            aim = "" if figure.aim is None else f"{figure.aim:.0f}"
            numbers = (f"{figure.untrained:.1f}", f"{figure.trained:.1f}", aim)
            rows.append((section.model, figure.name, *numbers))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        texts = [text.ljust(width) for text, width in zip(row[:2], widths[:2], strict=True)]
        texts += [text.rjust(width) for text, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join(texts).rstrip())
    return "\n".join(lines)


def write_report(
    path: Path, sections: Sequence[Section], data_command: tuple[str, float], seed: int
) -> None:
    """Write the page.

    Args:
        path: The HTML file.
        sections: The tasks.
        data_command: The command that made the data, and its seconds.
        seed: Of everything.
    """
    total = data_command[1] + sum(section.seconds for section in sections)
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8"><title>densezoo demo</title>',
        f"<style>{_STYLE}</style></head><body>",
        "<h1>densezoo demo</h1>",
        "<p>One backbone, <code>cas_vit_xs</code>, learns three tasks from random weights: first "
        "a classifier, then, from its weights, a detector and a segmenter. The images are real "
        "handwritten digits on parts of real photographs, both of scikit-learn; digits and parts "
        f"of the held-out split do not occur in training. It took {_format_time(total)}.</p>",
        _format_table(sections),
        *(_format_section(section) for section in sections),
        "<h2>Data</h2>",
        _format_commands([data_command]),
        "<h2>Machine and versions</h2>",
        _format_machine(seed),
        "</body></html>",
    ]
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")


def _format_table(sections: Sequence[Section]) -> str:
    """Write the figures as an HTML table; one that misses its aim is red."""
    rows = [
        "<table><tr><th>task</th><th>model</th><th>held-out figure, %</th><th>untrained</th>"
        "<th>trained</th><th>aim</th><th>time</th></tr>"
    ]
    for section in sections:
        for number, figure in enumerate(section.figures):
            is_missed = figure.aim is not None and figure.trained < figure.aim
            rows.append(
                f"<tr><td>{'' if number else section.name}</td>"
                f"<td>{'' if number else html.escape(section.model)}</td><td>{figure.name}</td>"
                f'<td class="number">{figure.untrained:.1f}</td>'
                f'<td class="number{" missed" if is_missed else ""}">{figure.trained:.1f}</td>'
                f'<td class="number">{"" if figure.aim is None else f"{figure.aim:.0f}"}</td>'
                f'<td class="number">{"" if number else _format_time(section.seconds)}</td></tr>'
            )
    return "\n".join([*rows, "</table>"])


def _format_section(section: Section) -> str:
    """Write curves, pictures and commands of a task."""
    parts = [f"<h2>{section.name.capitalize()}: {html.escape(section.model)}</h2>"]
    parts.append(f'<img src="{_embed(_plot(section.curves))}" alt="curves of the training">')
    parts.append("<div>")
    for caption, picture in section.pictures:
        height = round(picture.height * _PICTURE_WIDTH / picture.width)
        small = picture.resize((_PICTURE_WIDTH, height), Image.Resampling.LANCZOS)
        parts.append(
            f'<figure><img src="{_embed(small)}" alt="{caption}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )
    parts.append("</div>")
    parts.append(_format_commands(section.commands))
    return "\n".join(parts)


def _format_commands(commands: Sequence[tuple[str, float]]) -> str:
    """Write commands with the time that each took."""
    items = "\n".join(
        f"<p>{_format_time(seconds)}</p><pre>{html.escape(command)}</pre>"
        for command, seconds in commands
    )
    return f"<details><summary>Commands</summary>\n{items}\n</details>"


def _format_machine(seed: int) -> str:
    """Write what the figures depend on."""
    import torch

    versions = []
    for name in _PACKAGES:
        module = __import__(name)
        versions.append(f"{name} {module.__version__}")
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    rows = {
        "processor": f"{_name_processor()}, {cores}",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "system": platform.platform(),
        "Python": platform.python_version(),
        "densezoo": metadata.version("densezoo"),
        "packages": ", ".join(versions),
        "seed": str(seed),
    }
    cells = (f"<tr><th>{key}</th><td>{html.escape(value)}</td></tr>" for key, value in rows.items())
    return "<table>" + "\n".join(cells) + "</table>"


def _name_processor() -> str:
    """Return the processor's name as the system knows it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _plot(curves: Sequence[Curve]) -> Image.Image:
    """Plot curves side by side."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(9, 2.8), dpi=100, layout="constrained")
    for axes, curve in zip(canvas.subplots(1, len(curves)), curves, strict=True):
        axes.plot(curve.x, curve.y, marker="o", markersize=2.5)
        axes.set(title=curve.name, xlabel=curve.unit)
        axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png")
    return Image.open(buffer)


def _embed(picture: Image.Image) -> str:
    """Write a picture as a data URL."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _format_time(seconds: float) -> str:
    """Write a time as minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d} min"

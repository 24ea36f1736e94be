"""What points of an image attend to, and which regions they are routed to, stage by stage."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..layers.attention_maps import AttentionMaps, Point
from .show_model import Subject
from .show_pictures import Box, Panel, draw_panels

_NUMBER = r"\s*(-?\d+(?:\.\d*)?|-?\.\d+)\s*"


@dataclass(frozen=True)
class Query:
    """A point of an image: pixels from the top left, or fractions of width and height."""

    x: float
    y: float
    is_fraction: bool

    @classmethod
    def parse(cls, word: str) -> Query:
        """Read ``X,Y``: whole numbers are pixels, numbers with a point are fractions.

        Raises:
            ValueError: it is not of that form, or a fraction is not from 0 to 1.
        """
        found = re.fullmatch(f"{_NUMBER},{_NUMBER}", word)
        are_fractions = {"." in part for part in found.groups()} if found else {True, False}
        if len(are_fractions) == 2:
            raise ValueError(
                "--points takes X,Y: two fractions of width and height, as 0.5,0.25, or two whole "
                f"numbers of pixels, as 320,240; not {word!r} (images go before --points)"
            )
        query = cls(float(found[1]), float(found[2]), are_fractions == {True})
        if query.is_fraction and not (0 <= query.x <= 1 and 0 <= query.y <= 1):
            raise ValueError(
                f"--points {word} is outside of the image: fractions are from 0.0 to 1.0, and "
                "pixels are written without a point"
            )
        return query

    def fractions(self, image: Image.Image) -> tuple[float, float]:
        """Say where the point is in an image, in fractions of its width and height.

        Raises:
            ValueError: it is outside.
        """
        if self.is_fraction:
            return self.x, self.y
        if not (0 <= self.x < image.width and 0 <= self.y < image.height):
            raise ValueError(
                f"--points {self} is outside of the image, which has {image.width}x{image.height} "
                "pixels, counted from 0"
            )
        return (self.x + 0.5) / image.width, (self.y + 0.5) / image.height

    def __str__(self) -> str:
        return f"{self.x:g},{self.y:g}"


# Off the middle, at which windows meet.
DEFAULT_QUERIES = (Query(0.3, 0.35, True), Query(0.55, 0.6, True), Query(0.8, 0.75, True))


@dataclass(frozen=True)
class Choice:
    """What of a model's attention is shown.

    Attributes:
        queries: the points whose attention it is.
        block: index of the block in each stage, from 0; negative from the end.
        heads: indices of the heads, from 0, each for itself; none for the mean of all.
    """

    queries: Sequence[Query] = DEFAULT_QUERIES
    block: int = -1
    heads: Sequence[int] = ()

    @property
    def views(self) -> Sequence[int | None]:
        """What each row of panels shows: a head, or the mean of all as None."""
        return self.heads or (None,)

    def describe_heads(self) -> str:
        """Say in a title which heads are shown."""
        if not self.heads:
            return "mean of heads"
        return f"head{'s' * (len(self.heads) > 1)} {', '.join(map(str, self.heads))}"

    def place(self, seen: Seen, head: int | None) -> str:
        """Say in a caption where a row of panels is from: stage, block, and head of several."""
        of_head = f", head {head}" if len(self.heads) > 1 else ""
        return f"stage {seen.stage}, block {seen.block}{of_head}"

    def fractions(self, image: Image.Image) -> list[tuple[float, float]]:
        """Say where the queries are in an image, in fractions of its width and height.

        Raises:
            ValueError: one is outside.
        """
        return [query.fractions(image) for query in self.queries]


@dataclass(frozen=True)
class Seen:
    """A module that attends, and what it says of an image.

    Attributes:
        stage: index of the stage.
        block: index of the block.
        points: rows and columns of the queries on the stage's map.
        answers: what each method that was asked for gave.
    """

    stage: int
    block: int
    points: Sequence[Point]
    answers: dict[str, Any]


def find_modules(subject: Subject, choice: Choice, method: str) -> list[tuple[int, int, nn.Module]]:
    """Find what has a method in the chosen block of each stage: stage, block and module.

    Raises:
        ValueError: nothing in the model has it, or a stage has no such block.
    """
    found = []
    for i, stage in enumerate(subject.stages if subject.backbone else ()):
        num_blocks = len(stage.blocks)
        if not any(hasattr(module, method) for module in stage.modules()):
            continue
        if not -num_blocks <= choice.block < num_blocks:
            raise ValueError(
                f"--block is {choice.block}: stage {i} of {subject.name} has blocks 0 to "
                f"{num_blocks - 1} (or -{num_blocks} to -1)"
            )
        block = choice.block % num_blocks
        found += [(i, block, m) for m in stage.blocks[block].modules() if hasattr(m, method)]
    if not found and subject.backbone is None:
        raise ValueError(
            f"{subject.name} is timm's own, whose attention is not known: models of densezoo are "
            "shown, and of others the receptive field (--show erf)"
        )
    if not found:
        raise ValueError(f"{subject.name} {_REFUSALS[method]}")
    return found


# By the method that no module of a model has.
_REFUSALS = {
    "attention_maps": "has no attention of positions to positions, whose weights could be shown; "
    "--show erf shows its receptive field",
    "routed_regions": "routes nothing: --show routing takes BiFormer models, and --show attention "
    "all that attend",
    "polyline_masks": "has no polyline masks: --show mask takes PPMA and RMT models, and --show "
    "attention all that attend",
}


@torch.no_grad()
def look(
    subject: Subject,
    image: Image.Image,
    fractions: Sequence[tuple[float, float]],
    modules: Sequence[tuple[int, int, nn.Module]],
    methods: Sequence[str],
) -> list[Seen]:
    """Run a model on an image, and ask its modules as they get their inputs.

    Args:
        subject: the model.
        image: RGB, of the size that the model is to see.
        fractions: x and y of the queries, in fractions of the image.
        modules: as `find_modules` gives them.
        methods: of the modules; they take the inputs of the forward pass, the size of the stage's
            map and points of it.
    """
    seen = {}
    for stage, block, module in modules:
        points = []
        stride = subject.strides[stage]
        size = ceil(image.height / stride), ceil(image.width / stride)
        for x, y in fractions:
            row, column = int(y * image.height / stride), int(x * image.width / stride)
            points.append((min(row, size[0] - 1), min(column, size[1] - 1)))
        seen[module] = size, Seen(stage, block, points, {})

    def ask(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        # Now, as a block may change its input in place later.
        size, found = seen[module]
        for name in methods:
            method = getattr(module, name)
            found.answers[name] = method(*args, **kwargs, size=size, points=found.points)

    hooks = [module.register_forward_pre_hook(ask, with_kwargs=True) for module in seen]
    try:
        subject.maps(subject.batch(image))
    finally:
        for hook in hooks:
            hook.remove()
    return [found for _, found in seen.values()]


def check_heads(choice: Choice, maps: AttentionMaps, seen: Seen, subject: Subject) -> None:
    """Raise a ValueError unless the attention has the chosen heads."""
    num_heads = maps.weights.shape[1]
    missing = [head for head in choice.heads if not 0 <= head < num_heads]
    if missing:
        raise ValueError(
            f"--head is {missing[0]}: stage {seen.stage} of {subject.name} has heads 0 to "
            f"{num_heads - 1}"
        )


@torch.no_grad()
def draw_attention(
    subject: Subject, image: Image.Image, resized: Image.Image, name: str, choice: Choice
) -> bytes:
    """Draw what each query attends to in the chosen block of each stage, as PNG.

    Args:
        subject: the model.
        image: RGB.
        resized: the same, of the size that the model is to see.
        name: of the image.
        choice: what is shown.

    Raises:
        ValueError: the model has no such block or head, or no attention; a query is outside.
    """
    rows, fractions = [], choice.fractions(image)
    modules = find_modules(subject, choice, "attention_maps")
    for seen in look(subject, resized, fractions, modules, ["attention_maps"]):
        for kind, maps in seen.answers["attention_maps"].items():
            check_heads(choice, maps, seen, subject)
            rows += [
                attention_row(subject, resized, seen, kind, maps, choice, head, fractions)
                for head in choice.views
            ]
    size = resized.height, resized.width
    title = f"Attention of {subject.title}, {choice.describe_heads()}"
    title += say_image(name, resized, subject)
    return draw_panels(image, size, rows, title, "weight, relative to the largest in the panel")


def say_image(name: str, resized: Image.Image, subject: Subject) -> str:
    """Say below a title which image is shown, at which size, and which weights see it."""
    return f"\n{name} at {resized.height}x{resized.width}, {subject.weights}"


def attention_row(
    subject: Subject,
    image: Image.Image,
    seen: Seen,
    kind: str,
    maps: AttentionMaps,
    choice: Choice,
    head: int | None,
    fractions: Sequence[tuple[float, float]],
) -> list[Panel]:
    """Make the panels of a head's attention, or of the mean of all, one a query.

    Args:
        subject: the model.
        image: of the size that the model saw.
        seen: what attends.
        kind: what the attention is, in a few words.
        maps: its weights.
        choice: what of the model is shown.
        head: one of `choice.views`.
        fractions: x and y of the queries, in fractions of the image.
    """
    stride = subject.strides[seen.stage]
    weights, elsewhere = weights_of_head(maps, head)
    panels = []
    for i, (x, y) in enumerate(fractions):
        caption = f"{choice.place(seen, head)}: {kind}\n"
        caption += f"point {i + 1}, largest weight {percent(weights[i].max())}"
        caption += note_elsewhere(
            elsewhere[i], "carriers, padding" if "carriers" in kind else "padding"
        )
        row, column = seen.points[i]
        panels.append(
            Panel(
                weights[i],
                (stride * maps.cell[0], stride * maps.cell[1]),
                caption,
                point=(x * image.width, y * image.height),
                own=[box(row, column, stride, stride)],
            )
        )
    return panels


@torch.no_grad()
def draw_routing(
    subject: Subject, image: Image.Image, resized: Image.Image, name: str, choice: Choice
) -> bytes:
    """Draw which regions each query's region is routed to, as PNG; as `draw_attention` else.

    A region's tint is the share of the query's attention that its positions on the map get.
    """
    rows, fractions = [], choice.fractions(image)
    modules = find_modules(subject, choice, "routed_regions")
    for seen in look(subject, resized, fractions, modules, ["routed_regions", "attention_maps"]):
        (maps,) = seen.answers["attention_maps"].values()
        check_heads(choice, maps, seen, subject)
        rows += [
            _routing_row(subject, resized, seen, choice, head, fractions) for head in choice.views
        ]
    size = resized.height, resized.width
    title = f"Regions that {subject.title} routes to{say_image(name, resized, subject)}"
    bar = "share of the point's attention, relative to the largest in the panel"
    return draw_panels(image, size, rows, title, bar)


def _routing_row(
    subject: Subject,
    image: Image.Image,
    seen: Seen,
    choice: Choice,
    head: int | None,
    fractions: Sequence[tuple[float, float]],
) -> list[Panel]:
    """Make the panels of routing, one a query; arguments as of `attention_row`."""
    routed = seen.answers["routed_regions"]
    (maps,) = seen.answers["attention_maps"].values()
    weights, elsewhere = weights_of_head(maps, head)
    stride = subject.strides[seen.stage]
    height, width = (stride * side for side in routed.size)
    panels = []
    for i, (x, y) in enumerate(fractions):
        shares = sum_regions(weights[i], routed.grid, routed.size)
        others = [divmod(int(route), routed.grid[1]) for route in routed.routes[i]]
        own = divmod(int(routed.regions[i]), routed.grid[1])
        tinted = np.zeros_like(shares)
        for place in others:
            tinted[place] = shares[place]
        panels.append(
            Panel(
                tinted,
                (height, width),
                f"{choice.place(seen, head)}: {len(set(others))} of "
                f"{routed.grid[0]}x{routed.grid[1]} regions\n"
                f"point {i + 1}, largest share {percent(tinted.max())}"
                + note_elsewhere(elsewhere[i], "padding"),
                point=(x * image.width, y * image.height),
                own=[box(*own, height, width)],
                others=[box(*place, height, width) for place in others],
            )
        )
    return panels


def weights_of_head(maps: AttentionMaps, head: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Give the weights (P, rows, columns) of a head, or the mean of all, and those elsewhere (P,).

    P queries.
    """
    weights, elsewhere = (
        (part.mean(1) if head is None else part[:, head]).float().cpu().numpy()
        for part in (maps.weights, maps.elsewhere)
    )
    return weights, elsewhere


def note_elsewhere(share: float, what: str) -> str:
    """Say in a caption what has no place on the map, where that has some weight."""
    return f", {what} {percent(share)}" if share > 5e-4 else ""


def sum_regions(weights: np.ndarray, grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Sum (H, W) weights over each region of a grid that covers the map: (rows, columns)."""
    padded = np.zeros((grid[0] * size[0], grid[1] * size[1]))
    padded[: weights.shape[0], : weights.shape[1]] = weights
    return padded.reshape(grid[0], size[0], grid[1], size[1]).sum((1, 3))


def box(row: int, column: int, height: float, width: float) -> Box:
    """Give the box of a cell of a grid, from left to bottom, pixels."""
    return column * width, row * height, (column + 1) * width, (row + 1) * height


def percent(share: float) -> str:
    """Write a share in percent, with two digits that count."""
    return f"{100 * share:.2g} %" if share < 0.995 else "100 %"

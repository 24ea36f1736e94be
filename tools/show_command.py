"""``densezoo predict --show``: pictures of routing, attention, masks or the receptive field."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from .durable_files import write_durably
from .prediction_files import plan_jobs, plan_summary
from .read_images import UnusableImage, read_image
from .show_attention import (
    DEFAULT_QUERIES,
    Choice,
    Query,
    draw_attention,
    draw_routing,
    find_modules,
)
from .show_erf import draw_erf, fill
from .show_mask import draw_mask
from .show_model import Subject, build_subject
from .show_pictures import check_matplotlib

# What is drawn on each image: how, and the method that a module of the model is to have.
_ON_IMAGES: dict[str, tuple[Callable[..., bytes], str]] = {
    "routing": (draw_routing, "routed_regions"),
    "attention": (draw_attention, "attention_maps"),
    "mask": (draw_mask, "polyline_masks"),
}
SHOWS = (*_ON_IMAGES, "erf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``--show`` to those of ``densezoo predict``."""
    group = parser.add_argument_group(
        "to see what a model does",
        "--show draws pictures of a MODEL, the name of one or a config, in the place of "
        "predictions: NAME_routing.png, NAME_attention.png, NAME_mask.png of each image, "
        "MODEL_erf.png of all.",
    )
    group.add_argument(
        "--show",
        choices=SHOWS,
        help="routing: the regions that points of an image are routed to (BiFormer); attention: "
        "what they attend to; mask: how far the decays of paths let them see, beside what they "
        "attend to (PPMA, RMT); erf: the effective receptive field over the images, of any model",
    )
    group.add_argument(
        "--weights",
        metavar="FILE",
        help="a checkpoint of the model, published ones included (default: random weights)",
    )
    group.add_argument(
        "--points",
        nargs="+",
        metavar="X,Y",
        help="fractions of the image's width and height, as 0.5,0.25, or pixels, as 320,240 "
        "(default: " + " ".join(str(query) for query in DEFAULT_QUERIES) + ")",
    )
    group.add_argument(
        "--size",
        nargs="+",
        type=int,
        metavar="PIXELS",
        help="height and width that images are scaled to, or the shorter side (default: what the "
        "weights are made for)",
    )
    group.add_argument(
        "--block",
        type=int,
        help="index of the block of each stage, from 0, or from the end with a minus (default: -1)",
    )
    group.add_argument(
        "--head",
        nargs="+",
        type=int,
        metavar="N",
        help="indices of heads, from 0, each shown for itself (default: the mean of all)",
    )
    group.add_argument(
        "--model-kwargs",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="arguments of the model, as num_regions=16",
    )


# Options that go with --show alone.
OPTIONS = ("weights", "points", "size", "block", "head", "model_kwargs")


def run(args: argparse.Namespace, images: Sequence[Path], device: str) -> None:
    """Draw what ``--show`` asks for.

    Args:
        args: arguments of the command.
        images: files and folders.
        device: where the model runs.

    Raises:
        ValueError, OSError, ImportError: a mistake of the user, in one line.
    """
    check_matplotlib()
    _check_size(args.size)
    if args.show == "erf":
        _check_unused(args, ("points", "block", "head"))
        _draw_summary(args, images, device)
        return
    queries = [Query.parse(word) for word in args.points] if args.points else DEFAULT_QUERIES
    choice = Choice(queries, -1 if args.block is None else args.block, args.head or ())
    jobs = plan_jobs(images, Path(args.out), overwrite=args.overwrite, show=args.show)
    if not all(query.is_fraction for query in queries):
        for job in jobs:
            _check_queries(choice, read_image(job.image), job.image)
    subject = _build(args, device)
    subject.check_size(args.size)
    draw, method = _ON_IMAGES[args.show]
    find_modules(subject, choice, method)
    problems = []
    for job in tqdm(jobs, disable=None):
        try:
            image = read_image(job.image)
            height, width = subject.resized(image.width, image.height, args.size)
            resized = image.resize((width, height), Image.Resampling.BICUBIC)
            picture = draw(subject, image, resized, job.image.name, choice)
        except (UnusableImage, FileNotFoundError) as problem:
            problems.append(f"{job.image}: {problem}")
            continue
        write_durably(job.picture, picture)
        tqdm.write(f"{job.image} -> {job.picture}")
    _report(problems, len(jobs))


def _draw_summary(args: argparse.Namespace, paths: Sequence[Path], device: str) -> None:
    """Draw the effective receptive field over all images that can be read."""
    stem = re.sub(r"[^\w.-]+", "_", Path(args.config).name.removesuffix(".py"))
    picture = Path(args.out) / f"{stem}_erf.png"
    sources = plan_summary(paths, picture, overwrite=args.overwrite)
    subject = _build(args, device)
    size = args.size or list(subject.size)
    size = tuple(size * 2 if len(size) == 1 else size)
    subject.check_size(size)
    problems: list[str] = []

    def read() -> Iterator[Image.Image]:
        for source in tqdm(sources, disable=None):
            try:
                yield fill(read_image(source), size)
            except (UnusableImage, FileNotFoundError) as problem:
                problems.append(f"{source}: {problem}")

    content = draw_erf(subject, read(), size)
    write_durably(picture, content)
    tqdm.write(f"{len(sources) - len(problems)} images -> {picture}")
    _report(problems, len(sources))


def _report(problems: Sequence[str], num_images: int) -> None:
    """Raise a ValueError where images could not be drawn, all of them listed before."""
    if problems:
        print("without a picture:", *problems, sep="\n  ", file=sys.stderr)
        raise ValueError(f"{len(problems)} of {num_images} images have no picture: {problems[0]}")


def _build(args: argparse.Namespace, device: str) -> Subject:
    return build_subject(
        args.config,
        weights=args.weights,
        model_kwargs=args.model_kwargs,
        cfg_options=args.cfg_options,
        device=device,
    )


def _check_queries(choice: Choice, image: Image.Image, path: Path) -> None:
    """Raise a ValueError that names the image if a query is outside of it."""
    try:
        choice.fractions(image)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check_size(size: Sequence[int] | None) -> None:
    """Raise a ValueError unless there are one or two numbers of at least 1."""
    if size is not None and (len(size) > 2 or min(size) < 1):
        raise ValueError(
            f"--size is {' '.join(map(str, size))}: the shorter side, or height and width, of at "
            "least 1 pixel, are taken"
        )


def _check_unused(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Raise a ValueError for an option that this --show does not take."""
    for name in names:
        if getattr(args, name) is not None:
            raise ValueError(f"--show {args.show} takes no --{name}: it is of the middle of maps")

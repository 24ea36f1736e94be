"""``densezoo list``: the models of the zoo with their sizes, published results and weights.

Parameters are counted on a model without memory (the meta device); MACs and results are those of
its registration, which ``densezoo macs`` compares with what it counts.
"""

from __future__ import annotations

import argparse
from fnmatch import fnmatch

import timm

from ..backbones.aliases import ALIASES
from ..backbones.registry import BACKBONES, Published, find_weights
from .tables import format_table

EXAMPLE = "densezoo list --filter 'cas_vit_*'"

HEADER = (
    "model",
    "params (M)",
    "GMACs",
    "at",
    "top-1",
    "RetinaNet",
    "Mask R-CNN",
    "Semantic FPN",
    "licence",
)
NOTES = (
    "GMACs at the size given, counted where the authors' do not fit their code. As published:\n"
    "ImageNet-1k top-1 of each file; COCO box AP of RetinaNet, box / mask AP of Mask R-CNN, 1x\n"
    "schedule; ADE20K mIoU of Semantic FPN."
)


def select_models(pattern: str | None = None) -> list[str]:
    """List the zoo's names that match `pattern`, all without one, family by family.

    Args:
        pattern: shell-style, as in "cas_vit_*"; one without wildcards matches anywhere in a name.

    Raises:
        ValueError: nothing matches.
    """
    if pattern is None:
        return list(BACKBONES)
    wanted = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    names = [name for name in BACKBONES if fnmatch(name, wanted)]
    if not names:
        raise ValueError(f"no model of the zoo matches {pattern!r}; `densezoo list` prints all")
    return names


def with_tags(name: str) -> list[str]:
    """List the zoo's model `name`, and behind it "name.tag" of each file beside the default one."""
    return [name, *(f"{name}.{tag}" for tag in list(BACKBONES[name].tags)[1:])]


def describe_model(name: str) -> tuple[str, ...]:
    """Describe the zoo's model `name`, a cell for each title of `HEADER`; "-" is not published.

    Args:
        name: with the tag of a published file, or without for the default one.
    """
    weights = find_weights(name)
    published: Published = weights.published
    num_params = sum(p.numel() for p in timm.create_model(name, device="meta").parameters())
    _, height, width = weights.input_size

    def cell(*values: float | None, digits: int = 1) -> str:
        present = [f"{value:.{digits}f}" for value in values if value is not None]
        return " / ".join(present) or "-"

    return (
        name,
        f"{num_params / 1e6:.3f}",
        cell(published.gmacs, digits=3),
        f"{height}x{width}",
        cell(*published.top1),
        cell(published.retinanet),
        cell(*(published.mask_rcnn or ())),
        cell(published.semantic_fpn),
        weights.license or "-",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``densezoo list``."""
    parser.add_argument(
        "--filter",
        metavar="PATTERN",
        help="names to print, with the wildcards * and ?; without them, what a name has in it",
    )


def run(args: argparse.Namespace) -> None:
    """Print the models of the zoo, then where their weights are."""
    names = select_models(args.filter)
    rows = [describe_model(tagged) for name in names for tagged in with_tags(name)]
    print(format_table(HEADER, rows))
    print(NOTES)
    pages: dict[str, list[str]] = {}
    for name in names:
        pages.setdefault(BACKBONES[name].weights.page, []).append(name)
    for page, members in pages.items():
        print(f"weights of {', '.join(members)}: {page}")
    aliases = [f"{alias} = {name}" for alias, name in ALIASES.items() if name in names]
    if aliases:
        print(f"official names, which are taken too: {', '.join(aliases)}")


if __name__ == "__main__":
    from .cli import run_module

    run_module("list")

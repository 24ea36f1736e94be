"""What the decays along polyline paths leave of the positions of an image, beside the attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from ..layers.attention_maps import maps_of_grid
from .show_attention import (
    Choice,
    Seen,
    attention_row,
    box,
    check_heads,
    find_modules,
    look,
    percent,
    say_image,
    weights_of_head,
)
from .show_model import Subject
from .show_pictures import Panel, draw_panels


@torch.no_grad()
def draw_mask(
    subject: Subject, image: Image.Image, resized: Image.Image, name: str, choice: Choice
) -> bytes:
    """Draw each query's mask in the chosen block of each stage, beside its attention, as PNG.

    A mask is the product of the decays along the path from the query to a position, or the mean of
    those of both paths: 1 at the query. Attention is what it makes of the products of queries and
    keys. Arguments and errors as of `draw_attention`.
    """
    rows, fractions = [], choice.fractions(image)
    modules = find_modules(subject, choice, "polyline_masks")
    for seen in look(subject, resized, fractions, modules, ["polyline_masks", "attention_maps"]):
        ((kind, maps),) = seen.answers["attention_maps"].items()
        check_heads(choice, maps, seen, subject)
        for head in choice.views:
            masks = _mask_row(subject, resized, seen, choice, head, fractions)
            attention = attention_row(subject, resized, seen, kind, maps, choice, head, fractions)
            rows.append([panel for pair in zip(masks, attention, strict=True) for panel in pair])
    size = resized.height, resized.width
    title = f"Polyline masks and attention of {subject.title}, {choice.describe_heads()}"
    title += say_image(name, resized, subject)
    return draw_panels(
        image, size, rows, title, "mask or weight, relative to the largest in the panel"
    )


def _mask_row(
    subject: Subject,
    image: Image.Image,
    seen: Seen,
    choice: Choice,
    head: int | None,
    fractions: Sequence[tuple[float, float]],
) -> list[Panel]:
    """Make the panels of masks, one a query; arguments as of `attention_row`."""
    stride = subject.strides[seen.stage]
    masks = seen.answers["polyline_masks"]  # (P, H, W, heads)
    masks, _ = weights_of_head(maps_of_grid(masks, masks.shape[1:3]), head)
    panels = []
    for i, ((x, y), (row, column)) in enumerate(zip(fractions, seen.points, strict=True)):
        caption = (
            f"{choice.place(seen, head)}: mask\npoint {i + 1}, mean {percent(masks[i].mean())}"
        )
        panels.append(
            Panel(
                masks[i],
                (stride, stride),
                caption,
                point=(x * image.width, y * image.height),
                own=[box(row, column, stride, stride)],
            )
        )
    return panels

"""Pictures of what a model sees: panels of heat over an image, with titles and a colour bar."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

_PANEL_AREA = 7.0  # square inches of a panel
_DPI = 100
_CAPTION_HEIGHT = 0.42  # inches above a panel
_HEAD_HEIGHT = 0.75  # inches above all panels
_LETTERS = 12  # of a title, on an inch
_POINT_COLOUR = "#00e5ff"

# Left, top, right and bottom in pixels of the image.
Box = tuple[float, float, float, float]


@dataclass
class Panel:
    """A picture of its own: heat over an image.

    Attributes:
        heat: (rows, columns), at least 0.
        cell: height and width of an entry of `heat`, pixels of the image.
        caption: what it shows.
        point: what is marked, x and y in pixels of the image; None for nothing.
        own: boxes that belong to the point.
        others: further boxes.
    """

    heat: np.ndarray
    cell: tuple[float, float]
    caption: str
    point: tuple[float, float] | None = None
    own: Sequence[Box] = field(default_factory=tuple)
    others: Sequence[Box] = field(default_factory=tuple)


def check_matplotlib() -> None:
    """Raise an ImportError that names the extra, unless matplotlib is there."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "pictures of attention need matplotlib: pip install 'densezoo[show]'"
        ) from error


def draw_panels(
    image: Image.Image, size: tuple[int, int], rows: Sequence[Sequence[Panel]], title: str, bar: str
) -> bytes:
    """Draw rows of panels over an image, each by the scale of its own maximum, as PNG.

    Args:
        image: RGB.
        size: height and width that the model saw it in, the pixels of the panels.
        rows: of equally many panels.
        title: what all show.
        bar: what the colour is, relative to the largest in the panel.
    """
    width, height = _panel_size(size[1] / size[0])
    longest = round(_DPI * max(width, height))
    image = ImageOps.contain(image, (longest, longest)).convert("L")
    figure = _make_figure(
        max(width * len(rows[0]), 5.0) + 0.9,
        (height + _CAPTION_HEIGHT) * len(rows) + _HEAD_HEIGHT,
        title,
    )
    grey = 0.25 + 0.75 * np.asarray(image) / 255  # light, for heat to be seen on it
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    colours = _heat_colours()
    for axis, panel in zip(axes.flat, [panel for row in rows for panel in row], strict=True):
        axis.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=_extent(*size, (1, 1)))
        highest = float(panel.heat.max())
        axis.imshow(
            panel.heat / highest if highest > 0 else panel.heat,
            cmap=colours,
            vmin=0,
            vmax=1,
            interpolation="nearest",
            extent=_extent(*panel.cell, panel.heat.shape),
        )
        _mark(axis, panel)
        axis.set(xlim=(0, size[1]), ylim=(size[0], 0), xticks=(), yticks=())
        axis.set_title(panel.caption, fontsize=8)
    _add_bar(figure, axes, colours, bar)
    return _encode(figure)


def draw_heat(panels: Sequence[Panel], title: str, bar: str) -> bytes:
    """Draw a row of panels of heat alone on one logarithmic scale, as PNG."""
    from matplotlib.colors import LogNorm

    rows, columns = panels[0].heat.shape
    width, height = _panel_size(columns / rows)
    figure = _make_figure(width * len(panels) + 0.9, height + _CAPTION_HEIGHT + _HEAD_HEIGHT, title)
    axes = figure.subplots(1, len(panels), squeeze=False)
    norm = LogNorm(1e-4, 1)
    for axis, panel in zip(axes.flat, panels, strict=True):
        highest = float(panel.heat.max())
        heat = panel.heat / highest if highest > 0 else panel.heat
        axis.imshow(
            heat.clip(norm.vmin),
            cmap="magma",
            norm=norm,
            interpolation="nearest",
            extent=_extent(*panel.cell, heat.shape),
        )
        _mark(axis, panel)
        axis.set(xlim=(0, columns), ylim=(rows, 0), xticks=(), yticks=())
        axis.set_title(panel.caption, fontsize=8)
    _add_bar(figure, axes, "magma", bar, norm)
    return _encode(figure)


def _panel_size(aspect: float) -> tuple[float, float]:
    """Give width and height of a panel, inches, by its width over its height."""
    aspect = min(max(aspect, 1 / 3), 3)
    return (_PANEL_AREA * aspect) ** 0.5, (_PANEL_AREA / aspect) ** 0.5


def _make_figure(width: float, height: float, title: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    lines = (textwrap.fill(line, round(_LETTERS * width)) for line in title.splitlines())
    figure.suptitle("\n".join(lines), fontsize=10)
    return figure


def _heat_colours() -> Colormap:
    """Make a scale from nothing to see, at 0, to a strong colour."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    colours = colormaps["plasma"](np.linspace(0, 1, 256))
    colours[:, 3] = np.linspace(0, 1, 256) ** 0.6 * 0.85
    return ListedColormap(colours)


def _extent(
    cell_height: float, cell_width: float, shape: tuple[int, ...]
) -> tuple[float, float, float, float]:
    """Give left, right, bottom and top of an array of cells, pixels."""
    return 0, cell_width * shape[1], cell_height * shape[0], 0


def _mark(axis: Axes, panel: Panel) -> None:
    """Draw the boxes and the point."""
    from matplotlib.patches import Rectangle

    for boxes, colour, width in ((panel.others, "white", 0.9), (panel.own, _POINT_COLOUR, 1.8)):
        for left, top, right, bottom in boxes:
            size = right - left, bottom - top
            axis.add_patch(
                Rectangle((left, top), *size, fill=False, edgecolor=colour, linewidth=width)
            )
    if panel.point is not None:
        axis.plot(
            *panel.point, marker="o", markersize=4.5, markerfacecolor=_POINT_COLOUR,
            markeredgecolor="black", markeredgewidth=0.8,
        )  # fmt: skip


def _add_bar(
    figure: Figure, axes: np.ndarray, colours: Colormap | str, text: str, norm: object = None
) -> None:
    from matplotlib.cm import ScalarMappable

    bar = figure.colorbar(
        ScalarMappable(norm, colours), ax=axes, fraction=0.03, pad=0.01, aspect=30
    )
    bar.set_label(text, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _encode(figure: Figure) -> bytes:
    """Encode a figure as PNG of 256 colours, which takes a quarter of the space."""
    drawn, encoded = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    with Image.open(drawn) as picture:
        colours = picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
    colours.save(encoded, "PNG", optimize=True)
    return encoded.getvalue()

"""Pictures show heat where it is, on the image, beside a colour bar."""

import io

import numpy as np
import pytest
from PIL import Image

from densezoo.tools import show_pictures
from densezoo.tools.show_pictures import Panel, draw_heat, draw_panels


def colourful(picture):
    """Where a picture has another colour than grey, (H, W)."""
    with Image.open(io.BytesIO(picture)) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB")).astype(int)
    return pixels.max(-1) - pixels.min(-1) > 60


def test_heat_lies_on_its_part_of_the_image_and_nothing_on_the_rest():
    image = Image.new("RGB", (300, 200), (120, 120, 120))
    heat = np.zeros((2, 3))
    drawn = {}
    for place in ((0, 0), (1, 2)):
        heat[:] = 0
        heat[place] = 0.2
        panel = Panel(heat.copy(), (32, 32), "a panel")
        drawn[place] = colourful(draw_panels(image, (64, 96), [[panel]], "title", "heat"))
    first, last = drawn.values()
    bar = first & last  # the colour bar is the same
    first, last = first & ~bar, last & ~bar
    assert bar.any() and first.any() and last.any()
    (top, left), (bottom, right) = (np.argwhere(part).mean(0) for part in (first, last))
    assert top < bottom and left < right
    # Of the six cells of the image one has heat.
    sides = [np.ptp(np.argwhere(part), 0) for part in (first, last)]
    np.testing.assert_allclose(sides[0], sides[1], atol=2)
    assert bottom - top == pytest.approx(sides[0][0], abs=3)
    assert right - left == pytest.approx(2 * sides[0][1], abs=3)


def test_marks_are_drawn_and_pictures_grow_with_their_panels():
    image = Image.new("RGB", (60, 60), "white")
    plain = Panel(np.zeros((2, 2)), (30, 30), "")
    marked = Panel(np.zeros((2, 2)), (30, 30), "", (9, 9), [(0, 0, 30, 30)], [(30, 0, 60, 30)])
    pictures = [
        draw_panels(image, (60, 60), rows, "title", "heat")
        for rows in ([[plain]], [[marked]], [[plain], [plain]])
    ]
    sizes = [Image.open(io.BytesIO(picture)).size for picture in pictures]
    assert sizes[0] == sizes[1] and sizes[2][1] > 1.5 * sizes[0][1]
    assert colourful(pictures[1]).sum() > 1.05 * colourful(pictures[0]).sum()


def test_a_field_of_nothing_is_drawn_too():
    panels = [Panel(np.zeros((8, 8)), (1, 1), "none"), Panel(np.eye(8), (1, 1), "some")]
    assert draw_heat(panels, "title", "heat").startswith(b"\x89PNG")


def test_a_missing_matplotlib_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'densezoo\[show\]'"):
        show_pictures.check_matplotlib()

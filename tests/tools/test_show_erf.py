"""The effective receptive field is the mean slope of the middle; squares hold their share."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from densezoo.tools import show_erf
from densezoo.tools.show_erf import centre_of, draw_erf, fill, receptive_fields, square_of
from densezoo.tools.show_model import Subject, build_subject


class Averages(nn.Module):
    """Two maps: averages of 4 x 4 pixels, and squares of the averages of 8 x 8."""

    def forward(self, x):
        return [nn.functional.avg_pool2d(x, 4), nn.functional.avg_pool2d(x, 8) ** 2]


def averages():
    return Subject(
        name="averages", title="averages", model=Averages(), backbone=None, strides=(4, 8),
        weights="none", size=(24, 24), is_fixed=False, mean=(0, 0, 0), std=(0.5, 0.5, 0.5),
        device="cpu",
    )  # fmt: skip


def grey(value, size=(24, 24)):
    return Image.new("RGB", size, (value,) * 3)


def test_it_is_the_mean_over_images_of_the_magnitude_of_the_slope():
    images = [grey(51), grey(102)]
    (linear, squared), count = receptive_fields(averages(), iter(images))
    assert count == 2
    expected = np.zeros((24, 24))
    expected[12:16, 12:16] = 1 / 16
    np.testing.assert_allclose(linear, expected, rtol=1e-6)
    expected = np.zeros((24, 24))
    # The slope of a square is twice its base: 0.4 and 0.8, once normalised.
    expected[8:16, 8:16] = 2 * (0.4 + 0.8) / 2 / 64
    np.testing.assert_allclose(squared, expected, rtol=1e-6)


def test_squares_are_the_smallest_that_hold_a_share():
    field = np.zeros((9, 12))
    field[4, 6] = 0.6
    field[3:6, 5:8] += 0.4 / 9
    assert centre_of(field) == pytest.approx((4.5, 6.5))
    assert square_of(field, (4.5, 6.5), 0.5) <= 1
    # The eight pixels around it are a pixel off.
    assert square_of(field, (4.5, 6.5), 0.99) in (2, 3)
    assert square_of(np.ones((9, 12)), (4.5, 6.0), 1.0) in (11, 12)
    assert square_of(np.zeros((9, 12)), (4.5, 6.0), 0.5) == 0
    assert centre_of(np.zeros((8, 12))) == (4, 6)


@pytest.mark.parametrize("name", ["cas_vit_xs", "biformer_tiny", "resnet10t"])
def test_any_model_has_one(name, monkeypatch):
    words = [] if name == "resnet10t" else ["depths=(1,1,1,1)"]
    subject = build_subject(name, model_kwargs=words)
    drawn = {}
    draw = show_erf.draw_heat
    monkeypatch.setattr(
        show_erf,
        "draw_heat",
        lambda *args: drawn.update(panels=args[0], title=args[1]) or draw(*args),
    )
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    picture = draw_erf(subject, [Image.fromarray(pixels)], (64, 64))
    assert picture.startswith(b"\x89PNG")
    assert [
        f"stride {s}" in p.caption for s, p in zip(subject.strides, drawn["panels"], strict=True)
    ]
    assert "1 image of 64x64 pixels" in drawn["title"] and "random weights" in drawn["title"]
    sides = [panel.own[1][2] - panel.own[1][0] for panel in drawn["panels"]]
    assert sides[-1] > sides[0] > 0
    assert all(
        f"99% in {side:.0f} px" in p.caption for side, p in zip(sides, drawn["panels"], strict=True)
    )


def test_slopes_that_are_not_finite_are_refused():
    subject = build_subject("cas_vit_xs", model_kwargs=["depths=(1,1,1,1)"])
    next(subject.backbone.stages[2].parameters()).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="stage 2 of cas_vit_xs is not finite"):
        draw_erf(subject, [grey(9, (32, 32))], (32, 32))


def test_images_fill_the_size():
    image = Image.new("RGB", (40, 20))
    image.paste((255, 0, 0), (10, 0, 30, 20))
    assert np.asarray(fill(image, (20, 20))).min(axis=(0, 1))[0] == 255
    assert fill(image, (32, 96)).size == (96, 32)


def test_gradients_do_not_reach_the_weights():
    subject = build_subject("cas_vit_xs", model_kwargs=["depths=(1,1,1,1)"])
    receptive_fields(subject, [grey(9, (32, 32))])
    assert all(p.grad is None for p in subject.model.parameters())
    assert torch.is_grad_enabled()

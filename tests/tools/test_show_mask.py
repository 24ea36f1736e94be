"""What is drawn of a mask is the decay of the paths of the model's own decays on the image."""

import numpy as np
import pytest
import torch
from PIL import Image

from densezoo.tools import show_mask
from densezoo.tools.show_attention import Choice, Query
from densezoo.tools.show_mask import draw_mask
from densezoo.tools.show_model import build_subject

POINTS = (Query(0.3, 0.6, True), Query(1.0, 0.0, True))
SMALL = ["num_classes=0", "depths=(1,1,1,2)", "dims=(16,16,32,64)", "num_heads=(2,2,2,4)"]


@pytest.fixture(scope="module")
def photo():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 112, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def panels(monkeypatch):
    """What would be drawn: rows of panels, title and label of the bar."""
    drawn = {}

    def keep(image, size, rows, title, bar):
        drawn.update(size=size, rows=rows, title=title, bar=bar)
        return b"a picture"

    monkeypatch.setattr(show_mask, "draw_panels", keep)
    return drawn


def walk(alpha, beta, start, end, is_row_first):
    """Multiply the decays of the steps from a token to another: alpha along rows, beta columns."""
    (i, j), (k, m) = start, end
    row, column = (i, m) if is_row_first else (k, j)
    product = 1.0
    for t in range(min(j, m) + 1, max(j, m) + 1):
        product *= alpha[row, t]
    for t in range(min(i, k) + 1, max(i, k) + 1):
        product *= beta[t, column]
    return product


def decays_of(subject, image):
    """Decays, (H, W, heads) along rows and columns, of the last block of each stage."""
    found = []
    hooks = [
        stage.blocks[-1].attn.decays.register_forward_hook(
            lambda module, args, out: found.append([x[0].double().exp().numpy() for x in out])
        )
        for stage in subject.backbone.stages
    ]
    with torch.no_grad():
        subject.maps(subject.batch(image))
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", ["ppma_tiny", "rmt_tiny"])
def test_masks_are_the_products_of_decays_along_the_paths(name, photo, panels):
    subject = build_subject(name, model_kwargs=SMALL)
    assert draw_mask(subject, photo, photo, "noise.png", Choice(POINTS, heads=[1])) == b"a picture"
    decays = decays_of(subject, photo)
    assert len(panels["rows"]) == len(decays) == 4 and panels["size"] == (64, 112)
    orders = [True, False] if name == "ppma_tiny" else [True]  # fixed decays: all orders are equal
    for stage, (row, (alpha, beta)) in enumerate(zip(panels["rows"], decays, strict=True)):
        height, width = alpha.shape[:2]
        assert (height, width) == (64 // 2 ** (stage + 2), -(-112 // 2 ** (stage + 2)))
        starts = (int(0.6 * height), int(0.3 * width)), (0, width - 1)
        for start, mask in zip(starts, row[::2], strict=True):
            assert mask.heat.shape == (height, width) and mask.heat[start] == 1
            for end in ((0, 0), (height - 1, 0), (height // 2, width - 1)):
                wanted = np.mean(
                    [walk(alpha[..., 1], beta[..., 1], start, end, order) for order in orders]
                )
                assert mask.heat[end] == pytest.approx(wanted, rel=1e-5)


def test_each_mask_stands_before_the_attention_of_its_point_and_head(photo, panels):
    subject = build_subject("ppma_tiny", model_kwargs=SMALL)
    draw_mask(subject, photo, photo, "noise.png", Choice(POINTS, heads=[1, 0]))
    captions = [[panel.caption for panel in row] for row in panels["rows"]]
    kinds = ["axial, both paths"] * 2 + ["full, both paths"] * 2
    assert len(captions) == 8
    for number, row in enumerate(captions):
        stage, head = number // 2, (1, 0)[number % 2]
        place = f"stage {stage}, block {int(stage == 3)}, head {head}: "
        for i, (mask, attention) in enumerate(zip(row[::2], row[1::2], strict=True)):
            assert mask.startswith(f"{place}mask\npoint {i + 1}, mean ")
            assert attention.startswith(f"{place}{kinds[stage]}\npoint {i + 1}, largest weight ")
    for row in panels["rows"]:
        for panel in row[1::2]:
            assert panel.heat.sum() == pytest.approx(1, abs=1e-4)
        # Both are of the same point.
        assert [panel.point for panel in row[::2]] == [panel.point for panel in row[1::2]]
    words = " ".join(["ppma_tiny", *SMALL])
    assert panels["title"] == (
        f"Polyline masks and attention of {words}, heads 1, 0\n"
        "noise.png at 64x112, random weights (seed 0)"
    )
    assert panels["bar"] == "mask or weight, relative to the largest in the panel"


def test_a_head_that_a_stage_lacks_is_named(photo):
    subject = build_subject("ppma_tiny", model_kwargs=SMALL)
    with pytest.raises(ValueError, match="--head is 2: stage 0 of ppma_tiny has heads 0 to 1"):
        draw_mask(subject, photo, photo, "noise.png", Choice(POINTS, heads=[0, 2]))

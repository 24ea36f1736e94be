"""What is drawn of attention and routing is what the model's blocks computed on the image."""

from math import ceil

import numpy as np
import pytest
import torch
from PIL import Image

from densezoo.tools import show_attention
from densezoo.tools.show_attention import Choice, Query, draw_attention, draw_routing, sum_regions
from densezoo.tools.show_model import build_subject

POINTS = (Query(0.0, 0.0, True), Query(70, 33, False), Query(1.0, 1.0, True))


@pytest.fixture(scope="module")
def photo():
    pixels = np.random.default_rng(0).integers(0, 256, (52, 90, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def panels(monkeypatch):
    """What would be drawn: rows of panels, and the title."""
    drawn = {}

    def keep(image, size, rows, title, bar):
        drawn.update(size=size, rows=rows, title=title)
        return b"a picture"

    monkeypatch.setattr(show_attention, "draw_panels", keep)
    return drawn


def subject_of(name, *words):
    return build_subject(name, model_kwargs=["num_classes=0", *words])


def test_points_are_pixels_or_fractions_of_the_image(photo):
    assert Query.parse("20,30") == Query(20, 30, False)
    assert Query.parse("0.5,1.0") == Query(0.5, 1, True)
    assert Query.parse("44,25").fractions(photo) == (44.5 / 90, 25.5 / 52)
    assert Query.parse(".25, .5").fractions(photo) == (0.25, 0.5)
    for word in ("3", "a,b", "1,2,3", "0.5,1", "1e3,4"):
        with pytest.raises(ValueError, match="--points takes X,Y"):
            Query.parse(word)
    for word in ("1.5,0.5", "-0.1,0.5"):
        with pytest.raises(ValueError, match="outside of the image: fractions"):
            Query.parse(word)
    for word in ("90,0", "0,52", "-1,3"):
        with pytest.raises(ValueError, match="outside of the image, which has 90x52 pixels"):
            Query.parse(word).fractions(photo)


SHALLOW = {
    "nat_mini": ["depths=(1,1,1,2)"],
    "maxvit_tiny": ["depths=(1,1,1,1)"],
    "gc_vit_xxtiny": ["depths=(2,1,1,2)"],
    "faster_vit_0": ["depths=(1,1,2,1)", "window_size=4"],
    "biformer_tiny": ["depths=(1,1,1,1)"],
    "nat_isotropic_small": ["depths=(2,)"],
    "ppma_tiny": ["depths=(1,1,1,1)"],
    "rmt_tiny": ["depths=(1,1,1,1)"],
}
KINDS = {
    "nat_mini": ["neighborhood 7x7"] * 4,
    "maxvit_tiny": ["window 7x7", "grid 7x7"] * 4,
    "gc_vit_xxtiny": [
        "window 7x7, query of all", "window 7x7", "window 14x14", "window 7x7, query of all",
    ],
    "faster_vit_0": ["carriers", "window 4x4 and carriers", "window 4x4"],
    "biformer_tiny": ["1 of 49 regions", "4 of 49 regions", "16 of 49 regions", "all positions"],
    "nat_isotropic_small": ["neighborhood 7x7"],
    "ppma_tiny": ["axial, both paths"] * 2 + ["full, both paths"] * 2,
    "rmt_tiny": ["axial, one path"] * 2 + ["full, one path"] * 2,
}  # fmt: skip


@pytest.mark.parametrize("name", SHALLOW)
def test_every_stage_that_attends_has_a_panel_for_each_point(name, photo, panels):
    subject = subject_of(name, *SHALLOW[name])
    resized = photo.resize((110, 64))
    assert draw_attention(subject, photo, resized, "noise.png", Choice(POINTS)) == b"a picture"
    rows = panels["rows"]
    kinds = [row[0].caption.split("\n")[0].split(": ")[1] for row in rows]
    assert kinds == KINDS[name] and panels["size"] == (64, 110)
    words = " ".join([name, "num_classes=0", *SHALLOW[name]])
    title = f"Attention of {words}, mean of heads\nnoise.png at 64x110, random weights (seed 0)"
    assert panels["title"] == title
    for row in rows:
        stage = int(row[0].caption.split()[1].strip(","))
        stride = subject.strides[stage]
        for i, panel in enumerate(row):
            assert f"point {i + 1}, largest weight" in panel.caption
            assert 0 < panel.heat.sum() < 1 + 1e-5
        # Of the last point, the last cell of the map.
        height, width = (-(-side // stride) * stride for side in (64, 110))
        assert row[2].own == [(width - stride, height - stride, width, height)]
        assert row[2].point == (110, 64)


def test_the_maps_are_those_of_the_chosen_block_and_head(photo, panels):
    subject = subject_of("nat_mini", "depths=(1,1,1,2)")
    resized = photo.resize((110, 64))
    attn = subject.backbone.stages[3].blocks[1].attn
    caught = []
    hook = attn.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    with torch.no_grad():
        subject.maps(subject.batch(resized))
    hook.remove()
    (maps,) = attn.attention_maps(caught[0], size=(2, 4), points=[(1, 3)]).values()
    draw_attention(subject, photo, resized, "noise.png", Choice(POINTS, block=-1, heads=[1]))
    heat = panels["rows"][3][2].heat
    np.testing.assert_allclose(heat, maps.weights[0, 1].numpy(), rtol=1e-6)
    assert not np.allclose(heat, maps.weights[0, 0].numpy(), rtol=1e-3)
    # Maps of 2 x 4 positions are padded to 7 x 7.
    share = show_attention.percent(float(maps.elsewhere[0, 1]))
    assert panels["rows"][3][2].caption.endswith(f"padding {share}")
    assert "stage 3, block 1" in panels["rows"][3][2].caption


def test_each_of_several_heads_has_its_rows(photo, panels):
    subject = subject_of("nat_mini", "depths=(1,1,1,1)")
    resized = photo.resize((64, 64))
    draw_attention(subject, photo, resized, "noise.png", Choice(POINTS, heads=[1]))
    alone = [row[0].heat for row in panels["rows"]]
    draw_attention(subject, photo, resized, "noise.png", Choice(POINTS, heads=[0, 1]))
    assert "heads 0, 1\n" in panels["title"]
    places = [row[0].caption.split(":")[0] for row in panels["rows"]]
    assert places == [f"stage {i}, block 0, head {head}" for i in range(4) for head in (0, 1)]
    for heat, row in zip(alone, panels["rows"][1::2], strict=True):
        np.testing.assert_array_equal(row[0].heat, heat)


def test_a_block_or_head_that_a_stage_lacks_is_named(photo):
    subject = subject_of("nat_mini", "depths=(1,1,1,2)")
    resized = photo.resize((64, 64))
    for choice, message in (
        (Choice(POINTS, block=1), r"--block is 1: stage 0 of nat_mini has blocks 0 to 0"),
        (Choice(POINTS, heads=[0, 2]), r"--head is 2: stage 0 of nat_mini has heads 0 to 1"),
        (Choice(POINTS, heads=[-1]), r"--head is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            draw_attention(subject, photo, resized, "noise.png", choice)


def test_routing_tints_the_regions_routed_to_by_the_attention_they_get(photo, panels):
    subject = subject_of("biformer_tiny", "depths=(1,1,1,1)", "num_regions=4")
    resized = photo.resize((110, 64))
    assert draw_routing(subject, photo, resized, "noise.png", Choice(POINTS)) == b"a picture"
    assert len(panels["rows"]) == 3  # the last stage attends to all
    for row, topk, stride in zip(panels["rows"], (1, 4, 16), (4, 8, 16), strict=True):
        # Regions of the padded map, pixels.
        height, width = (stride * ceil(ceil(side / stride) / 4) for side in (64, 110))
        for panel in row:
            assert panel.heat.shape == (4, 4) and panel.cell == (height, width)
            assert len(set(panel.others)) == topk
            tinted = {(c * width, r * height) for r, c in zip(*panel.heat.nonzero(), strict=True)}
            assert tinted <= {box[:2] for box in panel.others}
        left, top, right, bottom = row[1].own[0]
        x, y = 70.5 / 90 * 110, 33.5 / 52 * 64
        assert left <= x < right and top <= y < bottom and row[1].point == (x, y)
        assert f"{topk} of 4x4 regions" in row[0].caption


def test_shares_of_regions_sum_the_weights_on_them():
    weights = np.arange(15.0).reshape(3, 5)
    shares = sum_regions(weights, (2, 3), (2, 2))
    np.testing.assert_array_equal(shares, [[0 + 1 + 5 + 6, 2 + 3 + 7 + 8, 4 + 9], [21, 25, 14]])


def test_models_without_attention_or_routing_are_refused_by_name():
    choice = Choice(POINTS)
    for name, method, message in (
        ("cas_vit_xs", "attention_maps", "cas_vit_xs has no attention of positions to positions"),
        ("nat_mini", "routed_regions", "nat_mini routes nothing: --show routing takes BiFormer"),
        ("nat_mini", "polyline_masks", "nat_mini has no polyline masks: --show mask takes PPMA"),
    ):
        subject = subject_of(name, "depths=(1,1,1,1)")
        with pytest.raises(ValueError, match=message):
            show_attention.find_modules(subject, choice, method)
    subject = build_subject("resnet10t")
    with pytest.raises(ValueError, match="resnet10t is timm's own"):
        show_attention.find_modules(subject, choice, "attention_maps")

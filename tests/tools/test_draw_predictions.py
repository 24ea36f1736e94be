"""Pictures of predictions, and their description in words."""

import numpy as np
import pytest
from PIL import Image

from densezoo.tools import draw_predictions


def test_boxes_are_drawn_at_their_place_with_their_class_colour():
    image = Image.new("RGB", (400, 400), "black")
    found = draw_predictions.Detections(np.array([[100.0, 200.0, 180.0, 260.0]]), np.array([1]))
    drawn = np.asarray(draw_predictions.draw(image, found, ["a", "b"], [(255, 0, 0), (0, 255, 0)]))
    is_green = (drawn == (0, 255, 0)).all(axis=2)
    assert is_green[200:261, 100].all() and is_green[200:261, 180].all()
    assert is_green[200, 100:181].all() and is_green[260, 100:181].all()
    assert not is_green[203:258, 103:178].any()
    assert not drawn[262:].any() and not drawn[:, :100].any()


def test_the_surest_of_equal_boxes_is_on_top():
    image = Image.new("RGB", (400, 400), "black")
    boxes = np.array([[100.0, 200.0, 180.0, 260.0]] * 2)
    for scores in ([0.9, 0.4], [0.4, 0.9]):
        found = draw_predictions.Detections(boxes, np.array([0, 1]), np.array(scores))
        drawn = np.asarray(
            draw_predictions.draw(image, found, ["a", "b"], [(255, 0, 0), (0, 255, 0)])
        )
        assert drawn[230, 100].tolist() == ([255, 0, 0] if scores[0] > 0.5 else [0, 255, 0])


def test_masks_of_instances_are_tinted():
    image = Image.new("RGB", (400, 400), "black")
    mask = np.zeros((1, 400, 400), bool)
    mask[0, 210:250, 110:170] = True
    found = draw_predictions.Detections(
        np.array([[100.0, 200.0, 180.0, 260.0]]), np.array([0]), np.array([0.9]), mask
    )
    drawn = np.asarray(draw_predictions.draw(image, found, ["a"], [(200, 0, 0)]))
    assert (drawn[210:250, 110:170, 0] > 50).all()
    assert not drawn[252:258, 103:178].any()


def test_label_maps_tint_their_classes_and_leave_the_background():
    image = Image.new("RGB", (400, 384), (100, 100, 100))
    labels = np.zeros((384, 400), np.int64)
    labels[10:50] = 1
    labels[60:90] = 255  # not a class
    classes, palette = ["background", "sky"], [(0, 0, 0), (0, 0, 255)]
    drawn = np.asarray(
        draw_predictions.draw(image, draw_predictions.LabelMap(labels), classes, palette)
    )
    assert (drawn[10:50, :, 2] > 150).all()
    assert (drawn[:10] == 100).all() and (drawn[50:384] == 100).all()
    assert drawn.shape[0] > 384 and (drawn[384:] == palette[1]).all(axis=2).any()


def test_small_images_are_enlarged_and_large_ones_are_not():
    scores = draw_predictions.ClassScores(np.array([0.2, 0.8]))
    classes, palette = ["a", "b"], draw_predictions.make_palette(2)
    small = draw_predictions.draw(Image.new("RGB", (64, 48)), scores, classes, palette)
    large = draw_predictions.draw(Image.new("RGB", (800, 600)), scores, classes, palette)
    assert small.width == 6 * 64 and large.width == 800
    assert small.height - 6 * 48 == large.height - 600 > 0


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (3, 40)], ids=str)
def test_captions_fit_on_pictures_of_any_shape(size):
    image, palette = Image.new("RGB", size), draw_predictions.make_palette(2)
    scores = draw_predictions.ClassScores(np.array([0.9, 0.1]))
    labels = draw_predictions.LabelMap(np.ones(size[::-1], np.int64))
    for prediction in (scores, labels):
        drawn = draw_predictions.draw(image, prediction, ["cat", "dog"], palette)
        assert drawn.width >= 200 and drawn.height > size[1]
    found = draw_predictions.Detections(np.array([[0.0, 0.0, *size]]), np.array([1]))
    assert draw_predictions.draw(image, found, ["cat", "dog"], palette).width >= size[0]


def test_descriptions_name_the_most_important_first():
    classes = ["background", "cat", "dog"]
    scores = draw_predictions.ClassScores(np.array([0.1, 0.2, 0.7]))
    labels = draw_predictions.LabelMap(np.array([[0, 0, 2, 255]]))
    found = draw_predictions.Detections(np.zeros((2, 4)), np.array([2, 1]), np.array([0.91, 0.4]))
    assert draw_predictions.describe(scores, classes) == "dog 70.0 %, cat 20.0 %, background 10.0 %"
    assert draw_predictions.describe(labels, classes) == "background 50.0 %, dog 25.0 %"
    assert draw_predictions.describe(found, classes) == "dog 0.91, cat 0.40"
    assert draw_predictions.describe(found.above(0.95), classes) == "nothing found"


def test_colours_of_classes_differ():
    assert len(set(draw_predictions.make_palette(150))) == 150

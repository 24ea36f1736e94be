"""Predictions on images: what the models say, what is drawn of it, and what is refused."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from densezoo.tools import predict
from densezoo.tools.cli import main
from densezoo.tools.engine.config_files import load_config

CLASSES = "(digit_0,digit_1,digit_2)"
# A width that is no multiple of 32, so that the boxes must be scaled back.
OPTIONS = {
    "cas_vit_xs_8xb128_300e_in1k": [
        "model.num_classes=3",
        "test_dataloader.dataset.input_size=32",
    ],
    "retinanet_cas_vit_xs_fpn_1x_coco": [
        "model.bbox_head.num_classes=3",
        "model.test_cfg.score_thr=0.0",
        "model.test_cfg.max_per_img=5",
        "test_dataloader.dataset.pipeline.1.scale=(96,96)",
        f"test_dataloader.dataset.metainfo.classes={CLASSES}",
    ],
    "fpn_cas_vit_xs_40k_ade20k": [
        "model.decode_head.num_classes=3",
        "test_dataloader.dataset.type=BaseSegDataset",
        "test_dataloader.dataset.pipeline.1.scale=(96,96)",
        f"test_dataloader.dataset.metainfo.classes={CLASSES}",
    ],
}
CLASSIFIER, DETECTOR, SEGMENTER = OPTIONS


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "noise.png"
    pixels = np.random.default_rng(0).integers(0, 256, (48, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Write a checkpoint of each config's model with seeded random weights; name -> path."""
    from mmengine.registry import MODELS, init_default_scope

    folder = tmp_path_factory.mktemp("checkpoints")
    paths = {}
    for name, options in OPTIONS.items():
        cfg = load_config(name, options)
        init_default_scope(cfg.default_scope)
        torch.manual_seed(0)
        paths[name] = folder / f"{name}.pth"
        torch.save({"state_dict": MODELS.build(cfg.model).state_dict()}, paths[name])
    return paths


def make_predictor(name, checkpoints):
    return predict.Predictor(name, checkpoints[name], cfg_options=OPTIONS[name])


def test_detections_are_those_of_mmdet(checkpoints, image):
    from mmdet.apis import inference_detector, init_detector

    cfg = load_config(DETECTOR, OPTIONS[DETECTOR])
    model = init_detector(cfg, str(checkpoints[DETECTOR]), device="cpu")
    expected = inference_detector(model, str(image)).pred_instances
    found = make_predictor(DETECTOR, checkpoints)(predict.read_image(image))
    assert len(found.boxes) == 5
    np.testing.assert_array_equal(found.boxes, expected.bboxes.numpy())
    np.testing.assert_array_equal(found.labels, expected.labels.numpy())
    np.testing.assert_array_equal(found.scores, expected.scores.numpy())


def test_label_map_is_that_of_mmseg(checkpoints, image):
    from mmseg.apis import inference_model, init_model

    cfg = load_config(SEGMENTER, OPTIONS[SEGMENTER])
    cfg.test_pipeline = cfg.test_dataloader.dataset.pipeline  # where mmseg's function looks
    model = init_model(cfg, None, device="cpu")
    model.load_state_dict(torch.load(checkpoints[SEGMENTER])["state_dict"])
    expected = inference_model(model, str(image)).pred_sem_seg.data[0]
    found = make_predictor(SEGMENTER, checkpoints)(predict.read_image(image))
    assert found.labels.shape == (48, 70)
    np.testing.assert_array_equal(found.labels, expected.numpy())


def test_class_scores_are_those_of_timm(checkpoints, image):
    import timm
    from timm.data import create_transform

    weights = torch.load(checkpoints[CLASSIFIER])["state_dict"]
    kwargs = load_config(CLASSIFIER).model.get("model_kwargs", {})
    model = timm.create_model("cas_vit_xs", num_classes=3, **kwargs).eval()
    model.load_state_dict({key.removeprefix("backbone."): v for key, v in weights.items()})
    config = model.pretrained_cfg
    transform = create_transform(
        32, interpolation="bicubic", crop_pct=0.875, mean=config["mean"], std=config["std"]
    )
    with torch.no_grad():
        expected = model(transform(Image.open(image))[None]).softmax(-1)[0]
    predictor = make_predictor(CLASSIFIER, checkpoints)
    found = predictor(predict.read_image(image))
    assert predictor.classes == ["0", "1", "2"]
    np.testing.assert_allclose(found.scores, expected.numpy(), rtol=1e-4)


def test_published_weights_of_a_classifier_are_read(checkpoints, image, tmp_path):
    weights = torch.load(checkpoints[CLASSIFIER])["state_dict"]
    bare = {key.removeprefix("backbone."): v for key, v in weights.items()}
    torch.save({"model": bare}, tmp_path / "published.pth")
    options = OPTIONS[CLASSIFIER]
    published = predict.Predictor(CLASSIFIER, tmp_path / "published.pth", cfg_options=options)
    upright = predict.read_image(image)
    expected = make_predictor(CLASSIFIER, checkpoints)(upright).scores
    np.testing.assert_array_equal(published(upright).scores, expected)


def test_classes_and_colours_come_from_the_checkpoint(checkpoints, tmp_path):
    content = torch.load(checkpoints[SEGMENTER])
    palette = [(1, 2, 3), (4, 5, 6), (7, 8, 9)]
    content["meta"] = {"dataset_meta": {"classes": ("sky", "sea", "sand"), "palette": palette}}
    torch.save(content, tmp_path / "named.pth")
    named = predict.Predictor(SEGMENTER, tmp_path / "named.pth", cfg_options=OPTIONS[SEGMENTER])
    assert named.classes == ["sky", "sea", "sand"]
    assert named.palette == palette


@pytest.mark.parametrize("name", OPTIONS, ids=["classifier", "detector", "segmenter"])
def test_the_command_draws_every_image(name, checkpoints, image, tmp_path, capsys):
    other = tmp_path / "other.jpg"
    predict.read_image(image).save(other)
    words = ["predict", name, str(checkpoints[name]), str(image), str(other)]
    words += ["--out", str(tmp_path / "drawn"), "--score-thr", "0"]
    assert main([*words, "--cfg-options", *OPTIONS[name]]) == 0
    lines = capsys.readouterr().out.splitlines()
    for path in (image, other):
        picture = tmp_path / "drawn" / f"{path.stem}.png"
        assert [line for line in lines if line.startswith(f"{path}: ")][0].endswith(str(picture))
        drawn = Image.open(picture)
        assert drawn.width == 6 * 70 and drawn.height >= 6 * 48


def test_images_are_turned_upright(tmp_path):
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:, :15] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the left side of the file is the top
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    upright = np.asarray(predict.read_image(tmp_path / "turned.png"))
    assert upright.shape == (30, 20, 3)
    assert (upright[:15] == 255).all() and (upright[15:] == 0).all()


def test_boxes_are_drawn_at_their_place_with_their_class_colour():
    image = Image.new("RGB", (400, 400), "black")
    found = predict.Detections(np.array([[100.0, 200.0, 180.0, 260.0]]), np.array([1]))
    drawn = np.asarray(predict.draw(image, found, ["a", "b"], [(255, 0, 0), (0, 255, 0)]))
    is_green = (drawn == (0, 255, 0)).all(axis=2)
    assert is_green[200:261, 100].all() and is_green[200:261, 180].all()
    assert is_green[200, 100:181].all() and is_green[260, 100:181].all()
    assert not is_green[203:258, 103:178].any()
    assert not drawn[262:].any() and not drawn[:, :100].any()


def test_the_surest_of_equal_boxes_is_on_top():
    image = Image.new("RGB", (400, 400), "black")
    boxes = np.array([[100.0, 200.0, 180.0, 260.0]] * 2)
    for scores in ([0.9, 0.4], [0.4, 0.9]):
        found = predict.Detections(boxes, np.array([0, 1]), np.array(scores))
        drawn = np.asarray(predict.draw(image, found, ["a", "b"], [(255, 0, 0), (0, 255, 0)]))
        assert drawn[230, 100].tolist() == ([255, 0, 0] if scores[0] > 0.5 else [0, 255, 0])


def test_masks_of_instances_are_tinted():
    image = Image.new("RGB", (400, 400), "black")
    mask = np.zeros((1, 400, 400), bool)
    mask[0, 210:250, 110:170] = True
    found = predict.Detections(
        np.array([[100.0, 200.0, 180.0, 260.0]]), np.array([0]), np.array([0.9]), mask
    )
    drawn = np.asarray(predict.draw(image, found, ["a"], [(200, 0, 0)]))
    assert (drawn[210:250, 110:170, 0] > 50).all()
    assert not drawn[252:258, 103:178].any()


def test_label_maps_tint_their_classes_and_leave_the_background():
    image = Image.new("RGB", (400, 384), (100, 100, 100))
    labels = np.zeros((384, 400), np.int64)
    labels[10:50] = 1
    labels[60:90] = 255  # not a class
    classes, palette = ["background", "sky"], [(0, 0, 0), (0, 0, 255)]
    drawn = np.asarray(predict.draw(image, predict.LabelMap(labels), classes, palette))
    assert (drawn[10:50, :, 2] > 150).all()
    assert (drawn[:10] == 100).all() and (drawn[50:384] == 100).all()
    assert drawn.shape[0] > 384 and (drawn[384:] == palette[1]).all(axis=2).any()


def test_small_images_are_enlarged_and_large_ones_are_not():
    scores = predict.ClassScores(np.array([0.2, 0.8]))
    classes, palette = ["a", "b"], predict.make_palette(2)
    small = predict.draw(Image.new("RGB", (64, 48)), scores, classes, palette)
    large = predict.draw(Image.new("RGB", (800, 600)), scores, classes, palette)
    assert small.width == 6 * 64 and large.width == 800
    assert small.height - 6 * 48 == large.height - 600 > 0


def test_descriptions_name_the_most_important_first():
    classes = ["background", "cat", "dog"]
    scores = predict.ClassScores(np.array([0.1, 0.2, 0.7]))
    labels = predict.LabelMap(np.array([[0, 0, 2, 255]]))
    found = predict.Detections(np.zeros((2, 4)), np.array([2, 1]), np.array([0.91, 0.4]))
    assert predict.describe(scores, classes) == "dog 70.0 %, cat 20.0 %, background 10.0 %"
    assert predict.describe(labels, classes) == "background 50.0 %, dog 25.0 %"
    assert predict.describe(found, classes) == "dog 0.91, cat 0.40"
    assert predict.describe(found.above(0.95), classes) == "nothing found"


def test_colours_of_classes_differ():
    assert len(set(predict.make_palette(150))) == 150


@pytest.fixture
def wrong(checkpoints, image, tmp_path):
    """Return a command line with everything right, and how to break one part of it."""

    def call(**parts):
        words = {"config": CLASSIFIER, "checkpoint": checkpoints[CLASSIFIER], "image": image}
        words |= parts
        options = ["--out", str(tmp_path / "drawn"), "--cfg-options", *OPTIONS[CLASSIFIER]]
        return main(["predict", *(str(word) for word in words.values()), *options])

    return call


def test_a_missing_image_is_one_line(wrong, tmp_path, capsys):
    assert wrong(image=tmp_path / "none.jpg") == 1
    assert "none.jpg does not exist" in capsys.readouterr().err
    assert not (tmp_path / "drawn").exists()


@pytest.mark.parametrize("content", ["text", "truncated"])
def test_a_damaged_image_is_one_line(content, wrong, image, tmp_path, capsys):
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(b"hello" if content == "text" else image.read_bytes()[:3000])
    assert wrong(image=damaged) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert "damaged.png" in error[-1]
    assert ("is not an image" if content == "text" else "can't be read") in error[-1]


def test_a_missing_config_or_checkpoint_is_one_line(wrong, tmp_path, capsys):
    assert wrong(config="cas_vit_xs_8xb128_300e_in22k") == 1
    assert CLASSIFIER in capsys.readouterr().err
    assert wrong(checkpoint=tmp_path / "none.pth") == 1
    assert "none.pth' does not exist" in capsys.readouterr().err


def test_a_checkpoint_of_another_model_is_one_line(wrong, checkpoints, capsys):
    assert wrong(checkpoint=checkpoints[DETECTOR]) == 1
    assert "is not of this ImageClassifier" in capsys.readouterr().err


def test_pictures_are_not_replaced_unless_asked(image, tmp_path):
    picture = tmp_path / "noise.png"
    picture.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="--overwrite"):
        predict.plan_pictures([image], tmp_path, overwrite=False)
    assert predict.plan_pictures([image], tmp_path, overwrite=True) == [picture]
    with pytest.raises(ValueError, match="is the image itself"):
        predict.plan_pictures([image], image.parent, overwrite=True)
    with pytest.raises(FileExistsError, match="is a file"):
        predict.plan_pictures([image], picture, overwrite=True)


def test_two_images_of_one_name_are_refused(image, tmp_path):
    other = tmp_path / "noise.jpg"
    other.write_bytes(b"")
    with pytest.raises(ValueError, match="both be drawn into"):
        predict.plan_pictures([image, other], tmp_path / "drawn", overwrite=False)


def test_a_score_threshold_out_of_range_is_refused(capsys):
    assert main(["predict", CLASSIFIER, "c.pth", "i.jpg", "--score-thr", "30"]) == 1
    assert "--score-thr is 30.0; it must be from 0 to 1" in capsys.readouterr().err


def test_images_are_opened_without_leaking_files(image):
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    for _ in range(20):
        predict.read_image(image)
    after = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    assert after == before

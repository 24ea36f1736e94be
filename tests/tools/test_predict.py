"""Predictions on images: what the models say, what is drawn of it, and what is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from densezoo.tools import predict, prediction_files
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images in a folder and one below it, with what is no image among them."""
    folder = tmp_path_factory.mktemp("folder")
    generator = np.random.default_rng(1)
    for name in ("b.jpg", "deep/a.png", "deep/b.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        pixels = generator.integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_text("no image")
    return folder


@pytest.fixture(scope="module", params=OPTIONS, ids=["classifier", "detector", "segmenter"])
def written(request, checkpoints, image, folder, tmp_path_factory):
    """What the command wrote of an image and a folder: config, folder of the files, its lines."""
    name, out = request.param, tmp_path_factory.mktemp("drawn")
    words = ["predict", name, str(checkpoints[name]), str(image), str(folder)]
    words += ["--out", str(out), "--score-thr", "0"]
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr(predict.tqdm, "write", lines.append)
        assert main([*words, "--cfg-options", *OPTIONS[name]]) == 0
    return name, out, lines


STEMS = ["noise", "b", "deep/a", "deep/b"]


def test_the_command_draws_every_image(written, image, folder):
    name, out, lines = written
    sources = [image, folder / "b.jpg", folder / "deep/a.png", folder / "deep/b.png"]
    for path, stem, line in zip(sources, STEMS, lines, strict=True):
        assert line.startswith(f"{path}: ") and line.endswith(f"-> {out / stem}.png")
        drawn = Image.open(out / f"{stem}.png")
        with Image.open(path) as original:
            zoom = -(-384 // original.width)
            assert drawn.width == zoom * original.width
            assert drawn.height >= zoom * original.height
    endings = [".png", ".json"] + ["_labels.png"] * (name == SEGMENTER)
    expected = {out / f"{stem}{ending}" for stem in STEMS for ending in endings}
    assert {path for path in out.rglob("*") if path.is_file()} == expected


def test_the_json_holds_the_prediction(written, checkpoints, image):
    name, out, _ = written
    record = json.loads((out / "noise.json").read_text())
    assert record["image"] == str(image) and (record["width"], record["height"]) == (70, 48)
    assert record["config"] == name and record["checkpoint"] == str(checkpoints[name])
    predictor = make_predictor(name, checkpoints)
    found = predictor(predict.read_image(image))
    if name == CLASSIFIER:
        assert record["task"] == "classification"
        assert record["probabilities"] == pytest.approx(found.scores.tolist(), abs=1e-6)
        best = int(found.scores.argmax())
        assert record["top"][0]["label"] == best and record["top"][0]["class"] == str(best)
        assert record["top"][0]["probability"] == record["probabilities"][best]
        assert len(record["top"]) == 3
    elif name == DETECTOR:
        assert record["task"] == "detection" and record["score_thr"] == 0
        objects = record["detections"]
        assert len(objects) == len(found.labels) == 5
        assert [o["score"] for o in objects] == sorted((o["score"] for o in objects), reverse=True)
        for entry, box, label, score in zip(
            objects, found.boxes, found.labels, found.scores, strict=True
        ):
            assert entry["box"] == pytest.approx(box.tolist(), abs=1e-3)
            assert entry["class"] == predictor.classes[label] and entry["label"] == label
            assert entry["score"] == pytest.approx(float(score), abs=1e-6)
            assert "mask" not in entry
    else:
        assert record["task"] == "segmentation" and record["labels"] == "noise_labels.png"
        with Image.open(out / record["labels"]) as labels:
            assert labels.mode == "P"
            np.testing.assert_array_equal(np.asarray(labels), found.labels)
            palette = labels.getpalette()[:9]
        assert palette == [value for colour in predictor.palette for value in colour]
        pixels = {entry["label"]: entry["pixels"] for entry in record["classes"]}
        assert pixels == {
            label: int((found.labels == label).sum()) for label in np.unique(found.labels)
        }
        assert sum(entry["share"] for entry in record["classes"]) == pytest.approx(1, abs=1e-5)


def test_masks_are_written_as_cocos_run_lengths():
    from pycocotools import mask as coco_masks

    masks = np.random.default_rng(0).random((2, 9, 13)) > 0.5
    found = predict.Detections(
        np.array([[0, 1, 12.5, 8], [2, 3, 4, 5]]), np.array([1, 0]), np.array([0.25, 0.5]), masks
    )
    record = json.loads(prediction_files.encode_record(make_record(found)))
    first, second = record["detections"]  # the surest first
    assert first["box"] == [2, 3, 4, 5] and first["class"] == "a" and second["score"] == 0.25
    for entry, mask in zip((first, second), masks[::-1], strict=True):
        assert entry["mask"]["size"] == [9, 13]
        np.testing.assert_array_equal(coco_masks.decode(entry["mask"]), mask)


def make_record(prediction):
    return prediction_files.make_record(prediction, ["a", "b"])


def test_what_is_not_finite_is_not_written():
    with pytest.raises(ValueError, match="not finite"):
        make_record(predict.ClassScores(np.array([0.5, np.nan])))
    box = np.array([[0.0, 0.0, np.inf, 1.0]])
    with pytest.raises(ValueError, match="not finite"):
        make_record(predict.Detections(box, np.array([0]), np.array([0.5])))


def test_label_maps_of_many_classes_have_16_bits(tmp_path):
    labels = np.array([[0, 299], [256, 1]])
    palette = predict.make_palette(300)
    (tmp_path / "labels.png").write_bytes(prediction_files.encode_label_map(labels, palette))
    with Image.open(tmp_path / "labels.png") as image:
        np.testing.assert_array_equal(np.asarray(image), labels)


@pytest.mark.parametrize("name", OPTIONS, ids=["classifier", "detector", "segmenter"])
def test_images_of_any_shape_are_predicted_or_refused_by_name(name, checkpoints, tmp_path, capsys):
    sizes = [(1, 1), (1, 60), (300, 2), (1, 60000)]
    for width, height in sizes:
        Image.new("L", (width, height), 99).save(tmp_path / f"{width}x{height}.png")
    words = ["predict", name, str(checkpoints[name]), str(tmp_path), "--out", str(tmp_path / "out")]
    assert main([*words, "--score-thr", "0", "--cfg-options", *OPTIONS[name]]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "have no prediction" in error and "1x60000" in error
    assert (tmp_path / "out" / "1x1.png").exists() and (tmp_path / "out" / "1x1.json").exists()
    assert json.loads((tmp_path / "out" / "300x2.json").read_text())["width"] == 300
    assert not list((tmp_path / "out").glob("1x60000*"))


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


def test_files_are_not_replaced_unless_asked(image, tmp_path):
    plan = prediction_files.plan_jobs
    for name in ("noise.png", "noise.json", "noise_labels.png"):
        file = tmp_path / name
        file.write_bytes(b"mine")
        with pytest.raises(FileExistsError, match=f"{name} exists; pass --overwrite"):
            plan([image], tmp_path, overwrite=False)
        (job,) = plan([image], tmp_path, overwrite=True)
        assert file in job.files and file.read_bytes() == b"mine"
        file.unlink()
    with pytest.raises(ValueError, match="is the image itself"):
        plan([image], image.parent, overwrite=True)
    (tmp_path / "noise.png").touch()
    with pytest.raises(FileExistsError, match="is a file"):
        plan([image], tmp_path / "noise.png", overwrite=True)


def test_images_that_differ_in_their_endings_keep_them(image, tmp_path):
    other = tmp_path / "noise.jpg"
    Image.new("RGB", (8, 8)).save(other)
    jobs = prediction_files.plan_jobs([image, other], tmp_path / "out", overwrite=False)
    assert [job.picture.name for job in jobs] == ["noise.png.png", "noise.jpg.png"]
    assert [job.record.name for job in jobs] == ["noise.png.json", "noise.jpg.json"]


def test_two_images_of_one_name_are_refused(image, tmp_path):
    other = tmp_path / "noise_labels.jpg"
    Image.new("RGB", (8, 8)).save(other)
    plan, out = prediction_files.plan_jobs, tmp_path / "out"
    with pytest.raises(ValueError, match="would both be written to .*noise_labels.png"):
        plan([image, other], out, overwrite=False)
    # Only a segmenter writes label maps.
    jobs = plan([image, other], out, overwrite=False, label_maps=False)
    assert [job.picture.name for job in jobs] == ["noise.png", "noise_labels.png"]
    with pytest.raises(ValueError, match="would both be written to .*noise.png"):
        plan([image, image], out, overwrite=False)


def test_too_few_names_of_classes_are_named(checkpoints):
    for name in (DETECTOR, SEGMENTER):
        names = "test_dataloader.dataset.metainfo.classes=('sky','sea')"
        with pytest.raises(ValueError, match="has 3 classes and 2 names are known"):
            predict.Predictor(name, checkpoints[name], cfg_options=[*OPTIONS[name], names])


def test_pictures_in_the_folder_of_images_are_no_images(folder, image, tmp_path):
    (tmp_path / "images" / "drawn").mkdir(parents=True)
    for name in ("a.png", "drawn/a.png", "drawn/a.json"):  # as the command left it
        (tmp_path / "images" / name).write_bytes(image.read_bytes())
    images, out = tmp_path / "images", tmp_path / "images" / "drawn"
    (job,) = prediction_files.plan_jobs([images], out, overwrite=True)
    assert (job.image, job.picture) == (images / "a.png", out / "a.png")
    with pytest.raises(ValueError, match="choose another folder with --out"):
        prediction_files.plan_jobs([folder], folder, overwrite=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no image"):
        prediction_files.plan_jobs([tmp_path / "empty"], tmp_path / "out", overwrite=True)


@pytest.fixture
def damaged(folder, image, tmp_path):
    """A folder with two good images and two damaged ones."""
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for name in ("a.png", "d.png"):
        (damaged / name).write_bytes((folder / "deep" / "a.png").read_bytes())
    (damaged / "b.png").write_bytes(b"hello")
    (damaged / "c.png").write_bytes(image.read_bytes()[:3000])
    return damaged


def test_damaged_images_of_a_folder_do_not_cost_the_others(damaged, wrong, tmp_path, capsys):
    assert wrong(image=damaged) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert "2 of 4 images have no prediction" in error[-1] and "(and 1 more" in error[-1]
    assert any("b.png is not an image" in line for line in error[:-1])
    assert any("c.png can't be read" in line for line in error[:-1])
    written = sorted(path.name for path in (tmp_path / "drawn").iterdir())
    assert written == ["a.json", "a.png", "d.json", "d.png"]


def test_named_images_that_are_none_stop_the_command_before_work(
    damaged, image, wrong, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(predict, "Predictor", lambda *args, **kwargs: pytest.fail("built"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)
    assert wrong(image=damaged / "b.png", other=image) == 1
    error = capsys.readouterr().err
    assert "b.png is not an image (and 1 more of the images)" in error and error.count("\n") == 1
    assert wrong(image=image) == 1
    assert "noise.png is too large" in capsys.readouterr().err
    assert not (tmp_path / "drawn").exists()


def test_an_interruption_leaves_whole_files_alone(folder, wrong, monkeypatch, tmp_path, capsys):
    drawn = []

    def draw(image, *rest):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(image)
        return image

    monkeypatch.setattr(predict, "draw", draw)
    assert wrong(image=folder) == 130
    assert "interrupted" in capsys.readouterr().err
    written = {path.relative_to(tmp_path / "drawn").as_posix(): path for path in _files(tmp_path)}
    assert sorted(written) == ["b.json", "b.png", "deep/a.json", "deep/a.png"]
    assert json.loads(written["deep/a.json"].read_text())["width"] == 60


def _files(tmp_path):
    return [path for path in (tmp_path / "drawn").rglob("*") if path.is_file()]


def test_an_unusable_device_is_one_line(capsys):
    for device in ("cuda:99", "tpu9"):
        words = ["predict", CLASSIFIER, "c.pth", "i.jpg", "--device", device]
        assert main(words) == 1
        error = capsys.readouterr().err
        assert f"--device {device} can't be used" in error and error.count("\n") == 1


def test_a_score_threshold_out_of_range_is_refused(capsys):
    assert main(["predict", CLASSIFIER, "c.pth", "i.jpg", "--score-thr", "30"]) == 1
    assert "--score-thr is 30.0; it must be from 0 to 1" in capsys.readouterr().err

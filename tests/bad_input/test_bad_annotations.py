"""Annotations that no run could use stop it before it starts, with their number and a place.

Tables of cases: a change of good annotations, and parts of what the error says.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from mistakes import DETECTOR
from mmengine.config import Config
from PIL import Image

from densezoo.tools.demo_data import CLASSES
from densezoo.tools.engine.annotation_checks import check_annotations


def _coco(root):
    """A good annotation file of four images of 40 x 30 pixels, two categories and four objects."""
    (root / "images").mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (40, 30)).save(root / "images" / f"{i}.png")
    square = [10, 5, 20, 5, 20, 15, 10, 15]
    return {
        "images": [dict(id=i, file_name=f"{i}.png", width=40, height=30) for i in range(4)],
        "categories": [dict(id=1, name="cat"), dict(id=2, name="dog")],
        "annotations": [
            dict(
                id=10 + i,
                image_id=i,
                category_id=1 + i % 2,
                bbox=[10, 5, 10, 10],
                area=100,
                iscrowd=0,
                segmentation=[square],
            )
            for i in range(4)
        ],
    }


def _check_coco(root, content, *, classes=("cat", "dog"), with_mask=True, loader="train", **extra):
    text = content if isinstance(content, (str, bytes)) else json.dumps(content)
    (root / "a.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    load = dict(type="LoadAnnotations", with_bbox=True, with_mask=with_mask)
    dataset = dict(
        type="CocoDataset",
        data_root=str(root),
        ann_file="a.json",
        data_prefix=dict(img="images"),
        metainfo=dict(classes=classes),
        pipeline=[load],
    )
    cfg = {f"{loader}_dataloader": dict(dataset=dataset), "default_scope": "mmdet", **extra}
    return check_annotations(Config(cfg), "train" if loader != "test" else "test")


def _set(key, position, **values):
    """Return a change of an entry of an annotation file."""

    def change(content, root):
        content[key][position].update(values)

    return change


def _drop(key, position, name):
    def change(content, root):
        del content[key][position][name]

    return change


def _replace(key, value):
    def change(content, root):
        content[key] = value

    return change


def _resave(size, **options):
    def change(content, root):
        Image.new("RGB", size).save(root / "images" / "2.png", **options)

    return change


def _turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


RLE = dict(size=[40, 30], counts=[0, 1200])

# A change of the good file, and what stops the run.
COCO_ERRORS = {
    "no-images": (_replace("images", []), "has no images"),
    "no-annotations": (_replace("annotations", []), "has no annotations", "give one"),
    "no-categories": (_replace("categories", []), "has no categories"),
    "images-missing": (lambda content, root: content.pop("images"), "no list of images"),
    "images-dict": (_replace("images", {}), "no list of images", "COCO file"),
    "images-ints": (_replace("images", [1]), "no list of images"),
    "image-id-missing": (_drop("images", 1, "id"), "1 images have no id", "number 1"),
    "image-id-twice": (_set("images", 1, id=0), "1 images have the id of another one", "id 0"),
    "image-width": (_set("images", 1, width=0), "no width and height", "id 1 with 0 x 30"),
    "image-height-missing": (_drop("images", 1, "height"), "id 1 with 40 x None"),
    "image-name-missing": (_drop("images", 3, "file_name"), "images have no file_name", "id 3"),
    "image-size": (_set("images", 2, width=50), "50 x 30 pixels", "2.png", "has 40 x 30"),
    "image-turned": (_resave((40, 30), exif=_turned()), "40 x 30", "has 30 x 40", "EXIF"),
    "category-id-twice": (_set("categories", 1, id=1), "categories have the id of another"),
    "category-name-twice": (_set("categories", 1, name="cat"), "name another one has", "'cat'"),
    "class-missing": (_set("categories", 1, name="wolf"), "lacks 1 of 2 classes", "'dog'", "wolf"),
    "class-order": (
        lambda content, root: content["categories"].reverse(),
        "another order than metainfo.classes",
        "number 0 is 'dog' there and 'cat' here",
    ),
    "id-twice": (_set("annotations", 1, id=10), "1 annotations have the id of another", "id 10"),
    "unknown-image": (_set("annotations", 1, image_id=9), "1 annotations are of images", "id 11"),
    "image-id-str": (_set("annotations", 1, image_id="1"), "image_id '1'", "as they are in images"),
    "unknown-category": (
        _set("annotations", 1, category_id=9),
        "1 annotations are of categories",
        "id 11 of image_id 1, category_id 9",
        "add the categories",
    ),
    "no-box": (_drop("annotations", 2, "bbox"), "no box of four finite numbers", "id 12"),
    "no-area": (_drop("annotations", 2, "area"), "or no area", "id 12"),
    "box-three": (_set("annotations", 2, bbox=[1, 2, 3]), "no box of four", "[1, 2, 3]"),
    "box-words": (_set("annotations", 2, bbox=list("abcd")), "no box of four", "id 12"),
    "box-nan": (_set("annotations", 2, bbox=[1, 2, float("nan"), 4]), "no box of four", "nan"),
    "box-negative": (_set("annotations", 2, bbox=[20, 5, -10, 10]), "negative width", "id 12"),
    "box-outside": (
        _set("annotations", 2, bbox=[50, 5, 10, 10]),
        "1 boxes lie outside their image",
        "id 12 with bbox [50, 5, 10, 10] of image_id 2, which has 40 x 30 pixels",
    ),
    "boxes-of-corners": (_set("annotations", 2, bbox=[30, 5, 38, 10]), "x, y, width, height"),
    "mask-size": (
        _set("annotations", 2, segmentation=RLE),
        "1 masks have another size than their image",
        "size [40, 30], where the image has [30, 40]",
    ),
}


@pytest.mark.parametrize("case", COCO_ERRORS)
def test_a_wrong_annotation_stops_the_run_with_its_count_and_place(case, tmp_path):
    content = _coco(tmp_path)
    change, *parts = COCO_ERRORS[case]
    change(content, tmp_path)
    with pytest.raises(ValueError) as caught:
        _check_coco(tmp_path, content)
    line = str(caught.value)
    assert "\n" not in line
    for part in (f"annotation file {tmp_path}/a.json", *parts):
        assert part in line, line


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", b"\xff\xfe", "[" * 100000], ids=range(6))
def test_a_file_that_is_no_coco_file_is_named(text, tmp_path):
    _coco(tmp_path)
    with pytest.raises(ValueError, match="annotation file .*a.json .*(COCO|JSON)"):
        _check_coco(tmp_path, text)


def test_good_annotations_say_nothing(tmp_path):
    content = _coco(tmp_path)
    content["annotations"][0]["bbox"] = [-0.5, 0, 40.9, 30.5]  # rounded
    content["annotations"][1]["segmentation"] = dict(size=[30, 40], counts=[0, 1200])
    content["images"].append(dict(id=9, file_name="0.png", width=40, height=30))  # no objects
    assert _check_coco(tmp_path, content) == []
    assert _check_coco(tmp_path, content, loader="val") == []
    assert _check_coco(tmp_path, content, classes=("dog",)) == []  # cats are left out on purpose


def test_what_published_data_has_is_counted(tmp_path):
    content = _coco(tmp_path)
    good = content["annotations"][3]
    content["annotations"] += [{**good, "id": 20 + i} for i in range(20)]
    content["annotations"][0]["bbox"] = [10, 5, 0, 10]
    content["annotations"][1]["bbox"] = [10, 5, 33, 10]
    content["annotations"][2]["segmentation"] = [[1, 2, 3, 4]]
    (tmp_path / "images" / "1.png").unlink()
    notes = _check_coco(tmp_path, content)
    assert len(notes) == 4
    for note, part in zip(
        notes, ("id 10 with bbox [10, 5, 0, 10]", "id 11", "id 12", "1.png"), strict=True
    ):
        assert ": 1 " in note and part in note, note
    assert len(_check_coco(tmp_path, content, with_mask=False)) == 3
    with pytest.raises(FileNotFoundError, match="1 of 4 of its images .*1.png; check data_prefix"):
        _check_coco(tmp_path, content, loader="val")
    shutil.rmtree(tmp_path / "images")
    with pytest.raises(FileNotFoundError, match="4 of 4 of its images"):
        _check_coco(tmp_path, content)


def test_a_damaged_image_is_left_to_the_run_which_counts_them(tmp_path):
    content = _coco(tmp_path)
    (tmp_path / "images" / "1.png").write_bytes(b"no image")
    assert _check_coco(tmp_path, content) == []


def test_results_can_be_written_without_annotations(tmp_path):
    content = _coco(tmp_path)
    del content["annotations"]
    metric = dict(type="CocoMetric", format_only=True)
    assert _check_coco(tmp_path, content, loader="test", test_evaluator=metric) == []
    with pytest.raises(ValueError, match="no list of annotations"):
        _check_coco(tmp_path, content, loader="test", test_evaluator=dict(type="CocoMetric"))


def _label_maps(root):
    """Four images of 40 x 30 pixels and their label maps of two classes."""
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (40, 30)).save(root / "images" / f"{i}.jpg")
        labels = np.full((30, 40), i % 2, np.uint8)
        labels[:3] = 255
        Image.fromarray(labels).save(root / "masks" / f"{i}.png")


def _check_label_maps(root, **settings):
    dataset = dict(
        type="BaseSegDataset",
        data_root=str(root),
        data_prefix=dict(img_path="images", seg_map_path="masks"),
        metainfo=dict(classes=("cat", "dog")),
        pipeline=[],
        **settings,
    )
    cfg = Config(dict(default_scope="mmseg", train_dataloader=dict(dataset=dataset)))
    return check_annotations(cfg, "train")


def _save_labels(value, size=(40, 30), mode="L"):
    return lambda root: Image.new(mode, size, value).save(root / "masks" / "2.png")


LABEL_MAP_ERRORS = {
    "missing": (lambda root: (root / "masks/2.png").unlink(), "1 of 4 images", "2.jpg needs"),
    "all-missing": (
        lambda root: shutil.rmtree(root / "masks"),
        "4 of 4 images",
        "seg_map_suffix",
    ),
    "size": (_save_labels(0, (30, 40)), "2.png has 30 x 40 pixels", "2.jpg has 40 x 30"),
    "label": (_save_labels(7), "2.png has the label 7", "up to 1", "metainfo.classes"),
    "colours": (_save_labels((0, 0, 0), mode="RGB"), "2.png is a picture of mode RGB", "L or P"),
    "damaged": (
        lambda root: (root / "masks/2.png").write_bytes(b"no image"),
        "2.png can't be read",
        "replace it",
    ),
}


@pytest.mark.parametrize("case", LABEL_MAP_ERRORS)
def test_a_wrong_label_map_stops_the_run(case, tmp_path):
    _label_maps(tmp_path)
    change, *parts = LABEL_MAP_ERRORS[case]
    change(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        _check_label_maps(tmp_path)
    line = str(caught.value)
    assert "\n" not in line
    for part in parts:
        assert part in line, line


def test_good_label_maps_say_nothing(tmp_path):
    _label_maps(tmp_path)
    assert _check_label_maps(tmp_path) == []
    Image.new("L", (40, 30), 2).save(tmp_path / "masks" / "2.png")
    assert _check_label_maps(tmp_path, reduce_zero_label=True) == []
    with pytest.raises(ValueError, match="label 2"):
        _check_label_maps(tmp_path)


def _detector_options(stage, annotations):
    """The options that point the detector's config at the digits and an annotation file."""
    options = []
    classes = ",".join(f'"{name}"' for name in CLASSES)
    for loader in ("train", "val"):
        dataset = f"{loader}_dataloader.dataset"
        options += [
            f"{dataset}.data_root={stage / 'digits'}",
            f"{dataset}.ann_file={annotations}",
            f"{dataset}.data_prefix.img=images/train",
            f"{dataset}.metainfo.classes=({classes})",
        ]
    options += [f"val_evaluator.ann_file={annotations}", "model.backbone.init_cfg=None"]
    return options


def test_train_and_test_check_annotations_before_they_start(run, stage, tmp_path):
    good = stage / "digits" / "annotations" / "instances_train.json"
    content = json.loads(good.read_text())
    content["annotations"][5]["category_id"] = 99
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps(content))
    options = _detector_options(stage, bad)
    for line, own in (
        (f"train {DETECTOR} --work-dir work", options),
        (
            f"test {DETECTOR} {{stage}}/checkpoints/good.pth --work-dir work",
            [option.replace("val_", "test_") for option in options if "train_data" not in option],
        ),
    ):
        code, said = run(line, own)
        assert code == 1, said
        last = said.strip().splitlines()[-1]
        assert "1 annotations are of categories" in last and "Traceback" not in said
        assert not Path("work").exists()

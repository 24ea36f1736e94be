"""The embedded data set: what its three formats hold, and what it refuses."""

import json

import numpy as np
import pytest
from PIL import Image

from densezoo.tools import demo_data
from densezoo.tools.cli import main

IMAGES = {"train": 16, "val": 4}
SIZE = 64


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return demo_data.make_dataset(
        tmp_path_factory.mktemp("data") / "digits", seed=3, images=IMAGES["train"], size=SIZE
    )


def read_annotations(data, split):
    return json.loads((data / "annotations" / f"instances_{split}.json").read_text())


def load_coco(data, split):
    from pycocotools.coco import COCO

    return COCO(str(data / "annotations" / f"instances_{split}.json"))


def read_files(folder):
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("split", IMAGES)
def test_coco_boxes_are_tight_around_masks_of_the_stated_area(data, split):
    coco = load_coco(data, split)
    assert len(coco.imgs) == IMAGES[split]
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(demo_data.CLASSES)
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation)
        rows, columns = np.nonzero(mask)
        left, top, width, height = annotation["bbox"]
        assert mask.shape == (SIZE, SIZE)
        assert mask.sum() == annotation["area"] > 0
        assert (columns.min(), columns.max()) == (left, left + width - 1)
        assert (rows.min(), rows.max()) == (top, top + height - 1)


@pytest.mark.parametrize("split", IMAGES)
def test_semantic_masks_hold_the_classes_of_the_instances(data, split):
    coco = load_coco(data, split)
    for image_id, image in coco.imgs.items():
        labels = np.asarray(Image.open(data / "masks" / split / f"{image_id:06d}.png"))
        expected = np.zeros((SIZE, SIZE), np.uint8)
        for annotation in coco.imgToAnns[image_id]:
            expected[coco.annToMask(annotation) == 1] = annotation["category_id"]
        is_known = labels != demo_data.IGNORE_INDEX
        assert image["file_name"] == f"{image_id:06d}.jpg"
        np.testing.assert_array_equal(labels[is_known], expected[is_known])
        # What is ignored is the rim of the digits, so none of their own pixels is.
        assert not expected[~is_known].any()
        assert 0 < (~is_known).mean() < 0.2


def test_digits_differ_from_the_ground_under_them(data):
    coco = load_coco(data, "train")
    for annotation in coco.anns.values():
        path = data / "images" / "train" / f"{annotation['image_id']:06d}.jpg"
        luminance = np.asarray(Image.open(path).convert("L"), np.float64)
        left, top, width, height = annotation["bbox"]
        window = (slice(top, top + height), slice(left, left + width))
        is_digit = coco.annToMask(annotation)[window] == 1
        labels = np.asarray(Image.open(data / "masks" / "train" / f"{path.stem}.png"))[window]
        is_ground = labels == 0
        if is_ground.sum() >= 20:
            contrast = luminance[window][is_digit].mean() - luminance[window][is_ground].mean()
            assert abs(contrast) > 30


def test_splits_share_no_digit_and_repeat_none_needlessly(data):
    digits = {
        split: [a["digit_index"] for a in read_annotations(data, split)["annotations"]]
        for split in IMAGES
    }
    assert not set(digits["train"]) & set(digits["val"])
    for indices in digits.values():
        assert len(set(indices)) == len(indices)


def test_annotated_classes_are_those_of_scikit_learn(data):
    from sklearn.datasets import load_digits

    targets = load_digits().target
    for split in IMAGES:
        for annotation in read_annotations(data, split)["annotations"]:
            assert annotation["category_id"] == targets[annotation["digit_index"]] + 1


def test_backgrounds_of_the_splits_are_disjoint():
    from sklearn.datasets import load_sample_images

    for photo in load_sample_images().images:
        train = demo_data._background_region(photo, "train")
        held_out = demo_data._background_region(photo, "val")
        assert train.shape[1] + held_out.shape[1] == photo.shape[1]
        assert np.array_equal(np.concatenate([held_out, train], axis=1), photo)


@pytest.mark.parametrize("split", IMAGES)
def test_class_folders_hold_a_crop_of_every_annotation(data, split):
    from torchvision.datasets import ImageFolder

    folder = ImageFolder(str(data / "classes" / split))
    assert folder.classes == list(demo_data.CLASSES)
    assert set(folder.targets) == set(range(10))
    content = read_annotations(data, split)
    assert len(folder) == len(content["annotations"])
    crops = {path.split("/")[-1]: label for path, label in folder.samples}
    positions = {image["id"]: 0 for image in content["images"]}
    for annotation in content["annotations"]:
        image_id = annotation["image_id"]
        name = f"{image_id:06d}_{positions[image_id]}.jpg"
        positions[image_id] += 1
        assert crops[name] == annotation["category_id"] - 1
    assert folder[0][0].size == (SIZE // 2, SIZE // 2)


def test_timm_reads_the_class_folders(data):
    from timm.data import create_dataset

    dataset = create_dataset("", root=str(data / "classes"), split="val")
    assert list(dataset.reader.class_to_idx) == list(demo_data.CLASSES)
    assert dataset[0][0].size == (SIZE // 2, SIZE // 2)


def test_mmdet_reads_boxes_and_masks(data):
    from mmdet.datasets import CocoDataset
    from mmdet.utils import register_all_modules

    register_all_modules()
    dataset = CocoDataset(
        data_root=str(data),
        ann_file="annotations/instances_train.json",
        data_prefix={"img": "images/train/"},
        metainfo={"classes": demo_data.CLASSES},
        pipeline=[
            {"type": "LoadImageFromFile"},
            {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True},
        ],
    )
    annotations = read_annotations(data, "train")["annotations"]
    first = [a for a in annotations if a["image_id"] == 1]
    sample = dataset[0]
    assert len(dataset) == IMAGES["train"]
    assert sample["gt_bboxes_labels"].tolist() == [a["category_id"] - 1 for a in first]
    assert sample["gt_masks"].masks.sum(axis=(1, 2)).tolist() == [a["area"] for a in first]
    boxes = np.array([a["bbox"] for a in first])
    boxes[:, 2:] += boxes[:, :2]
    np.testing.assert_array_equal(sample["gt_bboxes"].tensor.numpy(), boxes)


def test_mmseg_reads_the_masks(data):
    from mmseg.datasets import BaseSegDataset
    from mmseg.utils import register_all_modules

    register_all_modules()
    dataset = BaseSegDataset(
        data_root=str(data),
        data_prefix={"img_path": "images/val", "seg_map_path": "masks/val"},
        metainfo={"classes": demo_data.SEGMENTATION_CLASSES},
        pipeline=[{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations"}],
    )
    sample = dataset[0]
    labels = np.asarray(Image.open(data / "masks" / "val" / "000001.png"))
    assert len(dataset) == IMAGES["val"]
    assert sample["img"].shape == (SIZE, SIZE, 3)
    np.testing.assert_array_equal(sample["gt_seg_map"], labels)


def test_same_arguments_give_the_same_bytes(data, tmp_path):
    again = demo_data.make_dataset(tmp_path / "again", seed=3, images=16, size=SIZE)
    assert read_files(again) == read_files(data)


def test_another_seed_gives_other_digits(data, tmp_path):
    other = demo_data.make_dataset(tmp_path / "other", seed=4, images=16, size=SIZE)
    for split in IMAGES:
        content = read_annotations(other, split)
        assert content["annotations"] != read_annotations(data, split)["annotations"]


def test_a_folder_it_wrote_is_left_as_it_is(data):
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    assert demo_data.make_dataset(data, seed=3, images=16, size=SIZE) == data
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before


def test_a_folder_it_wrote_with_other_arguments_is_refused(data):
    before = read_files(data)
    with pytest.raises(FileExistsError, match="'seed': 3.*delete it or choose another"):
        demo_data.make_dataset(data, seed=4, images=16, size=SIZE)
    assert read_files(data) == before


def test_a_folder_it_did_not_write_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not written by"):
        demo_data.make_dataset(tmp_path, images=16, size=SIZE)
    assert read_files(tmp_path) == {"thesis.txt": b"mine"}
    with pytest.raises(FileExistsError, match="is a file"):
        demo_data.make_dataset(tmp_path / "thesis.txt", images=16, size=SIZE)


def test_a_folder_with_a_damaged_marker_is_refused(tmp_path):
    (tmp_path / demo_data.MARKER).write_text("{")
    with pytest.raises(FileExistsError, match="damaged"):
        demo_data.make_dataset(tmp_path, images=16, size=SIZE)


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_data, "_write_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        demo_data.make_dataset(tmp_path / "digits", images=16, size=SIZE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"images": 0}, "images is 0; at least 16"),
        ({"size": 0}, "size is 0; it must be 32 to 1024"),
        ({"size": 2048}, "size is 2048"),
    ],
)
def test_arguments_out_of_range_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        demo_data.make_dataset(tmp_path / "digits", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_the_smallest_data_set_shows_every_class(tmp_path):
    data = demo_data.make_dataset(tmp_path / "digits", images=16, size=32)
    for split in IMAGES:
        labels = {a["category_id"] for a in read_annotations(data, split)["annotations"]}
        assert labels == set(range(1, 11))


def test_the_command_reports_a_mistake_in_one_line(tmp_path, capsys):
    assert main(["data", "make", str(tmp_path / "digits"), "--images", "2"]) == 1
    assert capsys.readouterr().err.strip() == (
        "densezoo data: error: images is 2; at least 16 training scenes are needed"
    )


def test_the_command_writes_the_folder(tmp_path, capsys):
    folder = tmp_path / "parent" / "digits"
    assert main(["data", "make", str(folder), "--images", "16", "--size", "32"]) == 0
    assert capsys.readouterr().out == f"{folder}: 16 training and 4 held-out scenes\n"
    assert json.loads((folder / demo_data.MARKER).read_text())["size"] == 32

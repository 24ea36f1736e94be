"""Broken image files: skipped, counted and listed in training, an error in validation."""

import io
import itertools
import json
import tarfile

import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS
from PIL import Image
from small_run import make_runner

from densezoo.tools.cli import main
from densezoo.tools.engine import timm_dataset
from densezoo.tools.engine.errors import RunStopped
from densezoo.tools.engine.seeding import generators_of
from densezoo.tools.engine.unreadable_images import (
    ReadableSamples,
    UnreadableImages,
    UnreadableImagesHook,
    count_images,
    with_readable_samples,
)

CONFIG = "cas_vit_xs_8xb128_300e_in1k"
CLASSES = ("blue", "green", "red")
NUM_IMAGES = 402
_run_numbers = itertools.count()


def _jpeg(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (40, 48, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def _break(path, kind):
    content = path.read_bytes()
    path.unlink()
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("<html>404 Not Found</html>")
    else:  # listed, and not there
        path.symlink_to(path.with_name("nowhere.jpg"))


KINDS = ("truncated", "empty", "text", "missing")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """402 images in three classes, one of each class broken in another way, and one more."""
    monkeypatch.chdir(tmp_path)
    for number in range(NUM_IMAGES):
        path = tmp_path / "data" / "train" / CLASSES[number % 3] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_jpeg(number))
    for label in CLASSES:
        path = tmp_path / "data" / "val" / label / "0.jpg"
        path.parent.mkdir(parents=True)
        path.write_bytes(_jpeg(0))
    return tmp_path / "data"


def _broken(folder):
    paths = [folder / "train" / CLASSES[n % 3] / f"{n}.jpg" for n in (17, 118, 250, 401)]
    for path, kind in zip(paths, KINDS, strict=True):
        _break(path, kind)
    return [str(path) for path in paths]


def _options(folder, num_workers):
    loaders = ("train_dataloader", "val_dataloader", "test_dataloader")
    return [
        "model.model_name=test_convnext",
        "model.num_classes=3",
        "model.drop_path_rate=0.1",
        "model.model_kwargs=None",
        *(f"{loader}.dataset.root={folder}" for loader in loaders),
        *(f"{loader}.dataset.input_size=32" for loader in loaders),
        *(f"{loader}.num_workers={num_workers}" for loader in loaders),
        *(f"{loader}.persistent_workers={num_workers > 0}" for loader in loaders),
        "train_dataloader.batch_size=32",
        # The last batch of an epoch too, so that every image is met.
        "train_dataloader.drop_last=False",
        "optim_wrapper.type=OptimWrapper",
        "optim_wrapper.accumulative_counts=1",
        "train_cfg.max_epochs=1",
        "param_scheduler=None",
        "custom_hooks=None",
    ]


def _train(work_dir, options, *arguments):
    name = f"experiment_name=unreadable{next(_run_numbers)}"
    arguments = ["train", CONFIG, "--seed", 0, "--work-dir", work_dir, *arguments]
    return main([*map(str, arguments), "--cfg-options", *options, name])


def _listed(work_dir):
    lists = [path.read_text().splitlines() for path in work_dir.glob("*/unreadable_images.txt")]
    return [dict(line.split("\t") for line in lines) for lines in lists]


def test_broken_training_images_are_skipped_counted_and_listed(folder, tmp_path, capsys):
    broken = _broken(folder)
    weights = []
    for num_workers in (0, 2):
        work_dir = tmp_path / str(num_workers)
        assert _train(work_dir, _options(folder, num_workers)) == 0
        said = capsys.readouterr().out
        assert f"4 of {NUM_IMAGES} training images could not be read and were skipped" in said
        assert all(path in said.partition("and were skipped: ")[2] for path in broken)
        assert said.count("another one takes its place") == 1, "the first one is told at once"
        assert said.index("another one takes its place") < said.index("and were skipped")
        assert [sorted(names) for names in _listed(work_dir)] == [sorted(broken)]
        weights.append(torch.load(work_dir / "epoch_1.pth", weights_only=False)["state_dict"])
    for key, value in weights[0].items():
        assert torch.equal(value, weights[1][key]), "what replaces an image depends on workers"
    reasons = _listed(tmp_path / "2")[0]
    assert "truncated" in reasons[broken[0]]
    assert "empty" in reasons[broken[1]]
    assert "No such file" in reasons[broken[3]]

    # A run that goes on lists what it had skipped before, though the file was repaired.
    (folder / "train" / CLASSES[118 % 3] / "118.jpg").write_bytes(_jpeg(118))
    options = [*_options(folder, 2), "train_cfg.max_epochs=2"]
    assert _train(tmp_path / "2", options, "--resume") == 0
    assert f"4 of {NUM_IMAGES} training images" in capsys.readouterr().out


def test_more_than_one_percent_stops_the_run(folder, tmp_path, capsys):
    _broken(folder)
    _break(folder / "train" / CLASSES[0] / "0.jpg", "text")
    assert _train(tmp_path / "run", _options(folder, 2)) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"densezoo train: error: 5 of {NUM_IMAGES} training images (1.2%)")
    (listed,) = (tmp_path / "run").glob("*/unreadable_images.txt")
    assert str(listed) in line and len(listed.read_text().splitlines()) == 5
    assert "Traceback" not in line and "--resume" in line


def test_a_broken_validation_image_stops_the_run_with_its_name(folder, tmp_path, capsys):
    broken = folder / "val" / "green" / "0.jpg"
    _break(broken, "truncated")
    assert _train(tmp_path / "run", _options(folder, 2)) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"densezoo train: error: image {broken} of the validation or test data")
    assert "Traceback" not in line and "truncated" in line


def _archive(path, samples):
    with tarfile.open(path, "w") as archive:
        for name, content in samples:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_broken_images_in_a_tar_file_are_replaced(tmp_path):
    images = [(f"{CLASSES[n % 3]}/{n}.jpg", _jpeg(n)) for n in range(200)]
    images[3] = (images[3][0], images[3][1][:300])
    images[7] = (images[7][0], b"")
    _archive(tmp_path / "images.tar", images)
    record = UnreadableImages(tmp_path / "list.txt", 200)
    dataset = timm_dataset(str(tmp_path / "images.tar"), input_size=32)
    dataset = with_readable_samples(dataset, record)
    samples = [dataset[index] for index in range(200)]
    assert {name.rpartition(": ")[2] for name in record.names} == {images[3][0], images[7][0]}
    names = [sample["img_path"] for sample in samples]
    assert not record.names & set(names)
    assert all(name.startswith(str(tmp_path / "images.tar")) for name in names)


@pytest.fixture
def shards(tmp_path):
    """200 images in two shards, two of them broken: the names of these."""
    for shard in range(2):
        samples = []
        for number in range(100):
            content = _jpeg(100 * shard + number)
            content = content[: len(content) // 2] if number == 50 else content
            samples += [(f"{shard}{number:03d}.jpg", content), (f"{shard}{number:03d}.cls", b"1")]
        _archive(tmp_path / f"images-{shard}.tar", samples)
    return [f"{tmp_path}/images-0.tar: 0050", f"{tmp_path}/images-1.tar: 1050"]


def _shard_options(tmp_path, num_workers):
    """Train on the shards, and validate on the images of the folder."""
    return [
        *_options(tmp_path / "data", num_workers),
        "train_dataloader.dataset.name=wds/",
        f"train_dataloader.dataset.root={tmp_path}",
        "train_dataloader.dataset.split=images-{0..1}.tar|200",
    ]


def test_broken_images_in_shards_are_skipped_and_named(folder, tmp_path, shards, capsys):
    assert _train(tmp_path / "run", _shard_options(tmp_path, 2)) == 0
    assert "2 of 200 training images could not be read" in capsys.readouterr().out
    assert [sorted(names) for names in _listed(tmp_path / "run")] == [shards]


def test_too_many_broken_images_in_shards_stop_the_run(folder, tmp_path, shards, capsys):
    options = [*_shard_options(tmp_path, 0), "train_dataloader.dataset.split=images-{0..1}.tar|199"]
    assert _train(tmp_path / "run", options) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("densezoo train: error: 2 of 199 training images")


def test_a_broken_shard_and_broken_validation_shards_stop_the_run(tmp_path, shards):
    options = dict(name="wds/", split="images-{0..1}.tar|200", input_size=32)
    with pytest.raises(RunStopped, match="images-0.tar: 0050 of the validation or test data"):
        list(timm_dataset(str(tmp_path), **options))
    path = tmp_path / "images-1.tar"
    path.write_bytes(path.read_bytes()[:100_000])
    stream = timm_dataset(str(tmp_path), **options, is_training=True)
    with_readable_samples(stream, UnreadableImages(tmp_path / "list.txt", 1000))
    with pytest.raises(RunStopped, match=r"shard \S*images-1.tar can't be read"):
        list(stream)


@pytest.fixture
def annotated(tmp_path):
    """Twenty images with boxes in COCO's format, and with maps of labels."""
    images, annotations = [], []
    (tmp_path / "images").mkdir()
    (tmp_path / "maps").mkdir()
    for number in range(20):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(_jpeg(number))
        labels = np.full((40, 48), number % 2, dtype=np.uint8)
        Image.fromarray(labels).save(tmp_path / "maps" / f"{number}.png")
        images.append(dict(id=number, file_name=f"{number}.jpg", width=48, height=40))
        box = dict(bbox=[4, 4, 20, 20], area=400, iscrowd=0, category_id=1)
        annotations.append(dict(id=number, image_id=number, **box))
    categories = [dict(id=1, name="thing")]
    coco = dict(images=images, annotations=annotations, categories=categories)
    (tmp_path / "boxes.json").write_text(json.dumps(coco))
    return tmp_path


def _coco_config(annotated, transforms=(), **load):
    import mmdet.datasets  # noqa: F401  registers

    return dict(
        type="mmdet.CocoDataset",
        metainfo=dict(classes=("thing",)),
        ann_file=str(annotated / "boxes.json"),
        data_prefix=dict(img=str(annotated / "images")),
        pipeline=[
            dict(type="mmdet.LoadImageFromFile", **load),
            dict(type="mmdet.LoadAnnotations", with_bbox=True),
            *transforms,
        ],
    )


def _coco(annotated, transforms=(), **load):
    pack = dict(type="mmdet.PackDetInputs", meta_keys=("img_path",))
    return DATASETS.build(_coco_config(annotated, [*transforms, pack], **load))


@pytest.mark.parametrize("ignore_empty", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_broken_images_of_a_detection_data_set_are_found(annotated, kind, ignore_empty):
    broken = annotated / "images" / "7.jpg"
    _break(broken, kind)
    record = UnreadableImages(annotated / "list.txt", 200)
    dataset = ReadableSamples(_coco(annotated, ignore_empty=ignore_empty), record)
    with generators_of(1, 2, 3):
        sample = dataset[7]
    with generators_of(1, 2, 3):
        again = dataset[7]
    assert record.names == {str(broken)}
    assert sample["data_samples"].img_path == again["data_samples"].img_path != str(broken)
    assert dataset[8]["data_samples"].img_path == str(annotated / "images" / "8.jpg")
    with pytest.raises(RunStopped, match=f"image {broken} of the validation or test data"):
        ReadableSamples(_coco(annotated, ignore_empty=ignore_empty), None)[7]


@pytest.mark.parametrize("kind", KINDS)
def test_broken_maps_of_a_segmentation_data_set_are_found(annotated, kind):
    import mmseg.datasets  # noqa: F401  registers

    broken = annotated / "maps" / "7.png"
    _break(broken, kind)
    dataset = DATASETS.build(
        dict(
            type="mmseg.BaseSegDataset",
            metainfo=dict(classes=("one", "two")),
            data_prefix=dict(
                img_path=str(annotated / "images"), seg_map_path=str(annotated / "maps")
            ),
            pipeline=[
                dict(type="mmseg.LoadImageFromFile"),
                dict(type="mmseg.LoadAnnotations"),
                dict(type="mmseg.PackSegInputs"),
            ],
        )
    )
    record = UnreadableImages(annotated / "list.txt", 200)
    index = next(
        number
        for number in range(20)
        if dataset.get_data_info(number)["seg_map_path"].endswith("/7.png")
    )
    assert with_readable_samples(dataset, record)[index]["inputs"].shape == (3, 40, 48)
    assert record.names == {str(broken)}


def test_whole_files_with_bytes_after_their_end_are_kept(annotated):
    for number, (folder, suffix) in enumerate((("images", "jpg"), ("maps", "png"))):
        path = annotated / folder / f"{number}.{suffix}"
        path.write_bytes(path.read_bytes() + b"\0\0appended")
    record = UnreadableImages(annotated / "list.txt", 200)
    dataset = ReadableSamples(_coco(annotated), record)
    assert dataset[0]["data_samples"].img_path.endswith("/0.jpg")
    assert not record.names


def test_an_error_that_is_not_the_files_goes_through(annotated):
    wrong = dict(type="mmdet.Resize", scale=(0, 0), keep_ratio=True)
    dataset = ReadableSamples(
        _coco(annotated, [wrong]), UnreadableImages(annotated / "list.txt", 200)
    )
    with pytest.raises(cv2.error, match="resize"):
        dataset[0]
    assert not (annotated / "list.txt").exists()


def test_images_that_others_are_mixed_with_are_guarded_too(annotated):
    for number in range(10):
        _break(annotated / "images" / f"{number}.jpg", KINDS[number % 4])
    repeated = dict(type="RepeatDataset", dataset=_coco_config(annotated), times=5)
    mosaic = dict(type="mmdet.Mosaic", img_scale=(40, 48))
    mixed = DATASETS.build(
        dict(type="mmdet.MultiImageMixDataset", dataset=repeated, pipeline=[mosaic])
    )
    assert count_images(mixed) == 20
    record = UnreadableImages(annotated / "list.txt", 2000)
    dataset = with_readable_samples(mixed, record)
    with generators_of(1, 0):
        for index in range(10, 50):
            dataset[index]
    assert record.names == {str(annotated / "images" / f"{number}.jpg") for number in range(10)}


def test_a_data_set_without_a_readable_image_stops(annotated):
    for number in range(20):
        _break(annotated / "images" / f"{number}.jpg", "empty")
    dataset = ReadableSamples(_coco(annotated), UnreadableImages(annotated / "list.txt", 1_000_000))
    with pytest.raises(RunStopped, match="100 training images in a row"):
        dataset[0]


def test_attributes_called_dataset_need_not_be_one(tmp_path):
    class Named(torch.utils.data.Dataset):
        dataset = None

        def __init__(self, **attributes):
            vars(self).update(attributes)

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return index

    for attributes in (
        dict(dataset="coco"),
        dict(dataset=[1, 2, 3]),
        dict(datasets={"a": 1}),
        dict(datasets=["a", "b"]),
    ):
        dataset = Named(**attributes)
        assert count_images(dataset) == 2
        record = UnreadableImages(tmp_path / "list.txt", 2)
        assert list(map(with_readable_samples(dataset, record).__getitem__, range(2))) == [0, 1]
        assert vars(dataset) == attributes


def test_a_run_that_starts_from_anothers_weights_has_a_list_of_its_own(tmp_path):
    runner = make_runner(tmp_path)
    hook = UnreadableImagesHook(UnreadableImages(tmp_path / "list.txt", 9))
    checkpoint = {"densezoo_unreadable": ["a.jpg"]}
    saved = {}
    hook.after_load_checkpoint(runner, checkpoint)
    hook.before_save_checkpoint(runner, saved)
    assert saved["densezoo_unreadable"] == []
    hook.after_load_checkpoint(make_runner(tmp_path, resume_from=tmp_path / "x.pth"), checkpoint)
    hook.before_save_checkpoint(runner, saved)
    assert saved["densezoo_unreadable"] == ["a.jpg"]

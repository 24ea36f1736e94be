"""Runs that are killed with SIGKILL and resumed end as one that was not, bit for bit.

Every run is a real `python -m densezoo train`, killed where its output shows how far it is and
continued with `--resume`.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

CLASSIFIER = "cas_vit_xs_8xb128_300e_in1k"
SEGMENTER = "fpn_cas_vit_xs_40k_ade20k"
DETECTOR = "mask_rcnn_cas_vit_xs_fpn_1x_coco"
FIGURES = ("accuracy/top1", "mIoU", "coco/bbox_mAP", "coco/segm_mAP")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def _command(config, work_dir, options, *arguments):
    arguments = ["train", config, "--work-dir", str(work_dir), *arguments]
    return [sys.executable, "-m", "densezoo", *arguments, "--cfg-options", *options]


def _run(*arguments):
    """Run to the end, and return what it printed."""
    done = subprocess.run(_command(*arguments), capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


# What a run prints, with the place of its first number (epoch or iteration) and its second one.
_TRAINED = re.compile(r"(?:Epoch\(train\) +\[(\d+)\]\[ *(\d+)|Iter\(train\) +\[ *(\d+))")
_SAVING = re.compile(r"Saving checkpoint at (\d+) (epochs|iterations)")
_VALIDATED = re.compile(r"(?:Epoch|Iter)\(val\)")
ITERS_OF_EPOCH = 5


def _progress(line, before):
    """Return how far a run is, in iterations: + 0.25 when it saves, + 0.5 when it validates."""
    match = _TRAINED.search(line)
    if match:
        epoch, number, iteration = match.groups()
        return int(iteration) if iteration else (int(epoch) - 1) * ITERS_OF_EPOCH + int(number)
    match = _SAVING.search(line)
    if match:
        return int(match[1]) * (ITERS_OF_EPOCH if match[2] == "epochs" else 1) + 0.25
    return int(before) + 0.5 if _VALIDATED.search(line) else before


def _run_until(position, delay, *arguments):
    """Run until the output shows a position, and kill the process `delay` seconds later."""
    process = subprocess.Popen(
        _command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT,
    )
    lines, progress = [], 0
    for line in process.stdout:
        lines.append(line)
        progress = _progress(line, progress)
        if progress >= position:
            time.sleep(delay)
            process.kill()
            assert process.wait() == -signal.SIGKILL, "the run was over before it was killed"
            return
    pytest.fail(f"the run never came to {position}:\n" + "".join(lines)[-3000:])


def _assert_equal(one, two, where=""):
    assert type(one) is type(two), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two), where
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            _assert_equal(one[key], two[key], f"{where}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), where
        for index, (first, second) in enumerate(zip(one, two, strict=True)):
            _assert_equal(first, second, f"{where}/{index}")
    else:
        assert one == two, f"{where}: {one} and {two}"


def _figures(work_dir):
    """Return the validation figures that a run logged, whatever it was killed in between."""
    figures = {}
    for path in work_dir.glob("*/vis_data/scalars.json"):
        # What a kill cut short has no end of line.
        for line in path.read_text().rpartition("\n")[0].splitlines():
            entry = json.loads(line)
            if "loss" not in entry:
                values = {key: entry[key] for key in FIGURES if key in entry}
                figures.setdefault(entry["step"], []).append(values)
    assert all(values == every[0] for every in figures.values() for values in every)
    return {step: every[0] for step, every in figures.items()}


def _assert_same_end(work_dir, expected, name):
    """Check weights, averages, optimizer, schedulers, accumulated gradients and figures."""
    last, best = [], []
    for folder in (work_dir, expected):
        checkpoint = torch.load(folder / name, weights_only=False)
        info = checkpoint["message_hub"]["runtime_info"]
        best.append({key: value for key, value in info.items() if key == "best_score"})
        parts = ("state_dict", "ema_state_dict", "optimizer", "param_schedulers")
        last.append({key: checkpoint[key] for key in parts if key in checkpoint})
        last[-1]["progress"] = checkpoint["densezoo_progress"]
        last[-1]["seed"] = checkpoint["meta"]["seed"]
    _assert_equal(*last)
    _assert_equal(*best)
    assert _figures(work_dir) == _figures(expected) != {}
    assert {p.name for p in work_dir.glob("*.pth")} == {p.name for p in expected.glob("*.pth")}


def _kill_and_resume(tmp_path, config, options, last, points, *, seed=None):
    """Compare a run that is killed at each of `points`, (position, delay), with a whole one.

    Without a seed the run draws its own, and the whole one is given what the checkpoint tells.
    """
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    seeding = [] if seed is None else ["--seed", str(seed)]
    for position, delay in points:
        print(f"kill {delay:.3f} s after position {position}")
        _run_until(position, delay, config, parts, options, *seeding, "--resume")
    _run(config, parts, options, *seeding, "--resume")
    drawn = torch.load(parts / last, weights_only=False)["meta"]["seed"]
    assert seed in (None, drawn)
    _run(config, whole, options, "--seed", str(drawn))
    _assert_same_end(parts, whole, last)


@pytest.fixture
def classifier_options(colours):
    """Three epochs of five iterations with everything that is random or averaged."""
    loaders = ("train_dataloader", "val_dataloader", "test_dataloader")
    return [
        "model.model_name=test_convnext",
        "model.num_classes=3",
        "model.drop_path_rate=0.3",
        "model.model_kwargs=None",
        "model.mixup.mixup_alpha=0.8",
        "model.mixup.cutmix_alpha=1.0",
        "model.random_erasing.probability=0.5",
        "model.random_erasing.mode=pixel",
        "model.loss=None",
        *(f"{loader}.dataset.root={colours / 'folder'}" for loader in loaders),
        *(f"{loader}.dataset.input_size=32" for loader in loaders),
        *(f"{loader}.num_workers=2" for loader in loaders),
        "train_dataloader.batch_size=4",
        "val_dataloader.batch_size=4",
        "optim_wrapper.type=OptimWrapper",
        "optim_wrapper.optimizer.lr=1e-3",
        # Five iterations an epoch: every other checkpoint is within an accumulation.
        "optim_wrapper.accumulative_counts=2",
        "train_cfg.max_epochs=3",
        "param_scheduler.0.end=1",
        "param_scheduler.1.begin=1",
        "param_scheduler.1.end=3",
        "param_scheduler.1.T_max=2",
        "default_hooks.logger.interval=1",
    ]


@pytest.fixture
def segmenter_options(tmp_path):
    """Twelve iterations on nine images with their maps, from which every crop differs."""
    generator = np.random.default_rng(0)
    root = tmp_path / "ade"
    for split, count in (("training", 9), ("validation", 3)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for number in range(count):
            labels = generator.integers(0, 6, (6, 8), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
            noise = generator.integers(0, 60, (*labels.shape, 3), dtype=np.uint8)
            image = noise + 30 * labels[..., None]
            Image.fromarray(image).save(root / "images" / split / f"{number}.jpg")
            Image.fromarray(labels).save(root / "annotations" / split / f"{number}.png")
    loaders = ("train_dataloader", "val_dataloader", "test_dataloader")
    return [
        *(f"{loader}.dataset.data_root={root}" for loader in loaders),
        *(f"{loader}.num_workers=2" for loader in loaders),
        "train_dataloader.batch_size=2",
        "train_dataloader.dataset.pipeline.2.scale=(96,48)",
        "train_dataloader.dataset.pipeline.3.crop_size=(32,32)",
        "val_dataloader.dataset.pipeline.1.scale=(96,48)",
        "model.data_preprocessor.size=(32,32)",
        "model.backbone.drop_path_rate=0.3",
        "model.backbone.model_kwargs.depths=(1,1,1,1)",
        "model.backbone.norm_eval=False",
        "model.backbone.init_cfg=None",
        "model.neck.out_channels=32",
        "model.decode_head.in_channels=[32,32,32,32]",
        "model.decode_head.channels=16",
        "train_cfg.max_iters=12",
        "train_cfg.val_interval=4",
        "default_hooks.checkpoint.interval=3",
        "default_hooks.checkpoint.save_best=mIoU",
        "default_hooks.logger.interval=1",
    ]


def test_a_killed_classifier_without_a_seed_ends_as_one_that_was_not(tmp_path, classifier_options):
    # In the second epoch, then while its end is validated.
    points = [(8, 0.0), (10.5, 0.0)]
    _kill_and_resume(tmp_path, CLASSIFIER, classifier_options, "epoch_3.pth", points)


@pytest.mark.slow
def test_a_killed_segmenter_without_a_seed_ends_as_one_that_was_not(tmp_path, segmenter_options):
    # While the second validation runs; the test below kills it at ten places.
    points = [(8.5, 0.0)]
    _kill_and_resume(tmp_path, SEGMENTER, segmenter_options, "iter_12.pth", points)


SWEEP_SEED = 20261121


def _random_points(num_points, first, last):
    """Draw where to kill, in the order in which a run comes by: steps of it, and delays."""
    print(f"seed {SWEEP_SEED}")
    generator = random.Random(SWEEP_SEED)
    positions = sorted(generator.uniform(first, last) for _ in range(num_points))
    return [(position, generator.uniform(0, 0.1)) for position in positions]


@pytest.mark.slow
def test_ten_random_kills_of_a_classifier_change_nothing(tmp_path, classifier_options):
    options = [*classifier_options, "train_cfg.max_epochs=6", "param_scheduler.1.end=6"]
    # The first one comes before the first checkpoint.
    points = [(2, 0.0), *_random_points(9, 5, 27)]
    _kill_and_resume(tmp_path, CLASSIFIER, options, "epoch_6.pth", points, seed=3)


@pytest.mark.slow
def test_random_kills_within_epochs_change_nothing(tmp_path, classifier_options):
    """Checkpoints count iterations in a loop that counts epochs."""
    options = [
        *classifier_options,
        "default_hooks.checkpoint.by_epoch=False",
        "default_hooks.checkpoint.interval=3",
        "default_hooks.checkpoint.max_keep_ckpts=-1",
    ]
    _kill_and_resume(tmp_path, CLASSIFIER, options, "iter_15.pth", _random_points(4, 3, 13), seed=3)


@pytest.mark.slow
def test_ten_random_kills_of_a_segmenter_change_nothing(tmp_path, segmenter_options):
    options = [*segmenter_options, "train_cfg.max_iters=24", "param_scheduler.0.end=24"]
    points = _random_points(10, 3, 22)
    _kill_and_resume(tmp_path, SEGMENTER, options, "iter_24.pth", points, seed=3)


@pytest.mark.slow
def test_a_killed_detector_ends_as_one_that_was_not(tmp_path):
    """Mask R-CNN draws proposals, and its batches group images by their shape."""
    root = tmp_path / "coco"
    generator = np.random.default_rng(0)
    categories = [dict(id=number, name=f"thing{number}") for number in range(80)]
    coco = dict(images=[], annotations=[], categories=categories)
    (root / "images").mkdir(parents=True)
    for number in range(9):
        height, width = ((64, 96), (96, 64))[number % 2]
        pixels = generator.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{number}.jpg")
        coco["images"].append(
            dict(id=number, file_name=f"{number}.jpg", width=width, height=height)
        )
        for left in (4, 30):
            box = [left, 8, left + 20, 40]
            corners = [box[0], box[1], box[2], box[1], box[2], box[3], box[0], box[3]]
            coco["annotations"].append(
                dict(
                    id=len(coco["annotations"]),
                    image_id=number,
                    category_id=number % 3,
                    bbox=[left, 8, 20, 32],
                    area=640,
                    iscrowd=0,
                    segmentation=[corners],
                )
            )
    (root / "boxes.json").write_text(json.dumps(coco))
    classes = ",".join(f"'thing{number}'" for number in range(80))
    loaders = ("train_dataloader", "val_dataloader", "test_dataloader")
    options = [
        *(f"{loader}.dataset.data_root={root}/" for loader in loaders),
        *(f"{loader}.dataset.ann_file=boxes.json" for loader in loaders),
        *(f"{loader}.dataset.data_prefix.img=images" for loader in loaders),
        *(f"{loader}.dataset.metainfo.classes=({classes})" for loader in loaders),
        *(f"{loader}.num_workers=2" for loader in loaders),
        f"val_evaluator.ann_file={root}/boxes.json",
        f"test_evaluator.ann_file={root}/boxes.json",
        "train_dataloader.batch_size=2",
        "train_dataloader.dataset.pipeline.2.scale=(96,64)",
        "val_dataloader.dataset.pipeline.1.scale=(96,64)",
        "model.backbone.drop_path_rate=0.3",
        "model.backbone.init_cfg=None",
        "model.train_cfg.rcnn.sampler.num=16",
        "train_cfg.max_epochs=2",
        "default_hooks.logger.interval=1",
    ]
    points = [(3, 0.0), (7, 0.1)]
    _kill_and_resume(tmp_path, DETECTOR, options, "epoch_2.pth", points, seed=5)

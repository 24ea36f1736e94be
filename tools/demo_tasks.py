"""The three tasks of ``densezoo demo``: ordinary configs, fitted to the embedded data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .demo_data import CLASSES, SEGMENTATION_CLASSES
from .demo_report import segmentation_palette
from .draw_predictions import make_palette

_SPLITS = {"train": "train", "val": "val", "test": "val"}  # of each loader


@dataclass(frozen=True)
class Schedule:
    """How much is trained, on how much data.

    Attributes:
        images: Training scenes; a quarter as many are held out.
        size: Side of a scene, pixels.
        class_size: Side of the classifier's input, pixels.
        class_epochs: Epochs of the classifier, 2 or more.
        detection_epochs: Epochs of the RetinaNet.
        segmentation_iterations: Iterations of the Semantic FPN.
    """

    images: int = 800
    size: int = 128
    class_size: int = 48
    class_epochs: int = 7
    detection_epochs: int = 3
    segmentation_iterations: int = 400


@dataclass(frozen=True)
class Task:
    """One of the three tasks: an ordinary config, and what fits it to the data.

    Attributes:
        name: Its folder, and the beginning of its steps' names.
        model: What is trained, for the report.
        config: Name of the shipped config.
        options: ``--cfg-options`` of all of its commands.
        train_options: Those of the training alone.
        epochs: Epochs of the training, 1 where iterations count.
        last_checkpoint: Name of the file that the training ends with.
        figures: Key of a figure that ``densezoo test`` measures -> its name and the factor that
            makes it percent; the first is the one that `aim` is for.
        aim: Percent.
        weight: Duration of the training, about seconds on two cores.
    """

    name: str
    model: str
    config: str
    options: tuple[str, ...]
    train_options: tuple[str, ...]
    epochs: int
    last_checkpoint: str
    figures: dict[str, tuple[str, float]]
    aim: float
    weight: float


def make_tasks(out_dir: Path, schedule: Schedule) -> list[Task]:
    """Say how each task's config is fitted to the data."""
    data = (out_dir / "data").as_posix()
    weights = out_dir / "classification" / "training" / f"epoch_{schedule.class_epochs}.pth"
    return [
        _make_classification(data, schedule),
        _make_detection(data, schedule, weights.as_posix()),
        _make_segmentation(data, schedule, weights.as_posix()),
    ]


def _make_classification(data: str, schedule: Schedule) -> Task:
    """Fit the ImageNet recipe to the class folders."""
    epochs = schedule.class_epochs
    options = [f"model.num_classes={len(CLASSES)}", "model.drop_path_rate=0"]
    for loader in _SPLITS:
        options += _loader_options(
            loader, "dataset", root=f"{data}/classes", input_size=schedule.class_size
        )
    # A mirrored digit is another sign; and a short training learns most from mild changes.
    options += _loader_options(
        "train",
        "dataset.transform",
        auto_augment=None,
        hflip=0,
        scale="(0.7,1)",
        ratio="(0.8,1.25)",
        color_jitter=0.2,
    )
    for loader in ("val", "test"):
        options += _loader_options(loader, "dataset.transform", crop_pct=1)
    return Task(
        name="classification",
        model="classifier",
        config="cas_vit_xs_8xb128_300e_in1k",
        options=tuple(options + _process_options()),
        train_options=(
            "train_dataloader.batch_size=32",
            "optim_wrapper.type=OptimWrapper",
            "optim_wrapper.accumulative_counts=1",
            "optim_wrapper.optimizer.lr=2e-3",
            "optim_wrapper.clip_grad.max_norm=5",
            "custom_hooks=[]",
            f"train_cfg.max_epochs={epochs}",
            "param_scheduler.0.end=1",
            "param_scheduler.1.begin=1",
            f"param_scheduler.1.end={epochs}",
            f"param_scheduler.1.T_max={epochs - 1}",
            *_hook_options(),
        ),
        epochs=epochs,
        last_checkpoint=f"epoch_{epochs}.pth",
        figures={"accuracy/top1": ("top-1", 1), "accuracy/top5": ("top-5", 1)},
        aim=95,
        weight=16 * epochs,
    )


def _make_detection(data: str, schedule: Schedule, weights: str) -> Task:
    """Fit RetinaNet's COCO recipe to the scenes and their boxes."""
    epochs, scale = schedule.detection_epochs, f"({schedule.size},{schedule.size})"
    options = [
        f"model.bbox_head.num_classes={len(CLASSES)}",
        # The published head costs ten times the backbone; this one costs as much.
        "model.neck.out_channels=128",
        "model.bbox_head.in_channels=128",
        "model.bbox_head.feat_channels=128",
        "model.bbox_head.stacked_convs=2",
    ]
    for loader, split in _SPLITS.items():
        options += _loader_options(
            loader,
            "dataset",
            data_root=data,
            ann_file=f"annotations/instances_{split}.json",
            **{"data_prefix.img": f"images/{split}/", "metainfo.classes": _tuple(CLASSES)},
        )
    options += _loader_options("train", "dataset.pipeline", **{"2.scale": scale, "3.prob": 0.0})
    options.append(_palette_option(make_palette(len(CLASSES))))
    for loader in ("val", "test"):
        options += [
            f"{loader}_dataloader.dataset.pipeline.1.scale={scale}",
            f"{loader}_dataloader.batch_size=8",
            f"{loader}_evaluator.ann_file={data}/annotations/instances_val.json",
        ]
    return Task(
        name="detection",
        model="RetinaNet",
        config="retinanet_cas_vit_xs_fpn_1x_coco",
        options=tuple(options + _process_options()),
        train_options=(
            f"model.backbone.init_cfg.checkpoint={weights}",
            "train_dataloader.batch_size=8",
            "optim_wrapper.optimizer.lr=5e-4",
            "optim_wrapper.clip_grad.max_norm=5",
            f"train_cfg.max_epochs={epochs}",
            "param_scheduler.0.end=50",
            f"param_scheduler.1.end={epochs}",
            f"param_scheduler.1.milestones=[{epochs - 1}]",
            *_hook_options(),
        ),
        epochs=epochs,
        last_checkpoint=f"epoch_{epochs}.pth",
        figures={"coco/bbox_mAP_50": ("box AP50", 100), "coco/bbox_mAP": ("box AP", 100)},
        aim=40,
        weight=35 * epochs,
    )


def _make_segmentation(data: str, schedule: Schedule, weights: str) -> Task:
    """Fit Semantic FPN's ADE20K recipe to the scenes and their masks."""
    iterations, scale = schedule.segmentation_iterations, f"({schedule.size},{schedule.size})"
    options = [
        f"model.decode_head.num_classes={len(SEGMENTATION_CLASSES)}",
        "model.neck.out_channels=128",
        "model.decode_head.in_channels=[128,128,128,128]",
        "model.decode_head.channels=64",
        f"model.data_preprocessor.size={scale}",
    ]
    for loader, split in _SPLITS.items():
        options += _loader_options(
            loader,
            "dataset",
            type="BaseSegDataset",
            data_root=data,
            **{
                "data_prefix.img_path": f"images/{split}",
                "data_prefix.seg_map_path": f"masks/{split}",
                "metainfo.classes": _tuple(SEGMENTATION_CLASSES),
            },
        )
    options.append(_palette_option(segmentation_palette()))
    options += _loader_options(
        "train",
        "dataset.pipeline",
        **{
            "1.reduce_zero_label": False,
            "2.scale": scale,
            "2.ratio_range": "(0.75,1.5)",
            "3.crop_size": scale,
            "3.cat_max_ratio": 1,  # most of a scene is background
            "4.prob": 0.0,
        },
    )
    for loader in ("val", "test"):
        options += _loader_options(
            loader, "dataset.pipeline", **{"1.scale": scale, "3.reduce_zero_label": False}
        )
        options.append(f"{loader}_dataloader.batch_size=8")
    return Task(
        name="segmentation",
        model="Semantic FPN",
        config="fpn_cas_vit_xs_40k_ade20k",
        options=tuple(options + _process_options()),
        train_options=(
            f"model.backbone.init_cfg.checkpoint={weights}",
            # Nine of ten pixels are background, on which a short training would end.
            f"model.decode_head.loss_decode.class_weight={_class_weights()}",
            "train_dataloader.batch_size=8",
            "optim_wrapper.optimizer.lr=5e-4",
            "optim_wrapper.clip_grad.max_norm=5",
            f"train_cfg.max_iters={iterations}",
            f"train_cfg.val_interval={max(1, iterations // 4)}",
            f"param_scheduler.0.end={iterations}",
            f"default_hooks.checkpoint.interval={max(1, iterations // 4)}",
            *_hook_options(),
        ),
        epochs=1,
        last_checkpoint=f"iter_{iterations}.pth",
        figures={"mIoU": ("mIoU", 1), "aAcc": ("pixel accuracy", 1)},
        aim=50,
        weight=0.28 * iterations,
    )


def _class_weights() -> str:
    """Write the weights of background and digits in the segmenter's loss."""
    return f"[{','.join(['0.2', *('1' for _ in CLASSES)])}]"


def _loader_options(loader: str, part: str, **values: object) -> list[str]:
    """Write options of a part of a loader's config."""
    return [f"{loader}_dataloader.{part}.{key}={value}" for key, value in values.items()]


def _palette_option(palette: Sequence[tuple[int, int, int]]) -> str:
    """Write the option that gives the classes their colours; they go into the checkpoint."""
    colours = ",".join(f"({red},{green},{blue})" for red, green, blue in palette)
    return f"train_dataloader.dataset.metainfo.palette=[{colours}]"


def _process_options() -> list[str]:
    """Write options that load data in the training's own process: two cores have no other."""
    return [
        f"{loader}_dataloader.{option}"
        for loader in _SPLITS
        for option in ("num_workers=0", "persistent_workers=False")
    ]


def _hook_options() -> list[str]:
    """Write options that log often and keep the last checkpoint alone."""
    return ["default_hooks.logger.interval=10", "default_hooks.checkpoint.max_keep_ckpts=1"]


def _tuple(names: Sequence[str]) -> str:
    """Write names as ``--cfg-options`` reads a tuple."""
    return f"({','.join(names)})"

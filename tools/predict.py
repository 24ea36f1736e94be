"""``densezoo predict``: what a checkpoint says of images, drawn on them and as JSON.

Boxes (and masks, where the detector has them), the class of each pixel, or the most probable
classes of the whole image: the config's model decides which. What the files hold is said in
`densezoo.tools.prediction_files`. With ``--show`` it draws what a model does instead: see
`densezoo.tools.show_command`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from tqdm import tqdm

from .._version import __version__
from . import show_command
from .draw_predictions import (
    ClassScores,
    Detections,
    LabelMap,
    Prediction,
    describe,
    draw,
    make_palette,
)
from .durable_files import write_durably
from .prediction_files import (
    Job,
    encode_label_map,
    encode_picture,
    encode_record,
    make_record,
    plan_jobs,
)
from .read_images import UnusableImage, read_image

if TYPE_CHECKING:
    from torch import nn

EXAMPLE = (
    "densezoo predict retinanet_cas_vit_xs_fpn_1x_coco work_dirs/coco/epoch_12.pth street.jpg "
    "more_images --out drawn\n"
    "  densezoo predict --show attention nat_tiny street.jpg --weights nat_tiny.pth "
    "--points 0.5,0.3"
)

_MAX_RESIZED = 2**26  # pixels of an image that a classifier's transform may make


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``densezoo predict``."""
    shows = ",".join(show_command.SHOWS)
    parser.usage = (
        "%(prog)s [options] CONFIG CHECKPOINT IMAGE [IMAGE ...]\n"
        f"       %(prog)s --show {{{shows}}} [options] MODEL IMAGE [IMAGE ...]"
    )
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="a config file, or the name of one; with --show also the name of a model",
    )
    parser.add_argument(
        "words",
        metavar="CHECKPOINT IMAGE",
        nargs="+",
        help="a checkpoint of the config's model (not with --show, which has --weights); image "
        "files, and folders of them",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        default="predictions",
        help="folder of the pictures and JSON files (default: predictions)",
    )
    parser.add_argument(
        "--score-thr",
        type=float,
        default=0.3,
        help="keep detections with at least this score, 0 to 1 (default: 0.3)",
    )
    parser.add_argument(
        "--device", help="where the model runs, as cpu or cuda:1 (default: a GPU if there is one)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace files that are in --out already"
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="change the config, as in training",
    )
    show_command.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Run ``densezoo predict``."""
    if not 0 <= args.score_thr <= 1:
        raise ValueError(f"--score-thr is {args.score_thr}; it must be from 0 to 1")
    if args.show:
        show_command.run(args, [Path(word) for word in args.words], choose_device(args.device))
        return
    for name in show_command.OPTIONS:
        if getattr(args, name) not in (None, []):
            args.parser.error(f"--{name.replace('_', '-')} goes with --show")
    checkpoint, *images = args.words
    if not images:
        args.parser.error("the following arguments are required: IMAGE")
    device = choose_device(args.device)
    jobs = plan_jobs(
        [Path(image) for image in images],
        Path(args.out),
        overwrite=args.overwrite,
        label_maps=_is_segmenter(args.config, args.cfg_options),
    )
    predictor = Predictor(args.config, checkpoint, cfg_options=args.cfg_options, device=device)
    problems = []
    try:
        for job in tqdm(jobs, disable=None):
            try:
                said = predict_to_files(predictor, job, score_thr=args.score_thr)
            except (UnusableImage, FileNotFoundError) as problem:
                text = str(problem)
                problems.append(text if str(job.image) in text else f"{job.image}: {text}")
            else:
                tqdm.write(f"{job.image}: {said} -> {job.picture}")
    finally:  # a full disk or Ctrl-C too is no reason to keep them back
        if problems:
            print("without a prediction:", *problems, sep="\n  ", file=sys.stderr)
    if problems:
        raise ValueError(
            f"{len(problems)} of {len(jobs)} images have no prediction: {problems[0]}"
            + (f" (and {len(problems) - 1} more, listed above)" if len(problems) > 1 else "")
        )


def _is_segmenter(config: str, cfg_options: Sequence[str]) -> bool:
    """Tell whether the model of a config labels pixels."""
    from .engine.config_files import load_config

    return "decode_head" in load_config(config, cfg_options).get("model", {})


def predict_to_files(predictor: Predictor, job: Job, *, score_thr: float) -> str:
    """Predict an image and write its files, each whole or not at all; return it in words.

    Raises:
        FileNotFoundError: The image is gone.
        UnusableImage: It can't be read, or nothing can be predicted of it.
        OSError: A file can't be written.
    """
    image = read_image(job.image)
    prediction = predictor(image)
    record = {
        "image": str(job.image),
        "width": image.width,
        "height": image.height,
        "config": predictor.config,
        "checkpoint": predictor.checkpoint,
        "densezoo": __version__,
    }
    if isinstance(prediction, Detections):
        prediction = prediction.above(score_thr)
        record["score_thr"] = score_thr
    label_map = job.label_map.name if job.label_map else None
    record |= make_record(prediction, predictor.classes, label_map=label_map)
    if isinstance(prediction, LabelMap) and job.label_map:
        write_durably(job.label_map, encode_label_map(prediction.labels, predictor.palette))
    picture = draw(image, prediction, predictor.classes, predictor.palette)
    write_durably(job.picture, encode_picture(picture))
    write_durably(job.record, encode_record(record))
    return describe(prediction, predictor.classes)


def choose_device(name: str | None) -> str:
    """Return a device that works: the one named, or a GPU if there is one.

    Raises:
        ValueError: The one named does not.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--device {name} can't be used: {reason}") from error
    return name


class Predictor:
    """A config's model with the weights of a checkpoint, ready for one image after another.

    Args:
        config: Path or name of a config.
        checkpoint: A checkpoint of ``densezoo train``; for a classifier also a published one.
        cfg_options: ``KEY=VALUE`` options, as in training.
        device: Where the model runs; a GPU if there is one, when None.

    Attributes:
        config: The config, as given.
        checkpoint: The checkpoint, as given.
        classes: Names of the classes, from the checkpoint if it says them.
        palette: A colour (red, green, blue), 0 to 255, for each class.

    Raises:
        FileNotFoundError: The config or the checkpoint does not exist.
        ValueError: One of them can't be read, or they do not belong together.
    """

    def __init__(
        self,
        config: str,
        checkpoint: str | os.PathLike,
        *,
        cfg_options: Sequence[str] = (),
        device: str | None = None,
    ) -> None:
        from mmengine.model import revert_sync_batchnorm
        from mmengine.registry import DATASETS, MODELS, init_default_scope

        from ..backbones.mmlab import read_from_anywhere, read_mmengine_checkpoints_safely
        from .engine.config_files import load_config, walk_dicts

        read_mmengine_checkpoints_safely()
        self.config, self.checkpoint = str(config), str(checkpoint)
        cfg = load_config(config, cfg_options)
        weights = read_from_anywhere(checkpoint)
        init_default_scope(cfg.get("default_scope", "mmengine"))
        try:
            self.model = revert_sync_batchnorm(MODELS.build(cfg.model))
        except (KeyError, TypeError, AssertionError, AttributeError) as error:
            reason = error.args[0] if error.args else type(error).__name__
            raise ValueError(f"the model of {config} can't be built: {reason}") from error
        self._load(weights, checkpoint)
        self.model.to(choose_device(device)).eval()

        dataset = next(
            part
            for _, part in walk_dicts(cfg.test_dataloader.dataset)
            if "pipeline" in part or part["type"] == "TimmDataset"
        )
        self._transform = (
            _classifier_transform(dataset)
            if dataset["type"] == "TimmDataset"
            else _dense_transform(dataset["pipeline"])
        )
        known = {
            **getattr(DATASETS.get(dataset["type"]), "METAINFO", {}),
            **(dataset.get("metainfo") or {}),
            **weights.get("meta", {}).get("dataset_meta", {}),
        }
        self.classes = _class_names(known.get("classes"), self.model)
        num_classes = _count_classes(self.model)
        if num_classes is not None and len(self.classes) < num_classes:
            raise ValueError(
                f"the model has {num_classes} classes and {len(self.classes)} names are known "
                f"({', '.join(self.classes[:3])}, ...); give --cfg-options "
                "test_dataloader.dataset.metainfo.classes=(NAME,NAME,...)"
            )
        palette = known.get("palette")
        is_usable = isinstance(palette, Sequence) and len(palette) == len(self.classes)
        self.palette = (
            [tuple(int(value) for value in colour) for colour in palette]
            if is_usable and not isinstance(palette, str)
            else make_palette(len(self.classes))
        )

    def _load(self, checkpoint: dict, path: str | os.PathLike) -> None:
        """Load the weights, and see that they are this model's."""
        from .engine import checks

        weights = checkpoint.get("state_dict", checkpoint)
        weights = {key.removeprefix("module."): value for key, value in weights.items()}
        is_bare = not any(key.startswith("backbone.") for key in weights)
        if is_bare and hasattr(self.model, "load_backbone"):
            self.model.load_backbone(str(path))
            return
        checks.check_checkpoint(self.model, checkpoint, path)
        # Not strict, since old checkpoints lack counters that are of no use here.
        self.model.load_state_dict(weights, strict=False)

    def __call__(self, image: Image.Image) -> Prediction:
        """Predict what is on an RGB image.

        Raises:
            UnusableImage: It is too narrow for the size that the config's transform gives it.
        """
        import torch

        with torch.no_grad():
            result = self.model.test_step(self._transform(image))[0]
        if isinstance(result, dict):
            return ClassScores(result["pred_scores"].cpu().numpy())
        if "pred_sem_seg" in result:
            return LabelMap(result.pred_sem_seg.data[0].cpu().numpy())
        found = result.pred_instances.cpu()
        masks = found.masks.numpy().astype(bool) if "masks" in found else None
        return Detections(found.bboxes.numpy(), found.labels.numpy(), found.scores.numpy(), masks)


def _classifier_transform(dataset: dict) -> Callable[[Image.Image], dict]:
    """Build what turns an image into a batch of one for the classifier."""
    from timm.data import create_transform
    from torch import as_tensor

    size = dataset.get("input_size", 224)
    options = dataset.get("transform") or {}
    transform = create_transform(input_size=size, is_training=False, normalize=False, **options)
    # What timm scales the short side to before it cuts the middle out.
    short = (size if isinstance(size, int) else min(size[-2:])) / options.get("crop_pct", 0.875)

    def prepare(image: Image.Image) -> dict:
        narrow, wide = sorted(image.size)
        if short**2 * wide / narrow > _MAX_RESIZED and options.get("crop_mode") != "squash":
            raise UnusableImage(
                f"{image.width}x{image.height} pixels are too narrow for this classifier, which "
                f"enlarges the short side to {short:.0f} pixels; cut the image"
            )
        return {"inputs": as_tensor(transform(image))[None]}

    return prepare


def _dense_transform(steps: Sequence[dict]) -> Callable[[Image.Image], dict]:
    """Build what turns an image into a batch of one for a detector or a segmenter."""
    import cv2
    from mmengine.dataset import Compose

    steps = [dict(step) for step in steps if step["type"].split(".")[-1] != "LoadAnnotations"]
    steps[0]["type"] = steps[0]["type"].replace("LoadImageFromFile", "LoadImageFromNDArray")
    pipeline = Compose(steps)

    def transform(image: Image.Image) -> dict:
        try:
            data = pipeline({"img": np.asarray(image)[..., ::-1], "img_id": 0})  # blue comes first
        except (cv2.error, ZeroDivisionError) as error:
            raise UnusableImage(
                f"{image.width}x{image.height} pixels can't be brought to the size that the "
                "config's test pipeline asks for; cut or enlarge the image"
            ) from error
        return {key: [value] for key, value in data.items()}

    return transform


def _count_classes(model: nn.Module) -> int | None:
    """Return the number of classes that a model tells apart; None where it does not say."""
    for path in ("", "decode_head", "bbox_head", "roi_head.bbox_head"):
        part = model
        for name in filter(None, path.split(".")):
            part = getattr(part, name, None)
        if isinstance(getattr(part, "num_classes", None), int):
            return part.num_classes
    return None


def _class_names(known: Sequence[str] | None, model: nn.Module) -> list[str]:
    """Return the names of the classes; a classifier's are ImageNet-1k's or numbers if unknown."""
    if known:
        return [str(name) for name in known]
    num_classes = getattr(model, "num_classes", None)
    if num_classes is None:
        raise ValueError(
            "neither the checkpoint nor the config names the classes; give --cfg-options "
            "test_dataloader.dataset.metainfo.classes=(NAME,NAME,...)"
        )
    if num_classes == 1000:
        from timm.data import ImageNetInfo

        return ImageNetInfo().label_descriptions()
    return [str(label) for label in range(num_classes)]


if __name__ == "__main__":
    from .cli import run_module

    run_module("predict")

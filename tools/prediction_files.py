"""What ``densezoo predict`` writes of an image: a picture, JSON, and the label map of a segmenter.

Of ``street.jpg`` that is ``street.png``, ``street.json`` and ``street_labels.png``, a PNG whose
pixels are class indices (with the classes' colours as its palette; of 16 bits over 256 classes).
Where images of one folder differ in their endings alone the names keep them: ``street.jpg.png``.

The JSON is one object. Sizes and boxes are in pixels of the image, turned upright:

- "image" (path as given), "width", "height"; "config", "checkpoint", "densezoo" (version);
- "task": "classification", "detection" or "segmentation";
- classification: "top", the five most probable classes as {"label", "class", "probability"}, and
  "probabilities", of all classes by label;
- detection: "score_thr" and "detections", the surest first: {"box": [left, top, right, bottom],
  "label", "class", "score"}, and with masks "mask", COCO's compressed run-length encoding
  {"size": [height, width], "counts"} as pycocotools reads it;
- segmentation: "labels", the name of the PNG beside it, and "classes", the most frequent first:
  {"label", "class", "pixels", "share"}.
"""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .draw_predictions import ClassScores, Detections, LabelMap, Prediction, top_classes
from .read_images import UnusableImage, check_header, find_images


@dataclass(frozen=True)
class Job:
    """An image, and the files that are written of it.

    Attributes:
        image: the image.
        is_named: the user named the file itself rather than a folder.
        picture: the image with the prediction drawn on it, PNG.
        record: the prediction, JSON; None where nothing is predicted.
        label_map: the class of each pixel, PNG; None where no segmenter is asked.
    """

    image: Path
    is_named: bool
    picture: Path
    record: Path | None = None
    label_map: Path | None = None

    @property
    def files(self) -> list[Path]:
        return [file for file in (self.picture, self.record, self.label_map) if file]


def plan_jobs(
    paths: Sequence[Path],
    out_dir: Path,
    *,
    overwrite: bool,
    label_maps: bool = True,
    show: str | None = None,
) -> list[Job]:
    """Find the images, and name the files of each, before any work is done.

    Args:
        paths: images and folders; what a folder holds keeps its place within `out_dir`.
        out_dir: folder of the files; as a part of a folder of images it is no source of them.
        overwrite: let files be replaced.
        label_maps: plan label maps, for a segmenter.
        show: plan a picture alone, ``NAME_{show}.png``.

    Raises:
        FileNotFoundError: An image does not exist.
        FileExistsError: A file exists (and `overwrite` is false), or `out_dir` is a file.
        PermissionError: `out_dir` can't be written to.
        ValueError: A named file is no image, a folder holds none, two images would get one file,
            or a file is an image itself.
    """
    sources = _find_sources(paths, out_dir)
    places = {place for _, place, _ in sources}
    stems = Counter(place.with_suffix("") for place in places)
    jobs = []
    for image, place, is_named in sources:
        stem = place.stem if stems[place.with_suffix("")] == 1 else place.name
        if show:
            jobs.append(Job(image, is_named, place.with_name(f"{stem}_{show}.png")))
            continue
        jobs.append(
            Job(
                image,
                is_named,
                picture=place.with_name(f"{stem}.png"),
                record=place.with_name(f"{stem}.json"),
                label_map=place.with_name(f"{stem}_labels.png") if label_maps else None,
            )
        )
    _check_files(jobs, overwrite)
    _check_named([job.image for job in jobs if job.is_named])
    return jobs


def plan_summary(paths: Sequence[Path], picture: Path, *, overwrite: bool) -> list[Path]:
    """Find the images that one picture is made of, before any work is done.

    Args:
        paths: images and folders.
        picture: the file to be written.
        overwrite: let it be replaced.

    Raises:
        OSError, ValueError: as of `plan_jobs`.
    """
    sources = _find_sources(paths, picture.parent)
    _check_file(picture, {image.resolve() for image, _, _ in sources}, overwrite)
    _check_named([image for image, _, is_named in sources if is_named])
    return [image for image, _, _ in sources]


def _find_sources(paths: Sequence[Path], out_dir: Path) -> list[tuple[Path, Path, bool]]:
    """Find the images: each, its place in the output folder, whether it was named itself."""
    if out_dir.exists() and not out_dir.is_dir():
        raise FileExistsError(f"--out {out_dir} is a file; name a folder")
    existing = next(folder for folder in (out_dir, *out_dir.absolute().parents) if folder.exists())
    if not os.access(existing, os.W_OK):
        raise PermissionError(f"--out {out_dir} can't be written to; name another folder")
    sources = []
    for path in paths:
        if path.is_dir():
            if out_dir.exists() and out_dir.samefile(path):
                raise ValueError(f"{path} holds the images; choose another folder with --out")
            sources += [
                (image, out_dir / image.relative_to(path), False)
                for image in find_images(path, beside=out_dir)
            ]
        elif path.exists():
            sources.append((path, out_dir / path.name, True))
        else:
            raise FileNotFoundError(f"image {path} does not exist")
    return sources


def _check_named(images: Sequence[Path]) -> None:
    """Raise for files that the user named and that are no images."""
    problems = [problem for image in images if (problem := _find_problem(image))]
    if problems:
        more = f" (and {len(problems) - 1} more of the images)" if len(problems) > 1 else ""
        raise UnusableImage(problems[0] + more)


def _check_files(jobs: Sequence[Job], overwrite: bool) -> None:
    """Raise where a file would take the place of another one."""
    sources: dict[Path, Path] = {}
    images = {job.image.resolve() for job in jobs}
    for job in jobs:
        for file in job.files:
            if file in sources:
                raise ValueError(
                    f"{sources[file]} and {job.image} would both be written to {file}; predict "
                    "them one by one, with two folders of --out"
                )
            sources[file] = job.image
            _check_file(file, images, overwrite)


def _check_file(file: Path, images: set[Path], overwrite: bool) -> None:
    """Raise where a file is one of the images, or exists and is not to be replaced."""
    if file.exists() and file.resolve() in images:
        raise ValueError(f"{file} is the image itself; choose another folder with --out")
    if file.exists() and not overwrite:
        raise FileExistsError(f"{file} exists; pass --overwrite or another --out")


def _find_problem(image: Path) -> str | None:
    try:
        check_header(image)
    except UnusableImage as problem:
        return str(problem)
    return None


def make_record(
    prediction: Prediction, classes: Sequence[str], *, label_map: str | None = None
) -> dict[str, Any]:
    """Put a prediction into plain JSON values, as the module's docstring says.

    Args:
        prediction: what was predicted.
        classes: names of the classes by label.
        label_map: name of the file with the class of each pixel.

    Raises:
        UnusableImage: a score or a box is not finite.
    """
    if isinstance(prediction, ClassScores):
        scores = _finite(prediction.scores)
        top = [
            {**_name(label, classes), "probability": scores[label]}
            for label in top_classes(prediction.scores)
        ]
        return {"task": "classification", "top": top, "probabilities": scores}
    if isinstance(prediction, LabelMap):
        labels, counts = np.unique(prediction.labels, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        found = [
            {
                **_name(labels[i], classes),
                "pixels": int(counts[i]),
                "share": round(float(counts[i] / prediction.labels.size), 6),
            }
            for i in order
        ]
        return {"task": "segmentation", "labels": label_map, "classes": found}
    return {"task": "detection", "detections": _list_objects(prediction, classes)}


def _list_objects(found: Detections, classes: Sequence[str]) -> list[dict[str, Any]]:
    found = found.take(np.argsort(-found.scores, kind="stable"))
    objects = [
        {"box": _finite(box, digits=3), **_name(label, classes), "score": score}
        for box, label, score in zip(found.boxes, found.labels, _finite(found.scores), strict=True)
    ]
    for entry, mask in zip(objects, () if found.masks is None else found.masks, strict=False):
        entry["mask"] = _encode_mask(mask)
    return objects


def _encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Encode an (H, W) mask of bools as COCO does."""
    from pycocotools import mask as coco_masks

    encoded = coco_masks.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode("ascii")}


def _name(label: int, classes: Sequence[str]) -> dict[str, Any]:
    """Give a class by index and name; an index beyond the classes' has none."""
    return {"label": int(label), "class": classes[label] if label < len(classes) else None}


def _finite(values: np.ndarray, digits: int = 6) -> list[float]:
    if not np.isfinite(values).all():
        raise UnusableImage("the model's output is not finite; take the checkpoint of a sound run")
    return [round(float(value), digits) for value in values]


def encode_record(record: dict[str, Any]) -> bytes:
    """Encode a record as JSON text."""
    return (json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def encode_picture(picture: Image.Image) -> bytes:
    """Encode a picture as PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def encode_label_map(labels: np.ndarray, palette: Sequence[tuple[int, int, int]]) -> bytes:
    """Encode (H, W) class indices as PNG: pixels are indices, coloured where 8 bits hold them."""
    if len(palette) > 256:
        return encode_picture(Image.fromarray(labels.astype(np.uint16)))
    picture = Image.fromarray(labels.astype(np.uint8), mode="P")
    picture.putpalette([value for colour in palette for value in colour])
    return encode_picture(picture)

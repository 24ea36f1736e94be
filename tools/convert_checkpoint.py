"""``densezoo convert``: published checkpoints of detectors, segmenters and classifiers to ours.

Files of mmdet 2.x and mmseg 0.x hold a backbone under the authors' names (``backbone.``) beside
necks and heads, which have kept their names to this day; those of DINO's own repository, such as
FasterViT's detector, have others (``dino_checkpoint.py``). The written file holds all entries of
the config's model and no other, so that ``densezoo test``, ``densezoo predict``, ``load_from`` and
the tools of mmdet and mmseg load it. A classifier's file (``--model``) gets the names of our model.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from .._version import __version__
from ..backbones.base import HierarchicalBackbone
from ..backbones.checkpoints import (
    choose_nest,
    convert_checkpoint,
    read_checkpoint,
    strip_prefixes,
    unwrap_nesting,
)
from ..backbones.registry import Registered, check_model_name, find_backbone
from .dino_checkpoint import is_of_dino_repository, rename_dino
from .train import require_mmengine

EXAMPLE = (
    "densezoo convert maskrcnn_dinat_mini.pth converted.pth "
    "--config mask_rcnn_dinat_mini_fpn_3x_coco\n"
    "  densezoo convert nat_mini.pth converted.pth --model nat_mini"
)

_NUM_SHOWN = 3  # entries of each kind that a message names


@dataclass(frozen=True)
class Conversion:
    """What became of a checkpoint.

    Attributes:
        state_dict: every entry of the model, under its names.
        dialect: the naming that the backbone had, as `KEY_RULES` of its family call it.
        nest: the entry of the file that the weights are from, None if they are not in one.
        others: entries of the file with further weights, such as those before averaging.
        unused: entries of the file that no output of the model depends on; they are left out.
        notes: what was changed beside names, a line each.
    """

    state_dict: dict[str, Tensor]
    dialect: str
    nest: str | None
    others: tuple[str, ...]
    unused: tuple[str, ...]
    notes: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``densezoo convert``."""
    parser.add_argument("source", metavar="SOURCE", help="the published file")
    parser.add_argument("output", metavar="OUTPUT", help="the file to write, .pth")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "--config", help="a config file, or the name of one, whose model the file is of"
    )
    target.add_argument(
        "--model", metavar="NAME", help="the model of densezoo that the file of a classifier is of"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it exists")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="change the config, as in training",
    )


def run(args: argparse.Namespace) -> None:
    """Convert a file and print what became of its entries."""
    source, output = Path(args.source), Path(args.output)
    _check_output(output, source, overwrite=args.overwrite)
    if args.model and args.cfg_options:
        raise ValueError("--cfg-options changes a config: give --config, or leave it out")
    if args.config:
        require_mmengine()
        model = _build_from_config(args.config, args.cfg_options)
    else:
        model = _build_classifier(args.model)
    checkpoint = read_checkpoint(source)
    try:
        conversion = convert(checkpoint, model)
    except ValueError as error:
        raise ValueError(f"{source} is not of {args.config or args.model}: {error}") from error
    _write(
        {
            "meta": {**_dataset_meta(checkpoint), "densezoo_version": __version__},
            "state_dict": conversion.state_dict,
        },
        output,
    )
    print(f"{source}: {len(conversion.state_dict)} entries ({conversion.dialect} names)")
    if conversion.others:
        others = ", ".join(conversion.others)
        print(f"weights are those of {conversion.nest!r}; the file has {others} too")
    for note in conversion.notes:
        print(f"changed: {note}")
    if conversion.unused:
        print(f"left out, as no output depends on them: {_shown(conversion.unused)}")
    print(f"{output}: {output.stat().st_size / 2**20:.1f} MiB")


def _check_output(output: Path, source: Path, *, overwrite: bool) -> None:
    """Raise unless the output can be written without a loss, before any work is done."""
    if output.suffix != ".pth":
        raise ValueError(f"OUTPUT {output} does not end in .pth: name it so")
    if output.is_dir():
        raise IsADirectoryError(f"OUTPUT {output} is a folder: name a file")
    if output.exists() and source.exists() and output.samefile(source):
        raise FileExistsError(f"OUTPUT {output} is SOURCE itself: choose another file")
    if output.exists() and not overwrite:
        raise FileExistsError(f"OUTPUT {output} exists: choose another file, or give --overwrite")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"the folder of OUTPUT {output} does not exist")
    try:
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise type(error)(f"OUTPUT {output} can't be written: {error.strerror}") from error


def _build_from_config(config: str, cfg_options: Sequence[str]) -> nn.Module:
    """Build the model of a config.

    Raises:
        FileNotFoundError, ImportError, ValueError: there is no such config, or its model can't
            be built.
    """
    from mmengine.registry import MODELS, init_default_scope

    from .engine.config_files import load_config, require_keys

    cfg = load_config(config, cfg_options)
    require_keys(cfg, ("model",), "tell the model of a checkpoint")
    init_default_scope(cfg.get("default_scope", "mmengine"))
    try:
        return MODELS.build(cfg.model)
    except (KeyError, TypeError, AssertionError, AttributeError) as error:
        reason = error.args[0] if error.args else type(error).__name__
        raise ValueError(f"the model of {config} can't be built: {reason}") from error


def _build_classifier(name: str) -> HierarchicalBackbone:
    """Build a model of the zoo without memory for its weights.

    Raises:
        ValueError: there is no such model, or it is timm's.
    """
    check_model_name(name)
    registered = find_backbone(name)
    if registered is None:
        raise ValueError(f"--model takes models of densezoo, and {name} is timm's")
    return timm.create_model(registered.name, device="meta")


def convert(checkpoint: Mapping[str, Any], model: nn.Module) -> Conversion:
    """Bring a checkpoint to the names of a model's own entries.

    Args:
        checkpoint: what `read_checkpoint` returned; nested as it may be.
        model: a model of mmdet or mmseg with a ``DenseBackbone``, an ``ImageClassifier``, or a
            classifier of the zoo itself, which gets as many classes as the file has.

    Raises:
        ValueError: the model has no backbone of the zoo; or the checkpoint is not of this model:
            entries are missing, left over or of another shape.
    """
    path, trunk, registered = _find_trunk(model)
    nest, others = choose_nest(checkpoint, registered.cls.checkpoint_nests)
    state = unwrap_nesting(checkpoint, registered.cls.checkpoint_nests)
    state = {key.removeprefix("module."): value for key, value in state.items()}
    # Buffers of mmcv's EMAHook: the weights before averaging, in a file with the average.
    unused = [key for key in state if key.startswith("ema_")]
    state = {key: value for key, value in state.items() if key not in unused}
    notes = []
    if is_of_dino_repository(state):
        state, repeated, notes = rename_dino(state, model, trunk)
        unused += repeated
    is_dense = path not in ("", "backbone")
    body, parts = _split(state, is_dense)
    mapped, report = convert_checkpoint(
        body,
        trunk,
        registered.key_rules,
        first_conv=registered.weights.first_conv,
        in_chans=trunk.in_chans,
    )
    if trunk is model:
        _take_classes(trunk, mapped)
    converted = {_place(key, path): value for key, value in mapped.items()} | parts

    own = model.state_dict()
    extra = [key for key in converted if key not in own]
    dispensable = [key for key in extra if is_dense and _is_dispensable(key, path, model, trunk)]
    left = [key for key in extra if key not in dispensable]
    for key in own:
        if key.endswith("num_batches_tracked"):  # which old files lack, and nothing depends on
            converted.setdefault(key, torch.tensor(0))
    missing = [key for key in own if key not in converted]
    reshaped = [
        f"{key} {tuple(converted[key].shape)} instead of {tuple(value.shape)}"
        for key, value in own.items()
        if key in converted and converted[key].shape != value.shape
    ]
    _check_fit(missing, left, reshaped)
    # A copy each: views of larger tensors would bring those along.
    weights = {key: converted[key].detach().clone() for key in own}
    notes += report.reshaped
    return Conversion(
        weights, report.dialect, nest, tuple(others), (*unused, *dispensable), tuple(notes)
    )


def _split(
    state: Mapping[str, Tensor], is_dense: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Divide entries into those of the backbone, without prefix, and those of other parts.

    Raises:
        ValueError: they are a classifier's where a detector's or segmenter's are wanted
            (`is_dense`), or the other way round.
    """
    body = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    parts = {k: v for k, v in state.items() if not k.startswith("backbone.")}
    if is_dense and not body:
        raise ValueError(
            "no entry is under backbone., as a detector's and a segmenter's are; for the file of "
            "a classifier give --model"
        )
    if body and parts and not is_dense:
        names = sorted({f"{key.split('.')[0]}." for key in parts})
        raise ValueError(
            f"entries are under {', '.join(names)} beside backbone., as a detector's and a "
            "segmenter's are: give --config with that of the model"
        )
    return (body, parts) if is_dense else (strip_prefixes(state), {})


def _find_trunk(model: nn.Module) -> tuple[str, HierarchicalBackbone, Registered]:
    """Find the zoo's model within a model: where it is, itself, and its registration.

    Raises:
        ValueError: there is none.
    """
    name = getattr(getattr(model, "backbone", None), "model_name", None)
    name = name or getattr(model, "model_name", None)
    if isinstance(model, HierarchicalBackbone):
        name = model.pretrained_cfg["architecture"]
    registered = find_backbone(name) if name else None
    trunks = {
        path: part
        for path, part in model.named_modules()
        if isinstance(part, HierarchicalBackbone) and path.split(".")[0] in ("", "backbone")
    }
    if registered is None or not trunks:
        raise ValueError(
            f"the backbone of this {type(model).__name__} is no model of densezoo, whose names "
            "alone are known"
        )
    path, trunk = next(iter(trunks.items()))
    return path, trunk, registered


def _take_classes(classifier: HierarchicalBackbone, mapped: Mapping[str, Tensor]) -> None:
    """Give a classifier as many classes as a checkpoint has."""
    names = classifier.classifier_names()
    weight = mapped.get(f"{names if isinstance(names, str) else names[0]}.weight")
    if weight is not None and len(weight) != classifier.num_classes:
        classifier.reset_classifier(len(weight))


def _place(key: str, path: str) -> str:
    """Name an entry of the backbone as the whole model has it; `path` is where the backbone is."""
    if key.startswith("out_norms."):
        return f"backbone.{key}"
    return f"{path}.{key}" if path else key


def _is_dispensable(key: str, path: str, model: nn.Module, trunk: HierarchicalBackbone) -> bool:
    """Tell whether an entry that a dense model lacks is one that its maps do not depend on.

    Those are the classifier's norm and head, the stages after the last map, and the norms of maps
    that the config does not take.
    """
    norm = re.match(r"backbone\.out_norms\.(\d+)\.", key)
    if norm:
        own = model.backbone.out_norms
        return len(own) > 0 and norm[1] not in own
    inner = key.removeprefix(f"{path}.")
    stage = re.match(r"stages\.(\d+)\.", inner)
    if stage:
        return int(stage[1]) >= len(trunk.stages)
    return inner != key and inner.startswith(("norm.", "head."))


def _shown(entries: Sequence[str]) -> str:
    """Count entries and name the first."""
    more = ", ..." if len(entries) > _NUM_SHOWN else ""
    return f"{len(entries)} entries ({', '.join(entries[:_NUM_SHOWN])}{more})"


def _check_fit(missing: Sequence[str], left: Sequence[str], reshaped: Sequence[str]) -> None:
    """Raise a ValueError that says how a checkpoint differs from what the model has."""
    problems = [
        f"{what}: {_shown(entries)}"
        for entries, what in (
            (missing, "missing"),
            (left, "left over"),
            (reshaped, "of another shape"),
        )
        if entries
    ]
    if problems:
        raise ValueError(
            f"{'; '.join(problems)}; give the config or model that it was trained with (another "
            "number of classes: --cfg-options)"
        )


def _dataset_meta(checkpoint: Mapping[str, Any]) -> dict[str, dict]:
    """Give the names and colours of classes as mmdet 3 and mmseg 1 look for them, where known."""
    meta = checkpoint.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    known = dict(meta.get("dataset_meta") or {})
    for old, new in (("CLASSES", "classes"), ("PALETTE", "palette")):
        if new not in known and isinstance(meta.get(old), (list, tuple)):
            known[new] = meta[old]
    return {"dataset_meta": known} if known else {}


def _write(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint to a file, which is replaced whole or left as it was."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    partial = path.with_name(f".{path.name}.unfinished")
    try:
        with open(partial, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None
        raise


if __name__ == "__main__":
    from .cli import run_module

    run_module("convert")

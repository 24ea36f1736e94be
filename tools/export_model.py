"""``densezoo export``: a model as an ONNX file or a torch.export program, held to the model itself.

In Python, for any model: `export_onnx` and `export_program` of `densezoo.tools.export_files`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import nn

from .._version import __version__
from ..backbones.checkpoints import (
    convert_checkpoint,
    read_checkpoint,
    strip_prefixes,
    unwrap_nesting,
)
from ..backbones.registry import create_with_weights, find_backbone
from ..layers.arguments import check_whole_number
from .count_macs import check_size, first_line, input_size
from .export_files import (
    MAX_DIFFERENCE,
    MIN_OPSET,
    SUFFIXES,
    Comparison,
    ExportError,
    check_onnx_packages,
    check_opset,
    check_path,
    check_shape,
    export_onnx,
    export_program,
    reason_against,
    smallest_size,
)
from .tables import format_table

EXAMPLE = "densezoo export cas_vit_xs cas_vit_xs.onnx --dynamic --checkpoint cas_vit_xs.pth"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``densezoo export``."""
    parser.add_argument(
        "model", metavar="MODEL", help="name of a model of densezoo or timm (or timm:NAME)"
    )
    parser.add_argument("out", metavar="OUT", help="the file to write: .onnx or .pt2")
    parser.add_argument("--dynamic", action="store_true", help="leave batch, height and width open")
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        metavar=("H", "W"),
        help="height and width of the images, pixels; by default what the weights are made for",
    )
    parser.add_argument(
        "--batch", type=int, default=1, metavar="N", help="images at once (default: 1)"
    )
    parser.add_argument(
        "--format", choices=list(SUFFIXES), help="by default what OUT's suffix says"
    )
    parser.add_argument("--checkpoint", metavar="FILE", help="weights; without it they are random")
    parser.add_argument(
        "--features-only", action="store_true", help="the stage maps, without norm and head"
    )
    parser.add_argument(
        "--out-indices",
        nargs="+",
        type=int,
        metavar="I",
        help="stages of --features-only, from 0 (default: all)",
    )
    parser.add_argument(
        "--fuse",
        action=argparse.BooleanOptionalAction,
        help="fold BatchNorm into convolutions (default: for models of densezoo)",
    )
    parser.add_argument(
        "--num-classes", type=int, metavar="N", help="classes (default: the checkpoint's, or 1000)"
    )
    parser.add_argument(
        "--opset",
        type=int,
        metavar="N",
        help=f"version of ONNX's operator set (default: {MIN_OPSET})",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")


def run(args: argparse.Namespace) -> None:
    """Export a model and print how its file compares with it."""
    path, name = Path(args.out), args.model.removeprefix("timm:")
    export_format = args.format or _format_of(path)
    own_size = input_size(name)[1:]
    size = check_size(own_size if args.size is None else tuple(args.size))
    _check_arguments(args, name, export_format)
    check_path(path, overwrite=args.overwrite)
    model = build(
        name,
        size,
        checkpoint=args.checkpoint,
        num_classes=args.num_classes,
        features_only=args.features_only,
        out_indices=args.out_indices,
    ).eval()
    is_fused = find_backbone(name) is not None if args.fuse is None else args.fuse
    if is_fused:
        model.fuse()
    reason = reason_against(model, export_format, dynamic=args.dynamic)
    if reason is not None:
        raise ExportError(f"{name} cannot be exported ({export_format}): {reason}")
    check_shape(model, size, args.batch, args.dynamic)

    options: dict[str, Any] = dict(opset=args.opset or MIN_OPSET) if export_format == "onnx" else {}
    print(
        f"{name}: {args.checkpoint or 'random weights'}, {'fused' if is_fused else 'plain'} norms, "
        + (f"ONNX opset {options['opset']}" if options else "torch.export")
    )
    export = export_onnx if export_format == "onnx" else export_program
    try:
        with contextlib.nullcontext() if args.debug else _quiet():
            comparisons = export(
                model,
                path,
                size=size,
                batch=args.batch,
                dynamic=args.dynamic,
                metadata=_metadata(name, model, size, args.dynamic),
                overwrite=args.overwrite,
                **options,
            )
    except ExportError as error:
        if error.comparisons:
            print(format_comparisons(error.comparisons, export_format))
        raise
    print(_describe_shapes(model, size, args.batch, args.dynamic, export_format))
    print(format_comparisons(comparisons, export_format))
    files = [file for file in (path, path.with_name(f"{path.name}.data")) if file.exists()]
    if export_format == "torch_export" and _has_own_operators(path):
        print("the program calls operators of densezoo: import densezoo before torch.export.load")
    print(", ".join(f"{file}: {file.stat().st_size / 2**20:.1f} MiB" for file in files))


def _format_of(path: Path) -> str:
    for export_format, suffix in SUFFIXES.items():
        if path.suffix == suffix:
            return export_format
    raise ValueError(
        f"{path} ends neither in .onnx nor in .pt2: name it so, or say --format onnx or "
        "--format torch_export"
    )


def _check_arguments(args: argparse.Namespace, name: str, export_format: str) -> None:
    """Raise for arguments that do not go together, before anything is built."""
    if export_format == "onnx":
        check_onnx_packages()
        check_opset(args.opset or MIN_OPSET)
    elif args.opset is not None:
        raise ValueError("--opset belongs to ONNX: leave it out for --format torch_export")
    if args.out_indices is not None and not args.features_only:
        raise ValueError("--out-indices needs --features-only")
    if args.num_classes is not None and args.features_only:
        raise ValueError("--num-classes and --features-only: stage maps have no classes")
    if args.num_classes is not None:
        check_whole_number("--num-classes", args.num_classes, 0)
    check_whole_number("--batch", args.batch, 1)
    if args.fuse and not find_backbone(name):
        raise ValueError(f"--fuse takes models of densezoo, and {name} is timm's")


def build(
    name: str,
    size: tuple[int, int],
    *,
    checkpoint: str | os.PathLike | None = None,
    num_classes: int | None = None,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
) -> nn.Module:
    """Build a model of densezoo or timm, with a checkpoint's weights or random ones.

    Args:
        name: as `timm.create_model` takes it.
        size: height and width, pixels, for models of timm that are built for one size.
        checkpoint: a file of weights.
        num_classes: classes; those of the checkpoint, or 1000, if None.
        features_only: build it without norm and head, to return stage maps.
        out_indices: the stages of `features_only`; all if None.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: the model cannot be built so, or the checkpoint is of another model or has
            another classifier.
    """
    arguments: dict[str, Any] = {}
    if features_only:
        arguments["features_only"] = True
        if out_indices is not None:
            arguments["out_indices"] = tuple(out_indices)
    elif num_classes is not None:
        arguments["num_classes"] = num_classes
    cfg = get_pretrained_cfg(name)
    if cfg.fixed_input_size and tuple(size) != tuple(cfg.input_size[1:]):
        arguments["img_size"] = tuple(size)
    try:
        if checkpoint is None:
            return timm.create_model(name, **arguments)
        content = read_checkpoint(checkpoint)
        if not features_only:
            arguments["num_classes"] = _num_classes(name, content, checkpoint, num_classes)
        return create_with_weights(name, content, arguments)
    except (RuntimeError, TypeError, AssertionError) as error:
        wanted = ", ".join(f"{key}={value}" for key, value in arguments.items())
        raise ValueError(f"{name} cannot be built with {wanted}: {first_line(error)}") from error


def _num_classes(
    name: str, content: Mapping, checkpoint: str | os.PathLike, wanted: int | None
) -> int | None:
    """Take the number of classes from a checkpoint, so that no classifier of noise is exported."""
    if wanted == 0:
        return 0
    registered = find_backbone(name)
    if registered:
        fresh = timm.create_model(registered.name, device="meta")
        state, _ = convert_checkpoint(
            content,
            fresh,
            registered.key_rules,
            first_conv=registered.weights.first_conv,
        )
        layers = fresh.classifier_names()
    else:
        state, layers = strip_prefixes(unwrap_nesting(content)), get_pretrained_cfg(name).classifier
    layer = layers if isinstance(layers, str) else layers[0]
    weight = state.get(f"{layer}.weight")
    if weight is None:
        raise ValueError(
            f"{checkpoint} holds no classifier ({layer}): export it with --features-only, or with "
            "--num-classes 0"
        )
    if wanted is not None and wanted != len(weight):
        raise ValueError(
            f"{checkpoint} has {len(weight)} classes, not {wanted}: leave --num-classes out"
        )
    return len(weight)


def _metadata(name: str, model: nn.Module, size: tuple[int, int], dynamic: bool) -> dict[str, str]:
    """Say in an exported file what it is, and how images are prepared for it."""
    cfg = get_pretrained_cfg(name)
    metadata = {
        "densezoo_version": __version__,
        "model": name,
        "mean": json.dumps(cfg.mean),
        "std": json.dumps(cfg.std),
        "size": json.dumps(size),
        "smallest_size": json.dumps([smallest_size(model)] * 2 if dynamic else size),
    }
    num_classes = getattr(model, "num_classes", None)
    return metadata if num_classes is None else {**metadata, "num_classes": str(num_classes)}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep exporters' progress and advice off the terminal."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _has_own_operators(path: Path) -> bool:
    """Whether a program of torch.export calls what is registered when densezoo is imported."""
    with zipfile.ZipFile(path) as archive:
        graphs = [name for name in archive.namelist() if name.endswith(".json")]
        return any(b"torch.ops.densezoo." in archive.read(name) for name in graphs)


def _describe_shapes(
    model: nn.Module, size: tuple[int, int], batch: int, dynamic: bool, export_format: str
) -> str:
    """Say which images an exported file takes, and what becomes of others."""
    if not dynamic:
        return (
            f"images: batch {batch}, {size[0]}x{size[1]} pixels; others are refused when it runs "
            "(--dynamic leaves them open)"
        )
    least = smallest_size(model)
    outside = (
        "onnxruntime does not check that, and what it says of smaller ones is not verified"
        if export_format == "onnx"
        else "smaller ones are refused when it runs"
    )
    return f"images: any batch, height and width from {least} pixels; {outside}"


def format_comparisons(comparisons: Sequence[Comparison], export_format: str) -> str:
    """Format comparisons as a table, and the threads that the times were taken on."""
    runner = "onnxruntime" if export_format == "onnx" else "program"
    header = ["images", "max difference", "in std", "eager ms", f"{runner} ms", "ratio"]
    rows = [
        [
            f"{c.batch} x {c.size[0]}x{c.size[1]}",
            f"{c.difference:.1e}",
            f"{c.relative:.1e}",
            f"{c.eager_ms:.1f}",
            f"{c.exported_ms:.1f}",
            f"{c.exported_ms / c.eager_ms:.2f}",
        ]
        for c in comparisons
    ]
    return (
        f"{format_table(header, rows)}\n"
        f"at most {MAX_DIFFERENCE:.0e} standard deviations of the output are taken; median times "
        f"on the CPU, {torch.get_num_threads()} thread(s)"
    )


if __name__ == "__main__":
    from .cli import run_module

    run_module("export")

"""Models as ONNX files and torch.export programs, held to the models that they were made of.

A file is written beside its place, run on images of random values and compared with the model;
only if they agree does it get its name. Exports are of inference: evaluation mode, float32.

ONNX export takes torch 2.7 or newer: the exporter of torch 2.6 does not get along with the
versions of onnxscript that the extra asks for.

Legend: B images, H and W their height and width in pixels.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from ..backbones.base import HierarchicalBackbone
from ..layers.arguments import check_whole_number
from .count_macs import check_size, first_line

SUFFIXES = {"onnx": ".onnx", "torch_export": ".pt2"}
MAX_DIFFERENCE = 1e-3  # in standard deviations of the model's output
MIN_OPSET = 18  # the lowest one that PyTorch's exporter writes without converting
METADATA_FILE = "densezoo.json"  # within a .pt2 file
_MAX_PROTOBUF = 2**31 - 2**24  # bytes of weights in one ONNX file, with room for the graph
_TIMED_RUNS = 5

# What runs an exported file: (B, in_chans, H, W) images to the outputs in order.
Exported = Callable[[torch.Tensor], list[torch.Tensor]]


class ExportError(ValueError):
    """A model that cannot be exported, or a file that does not answer as the model does.

    Attributes:
        comparisons: what was compared, where it came to that.
    """

    def __init__(self, message: str, comparisons: Sequence[Comparison] = ()) -> None:
        super().__init__(message)
        self.comparisons = list(comparisons)


@dataclass(frozen=True)
class Comparison:
    """An exported file beside the model that it was made of, on one batch.

    Attributes:
        size: height and width of the images, pixels.
        batch: images.
        difference: largest absolute difference of an output's values.
        relative: largest difference in standard deviations of the model's own output.
        eager_ms: milliseconds that the model takes for the batch, the median of five runs.
        exported_ms: those that the file takes, on as many threads.
    """

    size: tuple[int, int]
    batch: int
    difference: float
    relative: float
    eager_ms: float
    exported_ms: float


def smallest_size(model: nn.Module) -> int:
    """Give the smallest height and width, pixels, that a dynamic export declares.

    One more than the stride of the last map: from there on no map has a side of 1, which
    exporters take for a case of its own. Models that do not tell their strides get 33.
    """
    info = getattr(model, "feature_info", None) or [dict(reduction=32)]
    strides = info.reduction() if hasattr(info, "reduction") else [f["reduction"] for f in info]
    return max(strides) + 1


def output_names(model: nn.Module, outputs: Sequence[torch.Tensor]) -> list[str]:
    """Name the outputs: "stage0" to "stage3" of stage maps, else "logits" or "features"."""
    indices = getattr(getattr(model, "feature_info", None), "out_indices", None)
    if indices is not None:
        return [f"stage{i}" for i in indices]
    if len(outputs) > 1:
        return [f"output{i}" for i in range(len(outputs))]
    return ["logits" if getattr(model, "num_classes", 1) else "features"]


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    size: tuple[int, int] = (224, 224),
    batch: int = 1,
    dynamic: bool = False,
    in_chans: int = 3,
    opset: int = MIN_OPSET,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> list[Comparison]:
    """Write a model as an ONNX file and hold it to the model in onnxruntime on the CPU.

    The input is "images", (batch, in_chans, height, width) float32; the outputs are named as
    :func:`output_names` says. Weights of 2 GiB or more lie in a second file, `path` + ".data".

    Args:
        model: takes an image batch, gives a tensor or a list of them; float32, on the CPU. Its
            modes are left as they are.
        path: the file to write; its folder has to exist.
        size: height and width, pixels.
        batch: images.
        dynamic: leave batch (1 or more), height and width (:func:`smallest_size` or more) open.
            onnxruntime does not check the range; without `dynamic` it refuses other shapes.
        in_chans: channels of the images.
        opset: version of ONNX's operator set, 18 or more.
        metadata: entries of the file's metadata.
        overwrite: replace a file that exists.

    Returns:
        The comparison at `size`, and with `dynamic` at two sizes more (:func:`sizes_to_compare`).

    Raises:
        ImportError: the packages of ``densezoo[export]`` are missing, or torch is too old.
        OSError: the file exists, or its folder does not, or it cannot be written.
        ExportError: the model cannot be exported, or the file differs from it by more than 1e-3
            standard deviations of an output; nothing is left behind.
        ValueError: an argument is out of range.
    """
    check_onnx_packages()
    check_opset(opset)

    def write(program: ExportedProgram, names: Sequence[str], file: Path) -> None:
        with _explained(model, "onnx"):
            onnx_program = torch.onnx.export(
                program,
                (),
                None,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=["images"],
                output_names=list(names),
                dynamic_shapes=[_dynamic_axes(model)] if dynamic else None,
                optimize=True,
            )
        onnx_program.model.metadata_props.update(metadata or {})
        weights = sum(t.nbytes for t in program.state_dict.values())
        onnx_program.save(str(file), external_data=weights > _MAX_PROTOBUF)

    return _export(
        model, path, size, batch, dynamic, in_chans, overwrite, write=write, load=load_onnx
    )


def export_program(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    size: tuple[int, int] = (224, 224),
    batch: int = 1,
    dynamic: bool = False,
    in_chans: int = 3,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> list[Comparison]:
    """Write a model as a torch.export program, load it again and hold it to the model.

    ``torch.export.load(path).module()`` runs it, on shapes that were declared alone; it holds no
    device, so that ``torch.export.passes.move_to_device_pass`` takes it to another one.

    Args:
        metadata: content of "densezoo.json" among the file's extra files.

    The other arguments, what is returned and what is raised are those of :func:`export_onnx`.
    """

    def write(program: ExportedProgram, names: Sequence[str], file: Path) -> None:
        # By way of memory: on a full disk PyTorch's own writer ends the process.
        archive = io.BytesIO()
        extra_files = {METADATA_FILE: json.dumps(dict(metadata or {}))}
        torch.export.save(program, archive, extra_files=extra_files)
        file.write_bytes(archive.getbuffer())

    return _export(
        model, path, size, batch, dynamic, in_chans, overwrite, write=write, load=load_program
    )


def trace(
    model: nn.Module,
    *,
    size: tuple[int, int] = (224, 224),
    batch: int = 1,
    dynamic: bool = False,
    in_chans: int = 3,
) -> ExportedProgram:
    """Trace a model in evaluation mode with ``torch.export``; arguments as of :func:`export_onnx`.

    Raises:
        ExportError: it cannot be traced.
        ValueError: an argument is out of range.
    """
    size = check_shape(model, size, batch, dynamic)
    # A batch of 1 would be taken for a constant.
    images = torch.zeros(max(batch, 2) if dynamic else batch, in_chans, *size)
    shapes = (_dynamic_axes(model),) if dynamic else None
    with _evaluation(model), torch.no_grad(), _explained(model, "torch_export"):
        return torch.export.export(model, (images,), dynamic_shapes=shapes, strict=False)


def load_onnx(path: str | os.PathLike) -> Exported:
    """Load an ONNX file in onnxruntime on the CPU, on as many threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime's exceptions have no common base but this
        raise ExportError(f"onnxruntime does not load the file: {first_line(error)}") from error
    (images,) = session.get_inputs()
    return lambda batch: [
        torch.from_numpy(output) for output in session.run(None, {images.name: batch.numpy()})
    ]


def load_program(path: str | os.PathLike) -> Exported:
    """Load a torch.export program."""
    with open(path, "rb") as file:
        module = torch.export.load(file).module()
    return lambda batch: as_list(module(batch))


def as_list(outputs: torch.Tensor | Sequence[torch.Tensor] | Mapping) -> list[torch.Tensor]:
    """List what a model returned: one tensor, several, or some by name."""
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return list(outputs.values() if isinstance(outputs, Mapping) else outputs)


def sizes_to_compare(
    model: nn.Module, size: tuple[int, int], batch: int, dynamic: bool
) -> list[tuple[int, int, int]]:
    """List (batch, height, width) of what an export is compared on.

    The size asked for; of a dynamic export also an odd one that is not square with one image
    more, and the smallest one that it declares with one image.
    """
    height, width = size
    if not dynamic:
        return [(batch, height, width)]
    least = smallest_size(model)
    odd = (batch + 1, max(least, height * 3 // 4 + 1), width * 5 // 4 + 3)
    return [(batch, height, width), odd, (1, least, least)]


def compare(
    model: nn.Module,
    exported: Exported,
    shapes: Sequence[tuple[int, int, int]],
    *,
    in_chans: int = 3,
) -> list[Comparison]:
    """Compare an exported file with its model, in evaluation mode, on images of random values.

    Args:
        model: what was exported.
        exported: what :func:`load_onnx` or :func:`load_program` gave.
        shapes: batch, height and width of each comparison.
        in_chans: channels of the images.

    Raises:
        ExportError: an output has another shape, or the model's own output is not finite.
    """
    comparisons = []
    with _evaluation(model), torch.no_grad():
        for batch, height, width in shapes:
            generator = torch.Generator().manual_seed(0)
            images = torch.randn(batch, in_chans, height, width, generator=generator)
            expected, actual = as_list(model(images)), exported(images)
            if not all(e.isfinite().all() for e in expected):
                raise ExportError(
                    f"the model's own output is not finite for {height}x{width} pixels: nothing "
                    "can be compared with it"
                )
            shapes_of = [[tuple(t.shape) for t in outputs] for outputs in (expected, actual)]
            if shapes_of[0] != shapes_of[1]:
                raise ExportError(
                    f"the outputs for {height}x{width} pixels have shapes {shapes_of[1]}, those "
                    f"of the model {shapes_of[0]}"
                )
            pairs = list(zip(actual, expected, strict=True))
            comparisons.append(
                Comparison(
                    (height, width),
                    batch,
                    max(float((a - e).abs().max()) for a, e in pairs),
                    max(relative_difference(a, e) for a, e in pairs),
                    _median_ms(lambda images=images: model(images)),
                    _median_ms(lambda images=images: exported(images)),
                )
            )
    return comparisons


def relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference in standard deviations of `expected`; of its magnitude if constant.

    Infinite where `actual` is not finite.
    """
    difference = float((actual.double() - expected.double()).abs().max())
    scale = float(expected.double().std(correction=0)) or float(expected.abs().max())
    relative = difference / scale if scale else difference
    return relative if relative == relative else float("inf")


def _median_ms(step: Callable[[], Any]) -> float:
    times = []
    for _ in range(_TIMED_RUNS):
        start = time.perf_counter()
        step()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def _export(
    model: nn.Module,
    path: str | os.PathLike,
    size: tuple[int, int],
    batch: int,
    dynamic: bool,
    in_chans: int,
    overwrite: bool,
    *,
    write: Callable[[ExportedProgram, Sequence[str], Path], None],
    load: Callable[[Path], Exported],
) -> list[Comparison]:
    """Trace, write beside `path`, load, compare, and rename."""
    path = Path(path)
    check_path(path, overwrite=overwrite)
    program = trace(model, size=size, batch=batch, dynamic=dynamic, in_chans=in_chans)
    with _evaluation(model), torch.no_grad():
        names = output_names(model, as_list(model(torch.zeros(batch, in_chans, *size))))
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        file = Path(folder) / path.name  # its own name, since it may name a file of its weights
        try:
            write(program, names, file)
        except OSError as error:
            error.filename = str(path)
            raise
        comparisons = compare(
            model, load(file), sizes_to_compare(model, size, batch, dynamic), in_chans=in_chans
        )
        worst = max(c.relative for c in comparisons)
        if worst > MAX_DIFFERENCE:
            raise ExportError(
                f"the exported model differs from the model by {worst:.1e} standard deviations of "
                f"its output, {MAX_DIFFERENCE:.0e} is taken: {path} was not written",
                comparisons,
            )
        weights = path.with_name(f"{path.name}.data")
        if not Path(folder, weights.name).exists():
            weights.unlink(missing_ok=True)  # of the file that is replaced
        for written in sorted(Path(folder).iterdir(), reverse=True):  # weights before the graph
            os.replace(written, path.parent / written.name)
    return comparisons


def _dynamic_axes(model: nn.Module) -> dict[int, Any]:
    """Declare what a dynamic export leaves open, by axis of the image batch."""
    least = smallest_size(model)
    return {
        0: torch.export.Dim("batch", min=1),
        2: torch.export.Dim("height", min=least),
        3: torch.export.Dim("width", min=least),
    }


@contextlib.contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and its modules' modes back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def _explained(model: nn.Module, export_format: str) -> Iterator[None]:
    """Turn what an exporter raises into an ExportError, with the family's reason if it has one."""
    try:
        yield
    except Exception as error:  # exporters raise whatever the operator at hand does
        said = " ".join(str(error).split())[:300] or type(error).__name__
        if "Constraints violated" in said:
            said = f"its height and width cannot be left open as declared: {said}"
        reason = reason_against(model, export_format) or said
        name = type(model).__name__
        raise ExportError(f"{name} cannot be exported ({export_format}): {reason}") from error


def reason_against(model: nn.Module, export_format: str, *, dynamic: bool = True) -> str | None:
    """Tell why a model's family cannot be exported ("onnx" or "torch_export"); None if it can.

    ONNX files are made of torch.export programs, so what stands against these stands against both.
    Families of one image size are exported at that one, but not with `dynamic`.
    """
    backbone = next((m for m in model.modules() if isinstance(m, HierarchicalBackbone)), None)
    reasons = {} if backbone is None else backbone.unsupported_exports
    against_any = reasons.get("dynamic") if dynamic else None
    return reasons.get(export_format, reasons.get("torch_export", against_any))


def check_shape(
    model: nn.Module, size: tuple[int, int], batch: int, dynamic: bool
) -> tuple[int, int]:
    """Check what a model is to be exported for; return the size."""
    size = check_size(size)
    check_whole_number("batch", batch, 1)
    least = smallest_size(model)
    if dynamic and min(size) < least:
        raise ValueError(
            f"the size is {size[0]} {size[1]}: a dynamic export of this model declares heights "
            f"and widths from {least} pixels"
        )
    weights = next(model.parameters())
    if weights.dtype != torch.float32 or weights.device.type != "cpu":
        raise ValueError(
            f"the model is {weights.dtype} on {weights.device}: models are exported in float32 on "
            "the CPU, model.float().cpu()"
        )
    return size


def check_path(path: Path, *, overwrite: bool) -> None:
    """Raise an OSError unless a file can be written at `path`."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} of {path.name} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"the folder {path.parent} cannot be written to")
    for file in (path, path.with_name(f"{path.name}.data")):
        if file.exists() and not overwrite:
            raise FileExistsError(f"{file} exists: pass --overwrite (overwrite=True) to replace it")


def check_onnx_packages() -> None:
    """Raise an ImportError unless models can be exported to ONNX here."""
    packages = ("onnx", "onnxruntime", "onnxscript")
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"ONNX export needs {', '.join(missing)}: pip install 'densezoo[export]'")
    if not has_onnx_exporter():
        raise ImportError(
            f"ONNX export needs torch 2.7 or newer, this is {torch.__version__} (a .pt2 file of "
            "torch.export can be written)"
        )


def has_onnx_exporter() -> bool:
    """Tell whether this PyTorch's ONNX exporter gets along with today's onnxscript."""
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 7)


def check_opset(opset: int) -> None:
    """Raise a ValueError unless the installed onnx knows the version and PyTorch writes it."""
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if not MIN_OPSET <= opset <= newest:
        raise ValueError(f"opset is {opset}: {MIN_OPSET} to {newest} are taken")

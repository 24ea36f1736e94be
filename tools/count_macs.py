"""``densezoo macs``: parameters, MACs and FLOPs of a model at an image size, part by part.

MACs are multiply-accumulates, counted by fvcore on a trace of the model in evaluation mode with
one image; FLOPs are twice that. The convention is fvcore's: convolutions and matrix products in
full, BatchNorm 2 a value, LayerNorm 5, interpolation by its taps, elementwise work nothing. On
top of it attention counts its two matrix products, and averages one a value however a model
writes them (fvcore counts adaptive_avg_pool2d so, but not mean and avg_pool2d).
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import nn

from ..backbones.registry import Published, check_model_name, find_weights
from ..kernels import runtime
from ..kernels.operators import Operator, registered
from ..layers.arguments import check_whole_number
from .tables import format_table

EXAMPLE = "densezoo macs cas_vit_xs --size 512 672"

# Takes the traced inputs and outputs of an operator (torch._C.Value), gives its MACs.
Handle = Callable[[list[Any], list[Any]], float]


def _shape(value: Any) -> list[int]:
    return value.type().sizes()


def _attention_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """Both products: query (..., L, E) with key (..., S, E), the weights with value (..., S, V)."""
    query, key, value = (_shape(v) for v in inputs[:3])
    return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _product_macs(first: int) -> Handle:
    """MACs of a matrix product whose left operand is input `first`, batches broadcast."""
    return lambda inputs, outputs: prod(_shape(outputs[0])) * _shape(inputs[first])[-1]


def _per_value(num_macs: int, of: str = "input") -> Handle:
    """`num_macs` for each value of the first input, or of the output."""
    if of == "output":
        return lambda inputs, outputs: num_macs * prod(_shape(outputs[0]))
    return lambda inputs, outputs: num_macs * prod(_shape(inputs[0]))


def _macs_by_formula(operator: Operator) -> Handle:
    """Give the handle of an operator of our own: its formula, of shapes and constants."""

    def count(inputs: list[Any], outputs: list[Any]) -> int:
        tensors = inputs[: operator.num_tensors]
        geometry = inputs[operator.num_tensors : -2]  # what follows is no geometry: scale, backend
        shapes = [None if t.type().kind() == "NoneType" else _shape(t) for t in tensors]
        return operator.count_macs(shapes, operator.make_geometry(*map(_constant, geometry)))

    return count


def _constant(value: Any) -> Any:
    """Get a number that a trace holds, or its list of numbers."""
    if value.type().kind() == "ListType":
        return [item.toIValue() for item in value.node().inputs()]
    return value.toIValue()


# Operators that fvcore has no handle for, or one that fails on some shapes. Operators of our own
# enter with the formula of their dispatch module, under the name they have in torch.ops.
OPERATOR_HANDLES: dict[str, Handle] = {
    **{f"densezoo::{name}": _macs_by_formula(operator) for name, operator in registered.items()},
    "aten::scaled_dot_product_attention": _attention_macs,
    "aten::matmul": _product_macs(0),
    "aten::mm": _product_macs(0),
    "aten::bmm": _product_macs(0),
    "aten::baddbmm": _product_macs(1),
    "aten::mean": _per_value(1),
    "aten::avg_pool1d": _per_value(1),
    "aten::avg_pool2d": _per_value(1),
    "aten::adaptive_avg_pool1d": _per_value(1),
    "aten::rms_norm": _per_value(4),
    "aten::upsample_bicubic2d": _per_value(16, of="output"),
    "aten::_upsample_bicubic2d_aa": _per_value(16, of="output"),
}

# Counted as nothing, which is fvcore's convention for elementwise work, comparisons and
# reductions by sums, or because no arithmetic is done (views and copies). fvcore itself knows
# a part of them alone. The in-place forms are included.
ZERO_OPERATORS = (
    # arithmetic
    "add", "addcmul", "sub", "rsub", "mul", "div", "neg", "reciprocal", "pow", "square", "sqrt",
    "rsqrt", "exp", "log", "log2", "sin", "cos", "abs", "sign", "clamp_min", "clamp_max", "sum",
    "cumsum", "linalg_vector_norm",
    # activations and gates
    "gelu", "silu", "sigmoid", "hardsigmoid", "hardswish", "hardtanh", "relu6", "elu", "selu",
    "leaky_relu", "prelu", "mish", "softplus", "tanh", "softmax", "log_softmax",
    "logsumexp",
    # maxima
    "max_pool2d", "adaptive_max_pool2d", "amax", "amin", "topk", "argmax", "minimum", "maximum",
    # no arithmetic
    "unflatten", "pad", "expand_as", "repeat", "repeat_interleave", "reshape_as", "view_as",
    "unfold", "im2col", "col2im", "dropout", "feature_dropout", "clone", "alias", "lift_fresh",
    "movedim", "swapaxes", "tile", "flip", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
    "where", "ne", "lt", "le", "logical_not", "index_select", "scatter", "tril", "meshgrid",
    "linspace", "outer",
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A part of a model: its parameters and its MACs for one image."""

    name: str
    params: int
    macs: int


@dataclass(frozen=True)
class MacsReport:
    """What one image costs.

    Attributes:
        name: name of the model.
        size: height and width of the image, pixels.
        in_chans: channels of the image.
        params: parameters.
        macs: multiply-accumulates.
        parts: stem, each stage, norm, head and the like; their figures add up to the totals.
        operators: MACs by operator.
        uncounted: operators that there is no formula for, with the number of their calls.
        published: the authors' figures, where they are for this size.
    """

    name: str
    size: tuple[int, int]
    in_chans: int
    params: int
    macs: int
    parts: tuple[Part, ...]
    operators: dict[str, int]
    uncounted: dict[str, int]
    published: Published | None = None

    @property
    def flops(self) -> int:
        """Floating-point operations: 2 a multiply-accumulate."""
        return 2 * self.macs


def check_size(size: tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) in pixels; raise a ValueError unless both are at least 1."""
    is_pair = isinstance(size, Sequence) and not isinstance(size, str) and len(size) == 2
    if not is_pair or any(type(number) is not int or number < 1 for number in size):
        text = " ".join(map(str, size)) if is_pair else repr(size)
        raise ValueError(f"the size is {text}: a height and a width of at least 1 pixel are taken")
    return tuple(size)


def input_size(name: str) -> tuple[int, int, int]:
    """Get channels, height and width that the model `name` of timm is made for.

    Raises:
        ValueError: there is no such model; near names are suggested.
    """
    check_model_name(name)
    if ":" in name:
        raise ValueError(f"{name!r} is no name of a model of densezoo or timm (timm.list_models())")
    try:
        return tuple(get_pretrained_cfg(name).input_size)
    except RuntimeError as error:
        base = name.split(".")[0]
        raise ValueError(f"unknown weights tag in {name!r}: {base!r} alone is enough") from error


def build_model(
    name: str,
    size: tuple[int, int] | None = None,
    *,
    in_chans: int = 3,
    features_only: bool = False,
    arguments: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build a model of densezoo or timm, randomly initialised, for images of a size.

    Models of timm that are built for one size get `size` as their ``img_size``.

    Args:
        name: as `timm.create_model` takes it.
        size: height and width, pixels; the model's own if None.
        in_chans: channels of the image.
        features_only: build it without norm and head, to return stage maps.
        arguments: further arguments of the model.

    Raises:
        ValueError: there is no such model, or it cannot be built so.
    """
    own_size = input_size(name)[1:]
    arguments = dict(arguments or {}, in_chans=in_chans)
    if features_only:
        arguments["features_only"] = True
    if size is not None and tuple(size) != own_size and get_pretrained_cfg(name).fixed_input_size:
        arguments["img_size"] = tuple(size)
    try:
        return timm.create_model(name, **arguments)
    except (RuntimeError, TypeError, AssertionError, ValueError) as error:
        wanted = ", ".join(f"{key}={value}" for key, value in arguments.items())
        raise ValueError(f"{name} cannot be built with {wanted}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Give the first line of an error's message, or its type's name where there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def count_macs(
    model: str | nn.Module,
    size: tuple[int, int] | None = None,
    *,
    in_chans: int | None = None,
) -> MacsReport:
    """Count parameters and MACs for one image, in evaluation mode.

    Args:
        model: name of a model of densezoo or timm, or a model that takes (1, in_chans, H, W); it
            is left as it was.
        size: height and width, pixels; by default what the model's weights are made for.
        in_chans: channels of the image; by default 3, or what the given model says.

    Raises:
        ImportError: fvcore is missing.
        ValueError: there is no such model, or it does not take images of this size.
    """
    analysis_class = _import_fvcore()
    published = None
    if isinstance(model, str):
        name, own_size = model, input_size(model)[1:]
        size = check_size(own_size if size is None else size)
        in_chans = 3 if in_chans is None else in_chans
        check_whole_number("in_chans", in_chans, 1)
        weights = find_weights(name)
        if weights and size == own_size and in_chans == 3:
            published = weights.published
        model = build_model(name, size, in_chans=in_chans)
    elif not isinstance(model, nn.Module) or not any(True for _ in model.parameters()):
        raise ValueError(
            f"model is {model!r}: the name of a model, or a module with parameters, is taken"
        )
    else:
        name = type(model).__name__
        if size is None:
            own_size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
            if own_size is None:
                raise ValueError(
                    f"{name} does not say its input size: pass size, a height and a width in pixels"
                )
            size = tuple(own_size[1:])
        size = check_size(size)
        in_chans = getattr(model, "in_chans", 3) if in_chans is None else in_chans
    analysis = _analyse(analysis_class, model, name, (1, in_chans, *size))
    params = sum(p.numel() for p in model.parameters())
    macs = round(analysis.total())
    return MacsReport(
        name=name,
        size=size,
        in_chans=in_chans,
        params=params,
        macs=macs,
        parts=_count_parts(model, analysis.by_module(), params, macs),
        operators={op: round(n) for op, n in analysis.by_operator().most_common()},
        uncounted=dict(analysis.unsupported_ops()),
        published=published,
    )


def _import_fvcore() -> type:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it compiles a loss with torch.jit.script on import
            from fvcore.nn import FlopCountAnalysis
    except ImportError as error:
        raise ImportError("counting MACs needs fvcore: pip install 'densezoo[profile]'") from error
    return FlopCountAnalysis


def _analyse(
    analysis_class: type, model: nn.Module, name: str, shape: tuple[int, int, int, int]
) -> Any:
    """Trace `model` in evaluation mode; its modules' modes are put back."""
    weight = next(model.parameters())
    image = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
    analysis = analysis_class(model, image)
    for operator in ZERO_OPERATORS:
        analysis.set_op_handle(f"aten::{operator}", None, f"aten::{operator}_", None)
    analysis.set_op_handle(**OPERATOR_HANDLES)
    analysis.unsupported_ops_warnings(False)
    analysis.uncalled_modules_warnings(False)
    analysis.tracer_warnings("none")
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), runtime.operators_whole():
            analysis.total()
    except (RuntimeError, AssertionError, ValueError, TypeError, IndexError) as error:
        raise ValueError(
            f"{name} does not run on an image of {shape[1]} channels, {shape[2]}x{shape[3]} "
            f"pixels: {first_line(error)}"
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training
    return analysis


def _count_parts(
    model: nn.Module, macs_by_module: dict[str, float], params: int, macs: int
) -> tuple[Part, ...]:
    """Split a model into its children, and those that hold its stages into the stages."""
    info = getattr(model, "feature_info", None) or ()
    features = [entry["module"] for entry in getattr(info, "info", info)]
    parts = []
    for name, child in model.named_children():
        holds_stages = any(feature.startswith(f"{name}.") for feature in features)
        for inner, module in child.named_children() if holds_stages else [("", child)]:
            path = f"{name}.{inner}" if inner else name
            size = sum(p.numel() for p in module.parameters())
            part = Part(path, size, round(macs_by_module.get(path, 0)))
            if part.params or part.macs:
                parts.append(part)
    rest = Part(
        "(outside of them)",
        params - sum(part.params for part in parts),
        macs - sum(part.macs for part in parts),
    )
    return tuple(parts) + ((rest,) if rest.params or rest.macs else ())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``densezoo macs``."""
    parser.add_argument("model", help="name of a model of densezoo or timm")
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        metavar=("H", "W"),
        help="height and width of the image, pixels; by default what the weights are made for",
    )
    parser.add_argument("--in-chans", type=int, default=3, help="channels of the image")


def run(args: argparse.Namespace) -> None:
    """Print the parameters and MACs of a model."""
    size = None if args.size is None else tuple(args.size)
    print(format_report(count_macs(args.model, size, in_chans=args.in_chans)))


def format_report(report: MacsReport) -> str:
    """Format a report as text: a table of the parts, then what was left uncounted."""
    height, width = report.size
    rows = [
        [
            part.name,
            f"{part.params / 1e6:.3f}",
            f"{part.macs / 1e9:.3f}",
            f"{2 * part.macs / 1e9:.3f}",
            f"{100 * part.macs / report.macs:.1f}" if report.macs else "-",
        ]
        for part in [*report.parts, Part("total", report.params, report.macs)]
    ]
    rows.insert(-1, [])
    published = report.published
    if published is not None and published.params and published.gmacs:
        rows.append(
            ["published", f"{published.params:.2f}", f"{published.gmacs:.3f}", "", ""],
        )
        rows.append(
            [
                "difference",
                f"{100 * (report.params / 1e6 / published.params - 1):+.2f} %",
                f"{100 * (report.macs / 1e9 / published.gmacs - 1):+.2f} %",
                "",
                "",
            ]
        )
    left = ", ".join(f"{op} ({calls} calls)" for op, calls in report.uncounted.items())
    return "\n".join(
        [
            f"{report.name}: one image of {report.in_chans} channels, {height}x{width} pixels",
            format_table(["part", "params (M)", "GMACs", "GFLOPs", "% of MACs"], rows),
            "MACs are multiply-accumulates in fvcore's convention; FLOPs = 2 x MACs.",
            f"not counted: {left or 'nothing'}",
        ]
    )


if __name__ == "__main__":
    from .cli import run_module

    run_module("macs")

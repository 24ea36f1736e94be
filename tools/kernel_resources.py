"""Compile Triton kernels for GPUs that are not there, and tell what they take of one.

``python -m densezoo.tools.kernel_resources neighborhood_attention --out CSV``: every kernel of the
operator in every tiling that it is tuned over, at the shapes of published models, for each GPU:
registers, spills, shared memory and matrix instructions.
"""

from __future__ import annotations

import argparse
import csv
import functools
import inspect
import itertools
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..kernels import triton_launch
from ..kernels.triton_launch import block_of_channels
from .bench_setup import Setup, describe_run, new_file

# name -> backend, architecture and threads of a warp, as Triton names them.
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# Dtypes of Triton; float32 products are IEEE's or TensorFloat-32, which AMD's kernels do not take.
DTYPES = {
    "float16": ("fp16", torch.float16, "ieee"),
    "bfloat16": ("bf16", torch.bfloat16, "ieee"),
    "float32": ("fp32", torch.float32, "ieee"),
    "tf32": ("fp32", torch.float32, "tf32"),
}
MATRIX_INSTRUCTIONS = r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma)"


@dataclass(frozen=True)
class Shape:
    """What an operator's kernels are compiled for.

    Attributes:
        shape: what the tilings are listed by.
        channels: channels of a head, the most of those in use.
        constants: arguments that are compiled in, by kernels' names for them; None: not given.
        skipped: kernels that such calls do not launch.
        is_aligned: whether strides are multiples of 16.
    """

    shape: str
    channels: int
    constants: dict[str, Any]
    skipped: tuple[str, ...] = ()
    is_aligned: bool = True


@dataclass(frozen=True)
class Operator:
    """An operator's kernels.

    Attributes:
        kernels: their names.
        shapes: what they are compiled for, by name.
        pointers: Triton's types of what is not of the tokens' dtype.
    """

    kernels: tuple[str, ...]
    shapes: dict[str, Shape]
    pointers: dict[str, str]


def _neighborhood_shape(
    shape: str,
    head_dim: int,
    kernel_size: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    is_causal: tuple[bool, bool] = (False, False),
    has_bias: bool = True,
    has_extra: bool = False,
    ones: tuple[str, ...] = (),
) -> Shape:
    """Describe calls of neighborhood attention; Triton compiles arguments in that are 1."""
    constants: dict[str, Any] = dict.fromkeys(ones, 1)
    constants |= {"HEAD_DIM": head_dim, "BLOCK_D": block_of_channels(head_dim)}
    for name, pair in (("KERNEL", kernel_size), ("STRIDE", stride), ("CAUSAL", is_causal)):
        constants |= zip((f"{name}_H", f"{name}_W"), pair, strict=True)
    skipped = []
    if not has_bias:
        constants["bias_ptr"] = None
        skipped.append("_backward_bias_kernel")
    if not has_extra:
        constants |= dict.fromkeys(("extra_key_ptr", "extra_value_ptr", "grad_lse_ptr"))
        skipped.append("_backward_extra_kernel")
    return Shape(shape, head_dim, constants, tuple(skipped), head_dim % 16 == 0)


def _routing_shape(
    shape: str,
    head_dim: int,
    value_dim: int | None = None,
    is_dense: bool = False,
    is_padded: bool = True,
    ones: tuple[str, ...] = (),
) -> Shape:
    """Describe calls of routing attention."""
    value_dim = value_dim or head_dim
    constants: dict[str, Any] = dict.fromkeys(ones, 1)
    constants |= {"HEAD_DIM": head_dim, "BLOCK_D": block_of_channels(head_dim)}
    constants |= {"VALUE_DIM": value_dim, "BLOCK_V": block_of_channels(value_dim)}
    unused = ("keepers_ptr", "keepers_start_ptr") if is_dense else ("counts_ptr",)
    constants |= dict.fromkeys(unused)
    skipped = ()
    if not is_padded:
        constants |= dict.fromkeys(("pad_count_ptr", "pad_key_ptr", "pad_value_ptr"))
        skipped = ("_backward_pad_kernel",)
    is_aligned = head_dim % 16 == value_dim % 16 == 0
    return Shape(shape, max(head_dim, value_dim), constants, skipped, is_aligned)


def _polyline_shape(
    shape: str,
    form: str,
    head_dim: int,
    value_dim: int | None = None,
    given: str = "",
    ones: tuple[str, ...] = (),
) -> Shape:
    """Describe launches of polyline attention.

    Args:
        shape: what its tilings are listed by.
        form: "full" or "axial".
        head_dim: channels of queries and keys.
        value_dim: channels of values, by default as many.
        given: of the full form "both" paths or "row_first", the latter without gradients of
            decays; of the axial one, what kernels get beside tokens: "all" that there is,
            "values" or "middle" alone, or "nothing" but a cotangent.
        ones: see :func:`_neighborhood_shape`.
    """
    value_dim = value_dim or head_dim
    constants: dict[str, Any] = dict.fromkeys(ones, 1)
    constants |= {"HEAD_DIM": head_dim, "BLOCK_D": block_of_channels(head_dim)}
    constants |= {"VALUE_DIM": value_dim, "BLOCK_V": block_of_channels(value_dim)}
    skipped = []
    if form == "full":
        constants["IS_BOTH"] = given == "both"
        if given == "row_first":
            constants["parts_ptr"] = None
        skipped = [name for name in _POLYLINE_KERNELS if "_line_" in name]
    else:
        constants["AXIS"] = 1
        skipped = [name for name in _POLYLINE_KERNELS if "_line_" not in name]
        absent = []
        if given != "all":
            absent += ["second_value_ptr", "second_out_ptr", "other_ptr", "added_value_ptr"]
        if given in ("values", "nothing"):
            absent += ["middle_ptr"]
        if given in ("middle", "nothing"):
            absent += ["grad_middle_ptr", "added_query_ptr", "added_key_ptr"]
        if given == "nothing":
            absent += ["grad_key_ptr", "grad_sums_ptr", "shared_ptr"]
            skipped += ["_forward_line_kernel", "_backward_line_query_kernel"]
        constants |= dict.fromkeys(absent)
    is_aligned = head_dim % 16 == value_dim % 16 == 0
    return Shape(shape, max(head_dim, value_dim), constants, tuple(skipped), is_aligned)


_LENGTHS = ("short", "medium", "long")
_POLYLINE_KERNELS = (
    "_forward_kernel",
    "_backward_query_kernel",
    "_backward_key_kernel",
    "_forward_line_kernel",
    "_backward_line_query_kernel",
    "_backward_line_key_kernel",
)

OPERATORS = {
    # NAT and DiNAT, DiNAT at 384 with 11x11, FasterViT-4's heads, and what no published model has.
    "neighborhood_attention": Operator(
        kernels=(
            "_forward_kernel",
            "_backward_query_kernel",
            "_backward_key_kernel",
            "_backward_bias_kernel",
            "_backward_extra_kernel",
        ),
        shapes={
            "nat": _neighborhood_shape("map", 32, (7, 7), ones=("dilation_h", "dilation_w")),
            "dinat": _neighborhood_shape("small_map", 32, (7, 7)),
            "dinat_11x11": _neighborhood_shape("map", 32, (11, 11)),
            "head_49": _neighborhood_shape("map", 49, (7, 7), ones=("dilation_h", "dilation_w")),
            "head_64": _neighborhood_shape("map", 64, (7, 7)),
            "head_128": _neighborhood_shape("map", 128, (7, 7)),
            "line": _neighborhood_shape(
                "line", 32, (1, 13), ones=("height", "dilation_h", "num_shares")
            ),
            "causal_extra": _neighborhood_shape(
                "map",
                32,
                (8, 5),
                stride=(2, 3),
                is_causal=(True, False),
                has_bias=False,
                has_extra=True,
                ones=("batch_size", "num_heads", "num_extra", "num_shares"),
            ),
        },
        pointers=dict.fromkeys(("lse_ptr", "grad_lse_ptr", "shared_ptr"), "*fp32")
        | dict.fromkeys(("partial_ptr", "partial_key_ptr", "partial_value_ptr"), "*fp32"),
    ),
    # BiFormer's first stage at 224 and its third, its padded maps with regions of every size, and
    # what no published model has.
    "routing_attention": Operator(
        kernels=(
            "_forward_kernel",
            "_backward_query_kernel",
            "_backward_key_kernel",
            "_backward_pad_kernel",
        ),
        shapes={
            "windows": _routing_shape("medium", 32, is_padded=False, ones=("topk",)),
            "dense": _routing_shape("dense", 32, is_dense=True, is_padded=False),
            "dense_padded": _routing_shape("dense", 32, is_dense=True),
            **{
                f"uneven_{shape}": _routing_shape(
                    shape, 20, 48, ones=("region_h", "region_w", "batch_size", "num_heads", "rows")
                )
                for shape in ("tiny", "large")
            },
            **{
                f"{shape}_{head_dim}": _routing_shape(shape, head_dim)
                for shape, head_dim in itertools.product(("tiny", "small", "large"), (32, 64, 128))
            },
        },
        pointers=dict.fromkeys(("lse_ptr", "shared_ptr", "counts_ptr", "pad_count_ptr"), "*fp32")
        | dict.fromkeys(("partial_key_ptr", "partial_value_ptr"), "*fp32")
        | dict.fromkeys(("routes_ptr", "keepers_ptr", "keepers_start_ptr"), "*i64"),
    ),
    # PPMA's and RMT's stages: rows of up to 16, up to 32 and more tokens, and what no published
    # model has.
    "polyline_attention": Operator(
        kernels=_POLYLINE_KERNELS,
        shapes={
            **{
                f"full_{shape}_{head_dim}": _polyline_shape(shape, "full", head_dim, given="both")
                for head_dim, shape in itertools.product((32, 64, 128), _LENGTHS)
            },
            **{
                f"axial_{shape}_{head_dim}": _polyline_shape(shape, "axial", head_dim, given="all")
                for head_dim, shape in itertools.product((16, 32, 64, 128), _LENGTHS)
            },
            **{
                f"full_row_first_{shape}": _polyline_shape(shape, "full", 32, given="row_first")
                for shape in _LENGTHS
            },
            **{
                f"axial_{given}": _polyline_shape("long", "axial", 32, given=given)
                for given in ("values", "middle", "nothing")
            },
            "full_uneven": _polyline_shape(
                "long", "full", 49, 20, given="both", ones=("batch_size", "num_heads", "height")
            ),
            "axial_uneven": _polyline_shape(
                "short", "axial", 20, 49, given="all", ones=("num_heads", "width", "tokens_h")
            ),
        },
        pointers=dict.fromkeys(("row_sums_ptr", "column_sums_ptr", "sums_ptr"), "*fp32")
        | dict.fromkeys(("lse_ptr", "shared_ptr", "parts_ptr", "grad_sums_ptr"), "*fp32"),
    ),
}


def list_jobs(
    operator: str, targets: Sequence[str], dtypes: Sequence[str], shapes: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """List what there is to compile: operator, target, shape, dtype, kernel and tiling."""
    known = OPERATORS[operator]
    path = triton_launch.operator_path(operator)
    for target, dtype, name in itertools.product(targets, dtypes, shapes):
        vendor = TARGETS[target][0]
        if (vendor, dtype) == ("hip", "tf32"):
            continue
        shape = known.shapes[name]
        for kernel in known.kernels:
            if kernel in shape.skipped:
                continue
            for tiling in path.tilings(
                kernel, shape.shape, DTYPES[dtype][1], shape.channels, vendor
            ):
                yield dict(
                    operator=operator,
                    target=target,
                    shape=name,
                    dtype=dtype,
                    kernel=kernel,
                    tiling=tiling,
                )


def compile_kernel(
    operator: str, target: str, shape: str, dtype: str, kernel: str, tiling: Any
) -> dict[str, Any]:
    """Compile one kernel and measure it.

    Args:
        operator: a name of `OPERATORS`.
        target: a name of `TARGETS`.
        shape: a name of the operator's shapes.
        dtype: a name of `DTYPES`.
        kernel: its name.
        tiling: one of those it is tuned over.

    Returns:
        A row: registers of a thread (AMD: vector registers), bytes or registers spilled by a
        thread, bytes of shared memory, and the kinds of matrix instructions.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    source = _make_source(operator, kernel, OPERATORS[operator].shapes[shape], dtype, tiling)
    vendor = TARGETS[target][0]
    options = triton_launch.launch_options(tiling, vendor) | triton_launch.FIXED_OPTIONS
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    is_amd = vendor == "hip"
    assembly = compiled.asm["amdgcn" if is_amd else "ptx"]
    registers, spills = (_read_amd if is_amd else _read_nvidia)(compiled.asm)
    return dict(
        target=target,
        shape=shape,
        dtype=dtype,
        kernel=kernel,
        **tiling._asdict(),
        registers=registers,
        spills=spills,
        shared_bytes=compiled.metadata.shared,
        matrix_instructions=" ".join(sorted(set(re.findall(MATRIX_INSTRUCTIONS, assembly)))),
    )


def _make_source(operator: str, kernel: str, shape: Shape, dtype: str, tiling: Any) -> Any:
    """Describe a kernel's arguments as a call does: types, constants, multiples of 16."""
    from triton.compiler import ASTSource

    function = triton_launch.kernel_function(operator, kernel)
    token_type, _, precision = DTYPES[dtype]
    constants = shape.constants | triton_launch.tile_options(tiling) | {"PRECISION": precision}
    pointers = OPERATORS[operator].pointers
    signature, aligned = {}, []
    for index, name in enumerate(function.arg_names):
        if name.endswith("_stride_d"):
            constants[name] = 1
        if name in constants or name.isupper():
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = pointers.get(name, f"*{token_type}")
            aligned.append(index)
        elif name == "scale":
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if "_stride_" in name and shape.is_aligned:
                aligned.append(index)
    constants = {name: constants[name] for name in function.arg_names if name in constants}
    if "constants" in inspect.signature(ASTSource).parameters:  # Triton 3.2
        from triton.backends.compiler import AttrsDescriptor

        attributes = AttrsDescriptor.from_hints(dict.fromkeys(aligned, 16))
    else:
        attributes = {(index,): [["tt.divisibility", 16]] for index in aligned}
    return ASTSource(function, signature, constants, attributes)


def _read_amd(asm: dict[str, Any]) -> tuple[int, int]:
    """Read vector registers and spilled registers off AMD's assembly."""

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", asm["amdgcn"]).group(1))

    return number("vgpr_count"), number("vgpr_spill_count") + number("sgpr_spill_count")


def _read_nvidia(asm: dict[str, Any]) -> tuple[int, int]:
    """Read registers and stack (what a thread spills lies there), bytes, off a binary."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(asm["cubin"])
        usage = subprocess.run(
            [_cuobjdump(), "-res-usage", binary], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return int(registers), int(stack)


@functools.cache
def _cuobjdump() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("operator", choices=OPERATORS)
    for name, known in (("targets", TARGETS), ("dtypes", DTYPES)):
        parser.add_argument(
            f"--{name}", nargs="+", choices=known, default=list(known), help="all by default"
        )
    parser.add_argument("--shapes", nargs="+", help="names of the operator's; all by default")
    parser.add_argument("--out", metavar="CSV", help="a new file for the rows")


def run(args: argparse.Namespace) -> None:
    """Compile, print the rows and write them where `--out` says."""
    known = OPERATORS[args.operator].shapes
    shapes = args.shapes or list(known)
    for name in shapes:
        if name not in known:
            raise ValueError(f"--shapes has {name!r}: {args.operator} has {', '.join(known)}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET is 1: such kernels cannot be compiled; unset it")
    with new_file(args.out) as file:
        facts = describe_run(Setup())
        shared = {name: facts[name] for name in ("triton", "torch", "densezoo", "commit", "date")}
        shared["command"] = shlex.join(["python", "-m", __spec__.name, *sys.argv[1:]])
        writer = None
        for job in list_jobs(args.operator, args.targets, args.dtypes, shapes):
            row = compile_kernel(**job)
            print(*row.values(), flush=True)
            if file is not None:
                if writer is None:
                    writer = csv.DictWriter(file, [*row, *shared], lineterminator="\n")
                    writer.writeheader()
                writer.writerow(row | shared)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_arguments(parser)
    run(parser.parse_args())

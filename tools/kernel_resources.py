"""Compile Triton kernels for GPUs that are not there, and tell what they take of one.

``python -m densezoo.tools.kernel_resources --out CSV``: every kernel of neighborhood attention in
every tiling that it is tuned over, at the shapes of published models, for each GPU: registers,
spills, shared memory and matrix instructions.
"""

from __future__ import annotations

import argparse
import csv
import functools
import inspect
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from .bench_throughput import Setup, describe_run, new_file

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
KERNELS = (
    "_forward_kernel",
    "_backward_query_kernel",
    "_backward_key_kernel",
    "_backward_bias_kernel",
    "_backward_extra_kernel",
)


@dataclass(frozen=True)
class Shape:
    """What a kernel is compiled for.

    Attributes:
        shape: "line", "small_map" or "map", as the tilings are listed by.
        head_dim: channels of a head.
        kernel_size: keys of a window along each axis.
        stride: queries that share a window along each axis.
        is_causal: along each axis.
        has_bias: whether there is a table of biases.
        has_extra: whether there are extra keys and a cotangent of the lse.
        ones: arguments that are 1, which Triton compiles in.
    """

    shape: str
    head_dim: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    is_causal: tuple[bool, bool] = (False, False)
    has_bias: bool = True
    has_extra: bool = False
    ones: tuple[str, ...] = ()


# NAT and DiNAT, DiNAT at 384 with 11x11, FasterViT-4's heads, and what no published model has.
SHAPES = {
    "nat": Shape("map", 32, (7, 7), ones=("dilation_h", "dilation_w")),
    "dinat": Shape("small_map", 32, (7, 7)),
    "dinat_11x11": Shape("map", 32, (11, 11)),
    "head_49": Shape("map", 49, (7, 7), ones=("dilation_h", "dilation_w")),
    "head_64": Shape("map", 64, (7, 7)),
    "head_128": Shape("map", 128, (7, 7)),
    "line": Shape("line", 32, (1, 13), ones=("height", "dilation_h", "num_shares")),
    "causal_extra": Shape(
        "map",
        32,
        (8, 5),
        stride=(2, 3),
        is_causal=(True, False),
        has_bias=False,
        has_extra=True,
        ones=("batch_size", "num_heads", "num_extra", "num_shares"),
    ),
}


def list_jobs(
    targets: Sequence[str], dtypes: Sequence[str], shapes: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """List what there is to compile: target, shape, dtype, kernel and tiling."""
    path = _module("triton")
    for target in targets:
        vendor = TARGETS[target][0]
        for dtype in dtypes:
            if (vendor, dtype) == ("hip", "tf32"):
                continue
            for name in shapes:
                shape = SHAPES[name]
                skipped = {
                    "_backward_bias_kernel": not shape.has_bias,
                    "_backward_extra_kernel": not shape.has_extra,
                }
                for kernel in KERNELS:
                    if skipped.get(kernel):
                        continue
                    for tiling in path.tilings(
                        kernel, shape.shape, DTYPES[dtype][1], shape.head_dim, vendor
                    ):
                        yield dict(
                            target=target, shape=name, dtype=dtype, kernel=kernel, tiling=tiling
                        )


def compile_kernel(target: str, shape: str, dtype: str, kernel: str, tiling: Any) -> dict[str, Any]:
    """Compile one kernel and measure it.

    Args:
        target: a name of `TARGETS`.
        shape: a name of `SHAPES`.
        dtype: a name of `DTYPES`.
        kernel: its name.
        tiling: one of those it is tuned over.

    Returns:
        A row: registers of a thread (AMD: vector registers), bytes or registers spilled by a
        thread, bytes of shared memory, and the kinds of matrix instructions.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    source = _make_source(kernel, SHAPES[shape], dtype, tiling)
    vendor = TARGETS[target][0]
    options = _module("triton").launch_options(tiling, vendor)
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


def _module(name: str) -> Any:
    return import_module(f"..kernels.neighborhood_attention.{name}", __package__)


def _make_source(kernel: str, shape: Shape, dtype: str, tiling: Any) -> Any:
    """Describe a kernel's arguments as a call does: types, constants, multiples of 16."""
    from triton.compiler import ASTSource

    path = _module("triton")
    function = path.kernel_function(kernel)
    token_type, _, precision = DTYPES[dtype]
    constants = path.tile_options(tiling) | {
        "HEAD_DIM": shape.head_dim,
        "BLOCK_D": path.block_of_channels(shape.head_dim),
        "PRECISION": precision,
    }
    for name in ("kernel_size", "stride", "is_causal"):
        prefix = name.upper().removesuffix("_SIZE").removeprefix("IS_")
        constants |= zip((f"{prefix}_H", f"{prefix}_W"), getattr(shape, name), strict=True)
    constants |= dict.fromkeys(shape.ones, 1)
    if not shape.has_bias:
        constants["bias_ptr"] = None
    if not shape.has_extra:
        constants |= dict.fromkeys(("extra_key_ptr", "extra_value_ptr", "grad_lse_ptr"))
    signature, aligned = {}, []
    for index, name in enumerate(function.arg_names):
        if name.endswith("_stride_d"):
            constants[name] = 1
        if name in constants or name.isupper():
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            is_float32 = name.startswith(("lse", "grad_lse", "shared", "partial"))
            signature[name] = "*fp32" if is_float32 else f"*{token_type}"
            aligned.append(index)
        elif name == "scale":
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if "_stride_" in name and shape.head_dim % 16 == 0:
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
    for name, known in (("targets", TARGETS), ("dtypes", DTYPES), ("shapes", SHAPES)):
        parser.add_argument(
            f"--{name}", nargs="+", choices=known, default=list(known), help="all by default"
        )
    parser.add_argument("--out", metavar="CSV", help="a new file for the rows")


def run(args: argparse.Namespace) -> None:
    """Compile, print the rows and write them where `--out` says."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET is 1: such kernels cannot be compiled; unset it")
    with new_file(args.out) as file:
        facts = describe_run(Setup())
        shared = {name: facts[name] for name in ("triton", "torch", "densezoo", "commit", "date")}
        shared["command"] = shlex.join(["python", "-m", __spec__.name, *sys.argv[1:]])
        writer = None
        for job in list_jobs(args.targets, args.dtypes, args.shapes):
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

"""What the operators' Triton paths share in PyTorch: what can run, launches, and tuning.

An operator's folder holds ``triton``, with a function ``tilings`` that lists how a kernel may
divide its work, and its kernels in ``triton_forward`` and, by names that begin with ``_backward``,
in ``triton_backward``. These two are imported when a kernel is launched: importing this module or
``triton`` does not import Triton.

A tiling is a named tuple: what a kernel takes as constants, under the same names in capitals, and
``num_warps`` (warps of a program) and ``num_stages`` (blocks under way at a time).
"""

from __future__ import annotations

import functools
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import runtime

MAX_CHANNELS = 128
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
VENDOR = "cuda" if torch.version.hip is None else "hip"
# Said, as Triton is about to turn it around and warns of it.
FIXED_OPTIONS = {"enable_fp_fusion": True}
_TILING_OPTIONS = ("num_warps", "num_stages")


class Tiling(NamedTuple):
    """How a kernel divides its work, where tokens are taken one after the other.

    Attributes:
        tile: tokens that a program owns.
        block: tokens that it takes at a time of those it walks through.
        num_warps: warps of a program.
        num_stages: blocks under way at a time.
    """

    tile: int
    block: int
    num_warps: int
    num_stages: int


def why_not(query: Tensor, **channels: int) -> str | None:
    """Tell why no kernel takes such tokens, or None if they do.

    Args:
        query: for the dtype and the device of all tokens.
        **channels: channels of a head, by the name that callers know the number by.
    """
    if query.dtype not in DTYPES:
        return f"the dtype is {query.dtype}, the kernels take float16, bfloat16 and float32"
    for name, number in channels.items():
        if number > MAX_CHANNELS:
            return f"{name} is {number}, the kernels take {MAX_CHANNELS} at most"
    return runtime.why_no_triton(query.device)


class Call:
    """The arguments of a call's kernels, by their names, and the launches.

    Args:
        operator: the operator's folder.
        shape: the kind of shape that its tilings are listed by.
        query: (B, *grid, heads, head_dim), 1-D or 2-D grid; a 1-D grid is a map of one row.
        channels: channels of a head, the most of those in use.
        arguments: what kernels take.
    """

    def __init__(
        self, operator: str, shape: str, query: Tensor, channels: int, arguments: dict[str, Any]
    ) -> None:
        self.operator, self.shape, self.channels = operator, shape, channels
        self.batch_size, self.num_heads = query.shape[0], query.shape[-2]
        self.device, self.dtype = query.device, query.dtype
        is_rounded = self.dtype == torch.float32 and allows_tf32()
        self.arguments = arguments | {
            "batch_size": self.batch_size,
            "num_heads": self.num_heads,
            "PRECISION": "tf32" if is_rounded else "ieee",
        }

    def add_tokens(self, **tensors: Tensor) -> None:
        """Add tensors (B, *grid, heads, channels) and their strides."""
        for name, tensor in tensors.items():
            strides = tensor.stride()
            if tensor.ndim == 4:
                strides = (strides[0], 0, *strides[1:])
            self.arguments[f"{name}_ptr"] = tensor
            for axis, stride in zip("bhwnd", strides, strict=True):
                self.arguments[f"{name}_stride_{axis}"] = stride

    def add_tables(self, **tensors: Tensor | None) -> None:
        """Add what is small enough to be copied where it is not contiguous."""
        for name, tensor in tensors.items():
            self.arguments[f"{name}_ptr"] = None if tensor is None else tensor.contiguous()

    def num_tiles(self, options: dict[str, Any]) -> int:
        """Count the tiles of an image under the constants of a tiling."""
        raise NotImplementedError

    def launch_tiled(self, name: str, **arguments: Any) -> None:
        """Launch a kernel whose programs own a tile of an image and head each."""

        def grid(options: dict[str, Any]) -> tuple[int]:
            return (self.num_tiles(options) * self.batch_size * self.num_heads,)

        self.launch(name, grid, **arguments)

    def launch(self, name: str, grid: Any, **arguments: Any) -> None:
        """Launch a kernel on the tensors' device."""
        kernel, options = tuned_kernel(self.operator, name, self.shape, self.dtype, self.channels)
        known = self.arguments | arguments
        taken = {name: value for name, value in known.items() if name in kernel.arg_names}
        with torch.cuda.device_of(self.arguments["query_ptr"]):
            kernel[grid](**taken, **options)


def allows_tf32() -> bool:
    """Whether PyTorch's own float32 products may be TensorFloat-32: the kernels follow it."""
    if VENDOR == "hip":
        return False
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # reading the older switch raises after this one is set
        return matmul.fp32_precision == "tf32"
    return matmul.allow_tf32


@functools.cache
def tuned_kernel(
    operator: str, name: str, shape: str, dtype: torch.dtype, channels: int
) -> tuple[Any, dict[str, int]]:
    """Get a kernel that chooses its tiling, or one with the options of its only tiling."""
    kernel = kernel_function(operator, name)
    found = operator_path(operator).tilings(name, shape, dtype, channels, VENDOR)
    tiles = [
        {key: value for key, value in tile_options(tiling).items() if key in kernel.arg_names}
        for tiling in found
    ]
    launches = [launch_options(tiling, VENDOR) for tiling in found]
    if len(found) == 1:
        return kernel, tiles[0] | launches[0] | FIXED_OPTIONS
    import triton

    configs = [triton.Config(tile, **launch) for tile, launch in zip(tiles, launches, strict=True)]
    key = [name for name in kernel.arg_names if name.startswith(("KERNEL_", "STRIDE_"))]
    return triton.autotune(configs, key)(kernel), FIXED_OPTIONS


def operator_path(operator: str) -> Any:
    """Get an operator's module ``triton``."""
    return import_module(f".{operator}.triton", __package__)


def kernel_function(operator: str, name: str) -> Any:
    """Get a kernel by its name; this imports Triton."""
    module = "triton_backward" if name.startswith("_backward") else "triton_forward"
    return getattr(import_module(f".{operator}.{module}", __package__), name)


def tile_options(tiling: Any) -> dict[str, int]:
    """Give a tiling as kernels' arguments."""
    options = tiling._asdict().items()
    return {name.upper(): value for name, value in options if name not in _TILING_OPTIONS}


def launch_options(tiling: Any, vendor: str) -> dict[str, int]:
    """Give a tiling as the compiler's options."""
    options = {name: getattr(tiling, name) for name in _TILING_OPTIONS}
    if vendor == "cuda" and not runtime.is_interpreted():
        # Left alone, ptxas spills a register or two to make room for another program.
        options["maxnreg"] = 255
    return options


def block_of_channels(number: int) -> int:
    """Channels that a kernel computes on: a power of two, as matrix instructions take."""
    return max(16, 1 << (number - 1).bit_length())


def width_of_heads(channels: int) -> str:
    """Sort heads by what their tiles take of a GPU: "narrow", "wide" or "widest"."""
    return "narrow" if channels <= 32 else "wide" if channels <= 64 else "widest"

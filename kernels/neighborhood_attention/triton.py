"""Neighborhood attention on Triton kernels: what can run, the launches, and their tuning.

The kernels are in :mod:`.triton_forward` and :mod:`.triton_backward`, which are imported when one
is launched: importing this module does not import Triton. A 1-D grid is a map of one row.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .. import runtime, triton_launch
from ..triton_launch import VENDOR
from .windows import Neighborhood

# Sums over all positions are shared among programs, enough to fill a GPU, not more: every share
# takes memory.
_BIAS_PROGRAMS = 1024
_EXTRA_QUERIES = 1024
_MAX_EXTRA_SHARES = 64


class Tiling(NamedTuple):
    """How a kernel divides its work.

    Attributes:
        tile_h: rows of the tile that a program owns, in members of a dilation group.
        tile_w: columns of the tile.
        block: members that it takes at a time of those it walks through.
        num_warps: warps of a program.
        num_stages: blocks under way at a time.
    """

    tile_h: int
    tile_w: int
    block: int
    num_warps: int
    num_stages: int


# In the interpreter nothing is tuned; tiles are so small that a small map has several.
_INTERPRETED = Tiling(4, 8, 64, 1, 1)

# What kernels are tuned over: by vendor, bytes of a number, and heads ("narrow" up to 32 channels,
# "wide" up to 64, "widest", "uneven" where 16 does not divide the channels). All were compiled for
# sm_80, sm_90 and sm_100, or for gfx942; what spilled registers on one was dropped. The bias has
# one, as the memory of its shares depends on it.
_TILINGS = {
    ("cuda", 2, "narrow"): {
        "forward": ((8, 8, 32, 4, 2), (8, 16, 32, 8, 2), (8, 8, 64, 8, 2), (8, 8, 16, 4, 2)),
        "backward_query": ((8, 8, 32, 8, 2), (8, 16, 32, 8, 2), (8, 8, 64, 8, 2), (8, 8, 16, 4, 2)),
        "backward_key": ((8, 8, 32, 8, 2), (8, 16, 32, 8, 2), (8, 8, 16, 4, 2)),
        "backward_bias": ((8, 8, 32, 4, 1),),
    },
    ("cuda", 2, "wide"): {
        "forward": ((8, 8, 32, 4, 2), (8, 16, 32, 8, 2), (8, 8, 16, 4, 2)),
        "backward_query": ((8, 8, 32, 4, 2), (8, 16, 32, 8, 2), (8, 8, 16, 4, 2)),
        "backward_key": ((8, 8, 16, 4, 2), (4, 8, 16, 4, 2)),
        "backward_bias": ((8, 8, 32, 4, 1),),
    },
    ("cuda", 2, "widest"): {
        "forward": ((8, 8, 32, 8, 2), (8, 8, 16, 8, 2), (4, 8, 32, 4, 2)),
        "backward_query": ((8, 8, 32, 8, 2), (8, 8, 16, 8, 2), (4, 8, 32, 4, 2)),
        "backward_key": ((4, 8, 32, 4, 2), (4, 8, 16, 4, 2)),
        "backward_bias": ((8, 8, 32, 4, 1),),
    },
    ("cuda", 2, "uneven"): {
        "forward": ((8, 8, 16, 8, 2), (4, 8, 32, 4, 2)),
        "backward_query": ((8, 8, 16, 8, 2), (4, 8, 32, 4, 2)),
        "backward_key": ((4, 8, 32, 4, 2), (4, 8, 16, 4, 2)),
        "backward_bias": ((4, 8, 16, 4, 1),),
    },
    ("cuda", 4, "narrow"): {
        "forward": ((8, 8, 16, 8, 2), (4, 4, 16, 4, 2)),
        "backward_query": ((8, 8, 16, 8, 2), (4, 4, 16, 4, 2)),
        "backward_key": ((8, 8, 16, 4, 2), (4, 8, 16, 8, 2)),
        "backward_bias": ((4, 8, 16, 4, 1),),
    },
    ("cuda", 4, "wide"): {
        "forward": ((8, 8, 16, 8, 2),),
        "backward_query": ((4, 8, 16, 4, 2), (8, 8, 16, 8, 2)),
        "backward_key": ((8, 8, 16, 8, 2),),
        "backward_bias": ((4, 8, 16, 4, 1),),
    },
    ("cuda", 4, "widest"): {
        "forward": ((4, 8, 16, 8, 2), (4, 4, 16, 4, 2)),
        "backward_query": ((4, 8, 16, 8, 2),),
        "backward_key": ((4, 4, 16, 4, 2), (4, 8, 16, 8, 2)),
        "backward_bias": ((4, 8, 16, 4, 1),),
    },
    ("cuda", 4, "uneven"): {
        "forward": ((4, 8, 16, 8, 2), (4, 4, 16, 4, 2)),
        "backward_query": ((4, 8, 16, 8, 2), (4, 4, 16, 4, 2)),
        "backward_key": ((4, 8, 16, 8, 1), (4, 4, 16, 8, 2)),
        "backward_bias": ((4, 8, 16, 4, 1),),
    },
}
_TILINGS_OF_HIP = {
    "forward": ((8, 8, 16, 4, 2), (4, 8, 16, 4, 2)),
    "backward_query": ((8, 8, 16, 4, 2), (4, 8, 16, 4, 2)),
    "backward_key": ((8, 8, 16, 4, 2), (4, 8, 16, 4, 2)),
    "backward_bias": ((8, 8, 16, 4, 1),),
}
for _bytes in (2, 4):
    for _heads in ("narrow", "wide", "widest"):
        _TILINGS["hip", _bytes, _heads] = _TILINGS_OF_HIP
    _TILINGS["hip", _bytes, "uneven"] = _TILINGS_OF_HIP | {"backward_bias": ((4, 4, 16, 4, 1),)}


def tilings(
    kernel: str, shape: str, dtype: torch.dtype, head_dim: int, vendor: str
) -> tuple[Tiling, ...]:
    """List the divisions that a kernel is tuned over on a GPU.

    Args:
        kernel: name of the kernel.
        shape: "line" for 1-D grids, "map" for 2-D ones, "small_map" for those whose dilation
            groups have at most 8 rows and columns, which larger tiles would not fit.
        dtype: dtype of the tokens.
        head_dim: channels of a head.
        vendor: "cuda" or "hip".
    """
    if kernel == "_backward_extra_kernel":  # its programs own extra keys, in a row
        found = [Tiling(1, 16, 32, 4, 2)]
    elif runtime.is_interpreted():
        found = [_INTERPRETED]
    else:
        width = triton_launch.width_of_heads(head_dim)
        heads = "uneven" if head_dim % 16 and width != "widest" else width
        rows = _TILINGS[vendor, dtype.itemsize, heads][kernel[1:].removesuffix("_kernel")]
        found = [Tiling(*row) for row in rows]
    if shape == "small_map":
        found = [tiling for tiling in found if tiling.tile_h * tiling.tile_w <= 64]
    if shape == "line":
        found = [t._replace(tile_h=1, tile_w=t.tile_h * t.tile_w) for t in found]
    return tuple(found)


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    neighborhood: Neighborhood,
) -> str | None:
    """Tell why the kernels cannot run this call, or None if they can."""
    if neighborhood.num_axes > 2:
        return f"the grid has {neighborhood.num_axes} axes, the kernels take 1 or 2"
    return triton_launch.why_not(query, head_dim=query.shape[-1])


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    neighborhood: Neighborhood,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute the output and the log-sum-exp, as the reference does.

    Args:
        query: (B, *grid, heads, head_dim), 1-D or 2-D grid; any strides, as all inputs.
        key: like query.
        value: like query.
        bias: (heads, 2 K_1 - 1, ...).
        extra_key: (B, M, heads, head_dim).
        extra_value: like extra_key.
        neighborhood: the windows.
        scale: factor of the logits.

    Returns:
        The output, contiguous, like query; the natural logarithm of the softmax's denominator,
        (B, *grid, heads), float32.
    """
    out = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    call = _Call(query, neighborhood, scale)
    call.add_tokens(query=query, key=key, value=value)
    call.add_extra(bias, extra_key, extra_value)
    call.launch_tiled("_forward_kernel", out_ptr=out, lse_ptr=lse)
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    out: Tensor,
    lse: Tensor,
    neighborhood: Neighborhood,
    scale: float,
    needs_bias_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Compute the gradients of query, key, value, bias, extra_key and extra_value.

    They are deterministic: every sum is made in a fixed order.

    Args:
        grad_out: cotangent of the output, any strides.
        grad_lse: cotangent of the log-sum-exp, or None.
        query: as in :func:`forward`, like all that follow.
        key: see there.
        value: see there.
        bias: see there.
        extra_key: see there.
        extra_value: see there.
        out: what the forward pass returned.
        lse: what the forward pass returned.
        neighborhood: the windows.
        scale: factor of the logits.
        needs_bias_grad: whether to compute that of the bias.

    Returns:
        The gradients, contiguous, in the inputs' dtypes; None for inputs that are None
        and what is not needed.
    """
    call = _Call(query, neighborhood, scale)
    call.add_tokens(grad_out=grad_out, query=query, key=key, value=value)
    call.add_extra(bias, extra_key, extra_value)
    shared = torch.empty_like(lse, memory_format=torch.contiguous_format)
    call.arguments |= {"lse_ptr": lse.contiguous(), "shared_ptr": shared}
    grad_query, grad_key, grad_value = (query.new_empty(query.shape) for _ in range(3))
    call.launch_tiled(
        "_backward_query_kernel",
        grad_lse_ptr=None if grad_lse is None else grad_lse.contiguous(),
        out_ptr=out.contiguous(),
        grad_query_ptr=grad_query,
    )
    call.launch_tiled("_backward_key_kernel", grad_key_ptr=grad_key, grad_value_ptr=grad_value)
    grad_bias = grad_extra_key = grad_extra_value = None
    if bias is not None and needs_bias_grad:
        grad_bias = _bias_gradient(call, bias)
    if extra_key is not None and extra_value is not None:
        grad_extra_key, grad_extra_value = _extra_gradients(call, extra_key, extra_value)
    return grad_query, grad_key, grad_value, grad_bias, grad_extra_key, grad_extra_value


class _Call(triton_launch.Call):
    """The launches of a call's kernels."""

    def __init__(self, query: Tensor, neighborhood: Neighborhood, scale: float) -> None:
        is_line = neighborhood.num_axes == 1
        grid = query.shape[1:-2]
        self.height, self.width = (1, *grid) if is_line else grid
        self.dilation = (1, *neighborhood.dilation)[-2:]
        self.kernel_size = (1, *neighborhood.kernel_size)[-2:]
        stride = (1, *neighborhood.stride)[-2:]
        is_causal = (False, *neighborhood.is_causal)[-2:]
        self.largest_group = (
            -(-self.height // self.dilation[0]),
            -(-self.width // self.dilation[1]),
        )
        map_shape = "small_map" if max(self.largest_group) <= 8 else "map"
        shape = "line" if is_line else map_shape
        head_dim = query.shape[-1]
        arguments = {
            "scale": scale,
            "height": self.height,
            "width": self.width,
            "dilation_h": self.dilation[0],
            "dilation_w": self.dilation[1],
            "HEAD_DIM": head_dim,
            "KERNEL_H": self.kernel_size[0],
            "KERNEL_W": self.kernel_size[1],
            "STRIDE_H": stride[0],
            "STRIDE_W": stride[1],
            "CAUSAL_H": is_causal[0],
            "CAUSAL_W": is_causal[1],
            "BLOCK_D": triton_launch.block_of_channels(head_dim),
        }
        super().__init__("neighborhood_attention", shape, query, head_dim, arguments)

    def add_extra(
        self, bias: Tensor | None, extra_key: Tensor | None, extra_value: Tensor | None
    ) -> None:
        """Add the table of biases and the extra keys."""
        self.add_tables(bias=bias, extra_key=extra_key, extra_value=extra_value)
        self.arguments["num_extra"] = 0 if extra_key is None else extra_key.shape[1]

    def num_tiles(self, options: dict[str, int]) -> int:
        """Count the tiles of an image, those of smaller groups that hold nothing included."""
        rows, columns = self.largest_group
        num_groups = self.dilation[0] * self.dilation[1]
        return num_groups * -(-rows // options["TILE_H"]) * -(-columns // options["TILE_W"])


def _bias_gradient(call: _Call, bias: Tensor) -> Tensor:
    """Sum the gradients of logits by their offsets, (heads, 2 K_1 - 1, ...)."""
    tiling = tilings("_backward_bias_kernel", call.shape, call.dtype, call.channels, VENDOR)[0]
    num_queries = tiling.tile_h * tiling.tile_w
    span_h, span_w = (
        tile + 2 * kernel_size - 2
        for tile, kernel_size in zip(tiling[:2], call.kernel_size, strict=True)
    )
    num_blocks = -(-span_h * span_w // tiling.block)
    num_tiles = call.num_tiles(triton_launch.tile_options(tiling)) * call.batch_size
    num_shares = min(num_tiles, max(1, _BIAS_PROGRAMS // (num_blocks * call.num_heads)))
    shape = (num_shares, call.num_heads, num_blocks, num_queries, tiling.block)
    partial = torch.empty(shape, dtype=torch.float32, device=call.device)
    call.launch(
        "_backward_bias_kernel",
        (num_shares * call.num_heads * num_blocks,),
        partial_ptr=partial,
        num_shares=num_shares,
    )
    by_pair = partial.sum(0).transpose(1, 2).flatten(1)  # (heads, queries x keys)
    pairs = _pairs_by_offset(tiling[:2], call.kernel_size, num_blocks * tiling.block, call.device)
    return by_pair[:, pairs].sum(-1).to(bias.dtype).view(bias.shape)


@functools.cache
def _pairs_by_offset(
    tile: tuple[int, int], kernel_size: tuple[int, int], num_keys: int, device: torch.device
) -> Tensor:
    """Find the pairs (query of a tile, key around it) of every offset: (offsets, queries).

    Pairs are numbered query x num_keys + key, the keys as ``_backward_bias_kernel`` does.
    """
    axes = [torch.arange(2 * size - 1, device=device) for size in kernel_size]
    rows, columns = (torch.arange(size, device=device) for size in tile)
    key_h = axes[0][:, None, None, None] + rows[:, None]
    key_w = axes[1][:, None, None] + columns
    query = rows[:, None] * tile[1] + columns
    span_w = tile[1] + 2 * kernel_size[1] - 2
    return (query * num_keys + key_h * span_w + key_w).flatten(0, 1).flatten(1)


def _extra_gradients(call: _Call, extra_key: Tensor, extra_value: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the gradients of extra keys and values over all queries, (B, M, heads, head_dim)."""
    num_positions = call.height * call.width
    num_shares = min(-(-num_positions // _EXTRA_QUERIES), _MAX_EXTRA_SHARES)
    tiling = tilings("_backward_extra_kernel", call.shape, call.dtype, call.channels, VENDOR)[0]
    num_blocks = -(-extra_key.shape[1] // tiling.tile_w)
    shape = (num_shares, *extra_key.shape)
    grad_key, grad_value = (
        torch.empty(shape, dtype=torch.float32, device=call.device) for _ in range(2)
    )
    call.launch(
        "_backward_extra_kernel",
        (num_shares * call.batch_size * call.num_heads * num_blocks,),
        partial_key_ptr=grad_key,
        partial_value_ptr=grad_value,
        num_shares=num_shares,
    )
    scale = call.arguments["scale"]
    return (
        (grad_key.sum(0) * scale).to(extra_key.dtype),
        grad_value.sum(0).to(extra_value.dtype),
    )

"""Routing attention on Triton kernels: what can run, the launches, and their tuning.

The kernels are in :mod:`.triton_forward` and :mod:`.triton_backward`, which are imported when one
is launched: importing this module does not import Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import runtime, triton_launch
from ..triton_launch import VENDOR, Tiling
from .regions import Regions

# Rows of the least tile that matrix instructions take.
_LEAST_TILE = 16
# Sums over all positions are shared among programs, enough to fill a GPU.
_PAD_PROGRAMS = 512


# In the interpreter nothing is tuned; tiles are so small that a region has several.
_INTERPRETED = Tiling(16, 32, 1, 1)

# What kernels are tuned over: by vendor, bytes of a number, and heads ("narrow" up to 32 channels,
# "wide" up to 64, "widest"). All were compiled for sm_80, sm_90 and sm_100, or for gfx942; what
# spilled registers on one was dropped.
_TILINGS = {
    ("cuda", 2, "narrow"): {
        "tiny": ((16, 32, 1, 2), (16, 64, 2, 2)),
        "small": ((32, 32, 2, 2), (32, 32, 4, 2)),
        "large": ((32, 32, 2, 2), (64, 32, 4, 2), (64, 64, 8, 2), (128, 32, 8, 2)),
    },
    ("cuda", 2, "wide"): {
        "tiny": ((16, 32, 1, 2), (16, 32, 2, 2)),
        "small": ((32, 32, 4, 2),),
        "large": ((32, 32, 4, 2), (64, 32, 8, 2)),
    },
    ("cuda", 2, "widest"): {
        "tiny": ((16, 32, 4, 2),),
        "small": ((32, 32, 4, 2),),
        "large": ((32, 32, 4, 2), (64, 32, 8, 2)),
    },
    ("cuda", 4, "narrow"): {
        "tiny": ((16, 16, 1, 2), (16, 32, 2, 2)),
        "small": ((32, 16, 4, 2), (32, 32, 4, 2)),
        "large": ((32, 32, 4, 2), (64, 16, 8, 2)),
    },
    ("cuda", 4, "wide"): {
        "tiny": ((16, 16, 2, 2),),
        "small": ((32, 16, 4, 2),),
        "large": ((32, 16, 4, 2), (64, 16, 8, 2)),
    },
    ("cuda", 4, "widest"): {
        "tiny": ((16, 16, 4, 2),),
        "small": ((32, 16, 8, 2),),
        "large": ((32, 16, 8, 2),),
    },
}
_TILINGS_OF_HIP = {
    "tiny": ((16, 16, 1, 2),),
    "small": ((32, 16, 2, 2),),
    "large": ((32, 16, 2, 2), (64, 16, 4, 2)),
}
for _bytes in (2, 4):
    for _heads in ("narrow", "wide", "widest"):
        _TILINGS["hip", _bytes, _heads] = _TILINGS_OF_HIP


def tilings(
    kernel: str, shape: str, dtype: torch.dtype, channels: int, vendor: str
) -> tuple[Tiling, ...]:
    """List the divisions that a kernel is tuned over on a GPU.

    Args:
        kernel: name of the kernel.
        shape: "tiny" for regions of up to 16 tokens, "small" for up to 32, "medium" for up to 128,
            "large" for more, "dense" for maps that are attended to densely.
        dtype: dtype of the tokens.
        channels: channels of a head, of keys or values, the more of them.
        vendor: "cuda" or "hip".
    """
    if kernel == "_backward_pad_kernel":  # its programs own the padded tokens, which are one
        return (Tiling(1, 32, 4, 1),)
    if runtime.is_interpreted():
        return (_INTERPRETED,)
    heads = triton_launch.width_of_heads(channels)
    tiles = shape if shape in ("tiny", "small") else "large"
    return tuple(Tiling(*row) for row in _TILINGS[vendor, dtype.itemsize, heads][tiles])


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    pad_key: Tensor | None,
    pad_value: Tensor | None,
    regions: Regions,
) -> str | None:
    """Tell why the kernels cannot run this call, or None if they can."""
    return triton_launch.why_not(query, head_dim=query.shape[-1], value_dim=value.shape[-1])


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    pad_key: Tensor | None,
    pad_value: Tensor | None,
    regions: Regions,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute the output and the log-sum-exp, as the reference does.

    Args:
        query: (B, H, W, heads, head_dim); any strides, as all inputs.
        key: like query.
        value: (B, H, W, heads, value_dim).
        routes: (B, regions, topk), int64.
        pad_key: (heads, head_dim), or None for zeros.
        pad_value: (heads, value_dim), or None for zeros.
        regions: the regions of the map.
        scale: factor of the logits.

    Returns:
        The output (B, H, W, heads, value_dim), contiguous; the natural logarithm of the softmax's
        denominator (B, H, W, heads), float32.
    """
    out = query.new_empty(value.shape)
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    call = _Call(query, value, routes, regions, scale)
    call.add_tokens(query=query, key=key, value=value)
    call.add_routes(routes, pad_key, pad_value)
    call.launch_tiled("_forward_kernel", out_ptr=out, lse_ptr=lse)
    return out, lse


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    pad_key: Tensor | None,
    pad_value: Tensor | None,
    out: Tensor,
    lse: Tensor,
    regions: Regions,
    scale: float,
    needs_pad_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Compute the gradients of query, key, value, pad_key and pad_value.

    They are deterministic: every sum is made in a fixed order.

    Args:
        grad_out: cotangent of the output, any strides.
        query: as in :func:`forward`, like all that follow.
        key: see there.
        value: see there.
        routes: see there.
        pad_key: see there.
        pad_value: see there.
        out: what the forward pass returned.
        lse: what the forward pass returned.
        regions: the regions of the map.
        scale: factor of the logits.
        needs_pad_grad: whether to compute those of pad_key and pad_value.

    Returns:
        The gradients, contiguous, in the inputs' dtypes; None for inputs that are None and what is
        not needed.
    """
    call = _Call(query, value, routes, regions, scale)
    call.add_tokens(grad_out=grad_out, query=query, key=key, value=value)
    call.add_routes(routes, pad_key, pad_value)
    shared = torch.empty_like(lse, memory_format=torch.contiguous_format)
    call.arguments |= {"lse_ptr": lse.contiguous(), "shared_ptr": shared}
    grad_query, grad_key, grad_value = (
        tokens.new_empty(tokens.shape) for tokens in (query, key, value)
    )
    call.launch_tiled("_backward_query_kernel", out_ptr=out.contiguous(), grad_query_ptr=grad_query)
    call.add_keepers(routes)
    call.launch_tiled("_backward_key_kernel", grad_key_ptr=grad_key, grad_value_ptr=grad_value)
    grad_pad_key = grad_pad_value = None
    if needs_pad_grad and not call.is_padded:
        grad_pad_key, grad_pad_value = (
            None if pad is None else torch.zeros_like(pad) for pad in (pad_key, pad_value)
        )
    elif needs_pad_grad and not (pad_key is None and pad_value is None):
        grad_pad_key, grad_pad_value = _pad_gradients(call, pad_key, pad_value)
    return grad_query, grad_key, grad_value, grad_pad_key, grad_pad_value


class _Call(triton_launch.Call):
    """The launches of a call's kernels."""

    def __init__(
        self, query: Tensor, value: Tensor, routes: Tensor, regions: Regions, scale: float
    ) -> None:
        self.grid, self.regions = tuple(query.shape[1:3]), regions
        self.is_padded = regions.padded_grid != self.grid
        self.is_dense = _is_dense(query, routes, regions)
        head_dim, value_dim = query.shape[-1], value.shape[-1]
        arguments = {
            "scale": scale,
            "height": self.grid[0],
            "width": self.grid[1],
            "rows": regions.rows,
            "columns": regions.columns,
            "region_h": regions.height,
            "region_w": regions.width,
            "topk": routes.shape[-1],
            "HEAD_DIM": head_dim,
            "VALUE_DIM": value_dim,
            "BLOCK_D": triton_launch.block_of_channels(head_dim),
            "BLOCK_V": triton_launch.block_of_channels(value_dim),
        }
        channels = max(head_dim, value_dim)
        shape = "dense" if self.is_dense else _shape_of(regions)
        super().__init__("routing_attention", shape, query, channels, arguments)

    def add_routes(self, routes: Tensor, pad_key: Tensor | None, pad_value: Tensor | None) -> None:
        """Add the routes, in the form that the kernels walk by, and the padded tokens."""
        counts = pad_counts = None
        if self.is_dense:
            counts = _count_routes(routes).log_()
        if self.is_padded:
            padded = self.regions.num_padded(self.grid, routes.device)
            pad_counts = padded[routes].sum(-1).log()
        else:
            pad_key = pad_value = None
        self.add_tables(
            routes=routes,
            counts=counts,
            pad_count=pad_counts,
            pad_key=pad_key,
            pad_value=pad_value,
        )

    def add_keepers(self, routes: Tensor) -> None:
        """Add what the key kernel walks by: for each region, the regions that keep it."""
        keepers, starts = (None, None) if self.is_dense else _transpose(routes)
        self.add_tables(keepers=keepers, keepers_start=starts)

    def num_tiles(self, options: dict[str, int]) -> int:
        """Count the tiles of an image; those of padded regions hold nothing."""
        if self.is_dense:
            return -(-self.grid[0] * self.grid[1] // options["TILE"])
        return self.regions.count * -(-self.regions.area // options["TILE"])


def _shape_of(regions: Regions) -> str:
    """Sort regions by their tokens; each kind is tuned for itself."""
    most = {"tiny": 16, "small": 32, "medium": 128}
    return next((shape for shape, tokens in most.items() if regions.area <= tokens), "large")


def _is_dense(query: Tensor, routes: Tensor, regions: Regions) -> bool:
    """Whether attending to all tokens of a map costs no more than to those of kept regions.

    By regions, tiles hold the tokens of one, and those of small regions are mostly empty. The
    table of the dense form must not outweigh the queries.
    """
    _, height, width, num_heads, head_dim = query.shape
    padded_area = -(-regions.area // _LEAST_TILE) * _LEAST_TILE
    query_bytes = height * width * num_heads * head_dim * query.itemsize
    return height * width <= routes.shape[-1] * padded_area and 4 * regions.count**2 <= query_bytes


def _count_routes(routes: Tensor) -> Tensor:
    """Count how often each region keeps each: (B, regions, regions), float32."""
    batch_size, num_regions, _ = routes.shape
    counts = torch.zeros(batch_size, num_regions, num_regions, device=routes.device)
    return counts.scatter_add_(2, routes, torch.ones((), device=routes.device).expand_as(routes))


def _transpose(routes: Tensor) -> tuple[Tensor, Tensor]:
    """List for each region the regions that keep it, as often as they do, in ascending order.

    Returns:
        The lists, one after the other, (B, regions * topk), and where each begins and the last
        ends, (B, regions + 1).
    """
    batch_size, num_regions, topk = routes.shape
    kept, order = routes.flatten(1).sort(dim=1, stable=True)
    bounds = torch.arange(num_regions + 1, device=routes.device).repeat(batch_size, 1)
    return order // topk, torch.searchsorted(kept, bounds)


def _pad_gradients(
    call: _Call, pad_key: Tensor | None, pad_value: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Sum the gradients of the padded tokens' key and value over all queries."""
    height, width = call.grid
    (tiling,) = tilings("_backward_pad_kernel", call.shape, call.dtype, call.channels, VENDOR)
    num_blocks = -(-height * width // tiling.block) * call.batch_size
    num_shares = min(num_blocks, max(1, _PAD_PROGRAMS // call.num_heads))
    grad_key, grad_value = (
        torch.empty(
            num_shares,
            call.num_heads,
            call.arguments[name],
            dtype=torch.float32,
            device=call.device,
        )
        for name in ("HEAD_DIM", "VALUE_DIM")
    )
    call.launch(
        "_backward_pad_kernel",
        (num_shares * call.num_heads,),
        partial_key_ptr=grad_key,
        partial_value_ptr=grad_value,
        num_shares=num_shares,
    )
    scale = call.arguments["scale"]
    return (
        None if pad_key is None else (grad_key.sum(0) * scale).to(pad_key.dtype),
        None if pad_value is None else grad_value.sum(0).to(pad_value.dtype),
    )

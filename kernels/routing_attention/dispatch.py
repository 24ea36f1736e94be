"""The public function, and what it tells PyTorch of the operator."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from types import ModuleType

from torch import Tensor

from ..operators import Operator, Shape
from . import cpu
from .checks import checked_call
from .reference import routing_attention_reference
from .regions import Regions


def routing_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    num_regions: int | Sequence[int],
    *,
    scale: float | None = None,
    region_size: int | Sequence[int] | None = None,
    pad_key: Tensor | None = None,
    pad_value: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attend from every region of a map to the regions that it routes to.

    softmax(scale * q k^T) v for each query over all tokens of the regions that ``routes`` names
    for its own region; :func:`densezoo.kernels.route_regions` chooses them.

    Regions are equal rectangles, numbered row by row from the top left, max(num_regions,
    ceil(length / region_size)) of them along an axis: a size that does not divide the map leaves
    regions that reach beyond it at the bottom and at the right, and more regions than cover it
    leave some that are wholly outside. Their tokens there are attended to, each with ``pad_key``
    and ``pad_value``; nothing is masked. A region that ``routes`` names twice counts twice.

    Backends, in order: "triton" (CUDA and ROCm), "cpu", "reference" (plain PyTorch that gathers
    the keys and values of the kept regions: any device; what torch.jit.trace and ONNX files get).
    All give equal results up to rounding, and deterministic ones, but for the reference's
    gradients on a GPU. Forward-mode and second derivatives are the reference's alone.
    :func:`densezoo.kernels.which_backend` tells which one a call takes. In the reference NaN and
    infinite keys and values reach the queries that attend to them; in the others they may reach
    more.

    Under autocast all inputs are cast to its dtype. Softmax is computed in at least float32.

    Args:
        query: (B, H, W, heads, head_dim), at least 1 image, any strides.
        key: like query.
        value: (B, H, W, heads, value_dim).
        routes: (B, regions, topk), int64, numbers of regions. Their range is checked in eager mode
            alone, where the check makes a GPU wait; under compilers, exporters and torch.func what
            other numbers give is undefined.
        num_regions: regions along each axis, one number or (rows, columns).
        scale: factor of the products of query and key; by default head_dim ** -0.5.
        region_size: tokens of a region along each axis, one number or (height, width); by default
            ceil(length / num_regions).
        pad_key: (heads, head_dim), key of the tokens of regions that are not on the map; zeros by
            default. It has a gradient, as has ``pad_value``.
        pad_value: (heads, value_dim), their value; zeros by default.
        backend: "triton", "cpu" or "reference"; by default what
            :func:`densezoo.kernels.use_backend` or DENSEZOO_BACKEND says, or the first
            that can.

    Returns:
        The output (B, H, W, heads, value_dim), contiguous.

    Raises:
        ValueError: shapes, dtypes or devices do not belong together, an argument is out of its
            range, or the backend that is asked for does not exist or cannot run the call.

    Source: Zhu et al., "BiFormer: Vision Transformer with Bi-Level Routing Attention", CVPR 2023,
    arXiv 2303.08810, section 3.2.
    """
    tensors, regions, scale = checked_call(
        query, key, value, routes, num_regions, scale, region_size, pad_key, pad_value
    )
    return OPERATOR(tensors, regions, scale, backend)[0]


def attend_known_routes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    num_regions: int | Sequence[int],
    *,
    scale: float | None = None,
    region_size: int | Sequence[int] | None = None,
    pad_key: Tensor | None = None,
    pad_value: Tensor | None = None,
) -> Tensor:
    """Compute :func:`routing_attention` without a look at the range of the routes.

    For those that :func:`densezoo.kernels.route_regions` gave: a GPU need not wait for it.
    """
    tensors, regions, scale = checked_call(
        query, key, value, routes, num_regions, scale, region_size, pad_key, pad_value,
        is_range_known=True,
    )  # fmt: skip
    return OPERATOR(tensors, regions, scale, None)[0]


def _import_triton() -> ModuleType:
    from . import triton

    return triton


def _as_arguments(regions: Regions) -> tuple[int, ...]:
    return regions.rows, regions.columns, regions.height, regions.width


def _count_macs(shapes: Sequence[Shape | None], regions: Regions) -> int:
    """Count the multiply-accumulates of a forward pass: those of the logits and of the values.

    Queries on the map count, with all tokens of the regions that theirs routes to, padded ones
    included. Every path does at most these beside what it computes for padded queries.
    """
    query, _, value, routes, _, _ = shapes
    return prod(query[:4]) * routes[2] * regions.area * (query[4] + value[4])


OPERATOR = Operator(
    "routing_attention",
    tensors=(
        "Tensor query",
        "Tensor key",
        "Tensor value",
        "Tensor routes",
        "Tensor? pad_key",
        "Tensor? pad_value",
    ),
    geometry=("SymInt rows", "SymInt columns", "SymInt region_height", "SymInt region_width"),
    make_geometry=Regions,
    as_arguments=_as_arguments,
    import_path={"triton": _import_triton, "cpu": lambda: cpu},
    reference=routing_attention_reference,
    count_macs=_count_macs,
    shared=("pad_key", "pad_value"),
    spared=("pad_key", "pad_value"),
    spared_as="shared",
    indices=("routes",),
    has_lse_grad=False,
)
OPERATOR.explain(routing_attention, checked_call)

"""Checks of a call of neighborhood attention: each a ValueError that names the argument."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import checks
from ..checks import check_whole_numbers, one_or_all, per_axis, shape
from .windows import Neighborhood

TENSOR_NAMES = ("query", "key", "value", "bias", "extra_key", "extra_value")
Tensors = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def checked_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int],
    stride: int | Sequence[int],
    is_causal: bool | Sequence[bool],
    scale: float | None,
) -> tuple[Tensors, Neighborhood, float]:
    """Check the arguments of a call; give its tensors (cast, under autocast), windows and scale."""
    tensors = (query, key, value, bias, extra_key, extra_value)
    checks.check_tensors(dict(zip(TENSOR_NAMES, tensors, strict=True)), TENSOR_NAMES[3:])
    num_axes = query.ndim - 3
    if not 1 <= num_axes <= 3:
        raise ValueError(
            f"query has shape {shape(query)}: (B, *grid, heads, head_dim) with a grid of 1 to 3 "
            "axes is taken"
        )
    neighborhood = _make_neighborhood(
        per_axis("kernel_size", kernel_size, num_axes),
        per_axis("dilation", dilation, num_axes),
        per_axis("stride", stride, num_axes),
        per_axis("is_causal", is_causal, num_axes),
    )
    if not torch.jit.is_tracing():  # there sizes are tensors
        _check_shapes(*tensors, neighborhood)
    tensors = checks.cast_under_autocast(tensors)
    checks.check_alike(dict(zip(TENSOR_NAMES, tensors, strict=True)))
    return tensors, neighborhood, checks.checked_scale(scale, query.shape[-1])


def _make_neighborhood(
    kernel_size: tuple[Any, ...],
    dilation: tuple[Any, ...],
    stride: tuple[Any, ...],
    is_causal: tuple[Any, ...],
) -> Neighborhood:
    """Check what describes the windows."""
    check_whole_numbers("kernel_size", kernel_size, 2)
    check_whole_numbers("dilation", dilation, 1)
    check_whole_numbers("stride", stride, 1)
    for step, size in zip(stride, kernel_size, strict=True):
        if step > size:
            raise ValueError(
                f"stride is {one_or_all(stride)}: at most kernel_size, which is "
                f"{one_or_all(kernel_size)}, is taken"
            )
    for flag in is_causal:
        if not isinstance(flag, (bool, np.bool_)):
            raise ValueError(
                f"is_causal is {one_or_all(is_causal)}: True or False, or one an axis, is taken"
            )
    return Neighborhood(
        tuple(int(size) for size in kernel_size),
        tuple(int(distance) for distance in dilation),
        tuple(int(step) for step in stride),
        tuple(bool(flag) for flag in is_causal),
    )


def _check_shapes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    neighborhood: Neighborhood,
) -> None:
    """Raise a ValueError unless the shapes belong together and the windows fit into the grid."""
    checks.check_heads(query)
    num_heads, head_dim = query.shape[-2:]
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape != query.shape:
            raise ValueError(
                f"{name} has shape {shape(tensor)}: the shape of query, {shape(query)}, is taken"
            )
    for axis, (length, span) in enumerate(zip(query.shape[1:-2], neighborhood.spans, strict=True)):
        if length < span:
            kernel_size, dilation = neighborhood.kernel_size[axis], neighborhood.dilation[axis]
            raise ValueError(
                f"kernel_size is {kernel_size} with dilation {dilation} along axis {axis} of the "
                f"grid {tuple(query.shape[1:-2])}: their product is at most the length of the "
                f"axis, {length}; pad query, key and value to {span} or lower one of the two"
            )
    if bias is not None:
        _check_bias(bias, num_heads, neighborhood)
    if (extra_key is None) != (extra_value is None):
        given, missing = ("extra_key", "extra_value")[:: 1 if extra_value is None else -1]
        raise ValueError(f"{missing} is None but {given} is not: both are taken, or neither")
    if extra_key is None:
        return
    for name, tensor in (("extra_key", extra_key), ("extra_value", extra_value)):
        is_like_query = tensor.ndim == 4 and (
            (tensor.shape[0], *tensor.shape[2:]) == (query.shape[0], num_heads, head_dim)
        )
        if not is_like_query or tensor.shape[1] != extra_key.shape[1] or tensor.shape[1] == 0:
            raise ValueError(
                f"{name} has shape {shape(tensor)}: (B, M, heads, head_dim) is taken, here "
                f"({query.shape[0]}, M, {num_heads}, {head_dim}) with the same M of at least 1 "
                "for extra_key and extra_value"
            )


def _check_bias(bias: Tensor, num_heads: int, neighborhood: Neighborhood) -> None:
    kernel_size, stride = neighborhood.kernel_size, neighborhood.stride
    if any(size % 2 == 0 for size in kernel_size):
        limit = f"odd kernels, kernel_size is {one_or_all(kernel_size)}"
    elif any(step > 1 for step in stride):
        limit = f"stride 1, stride is {one_or_all(stride)}"
    elif any(neighborhood.is_causal):
        limit = f"is_causal=False, is_causal is {one_or_all(neighborhood.is_causal)}"
    else:
        expected = (num_heads, *(2 * size - 1 for size in kernel_size))
        if tuple(bias.shape) != expected:
            raise ValueError(
                f"bias has shape {shape(bias)}: (heads, 2 kernel_size - 1, ...) is taken, here "
                f"{expected}"
            )
        return
    raise ValueError(f"bias has shape {shape(bias)}: a bias is taken with {limit}; leave it out")

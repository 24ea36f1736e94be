"""Checks of a call of neighborhood attention: each a ValueError that names the argument."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .windows import Neighborhood

TENSOR_NAMES = ("query", "key", "value", "bias", "extra_key", "extra_value")
AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")
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
    for name, tensor in zip(TENSOR_NAMES, tensors, strict=True):
        is_optional = name in TENSOR_NAMES[3:]
        if not isinstance(tensor, Tensor) and not (is_optional and tensor is None):
            raise ValueError(f"{name} is {_brief(tensor)}: a tensor is taken")
    num_axes = query.ndim - 3
    if not 1 <= num_axes <= 3:
        raise ValueError(
            f"query has shape {_shape(query)}: (B, *grid, heads, head_dim) with a grid of 1 to 3 "
            "axes is taken"
        )
    neighborhood = _make_neighborhood(
        _per_axis("kernel_size", kernel_size, num_axes),
        _per_axis("dilation", dilation, num_axes),
        _per_axis("stride", stride, num_axes),
        _per_axis("is_causal", is_causal, num_axes),
    )
    if not torch.jit.is_tracing():  # there sizes are tensors
        _check_shapes(*tensors, neighborhood)
    tensors = cast_under_autocast(tensors)
    _check_alike(tensors)
    if scale is None:
        return tensors, neighborhood, query.shape[-1] ** -0.5
    is_number = isinstance(scale, (int, float, np.number)) and not isinstance(scale, bool)
    if not is_number or not isfinite(scale):
        raise ValueError(f"scale is {_brief(scale)}: a finite number is taken, or None")
    return tensors, neighborhood, float(scale)


def _brief(value: object) -> str:
    """What a message says of a wrong value: a tensor's contents are left out."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {_shape(value)}"
    return repr(value)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _per_axis(name: str, value: Any, num_axes: int) -> tuple[Any, ...]:
    """Give one entry an axis."""
    if not isinstance(value, (tuple, list)):
        return (value,) * num_axes
    if len(value) != num_axes:
        raise ValueError(
            f"{name} is {value!r}: one value, or {num_axes} of them, one an axis, is taken"
        )
    return tuple(value)


def _make_neighborhood(
    kernel_size: tuple[Any, ...],
    dilation: tuple[Any, ...],
    stride: tuple[Any, ...],
    is_causal: tuple[Any, ...],
) -> Neighborhood:
    """Check what describes the windows."""
    _check_whole_numbers("kernel_size", kernel_size, 2)
    _check_whole_numbers("dilation", dilation, 1)
    _check_whole_numbers("stride", stride, 1)
    for step, size in zip(stride, kernel_size, strict=True):
        if step > size:
            raise ValueError(
                f"stride is {_one_or_all(stride)}: at most kernel_size, which is "
                f"{_one_or_all(kernel_size)}, is taken"
            )
    for flag in is_causal:
        if not isinstance(flag, (bool, np.bool_)):
            raise ValueError(
                f"is_causal is {_one_or_all(is_causal)}: True or False, or one an axis, is taken"
            )
    return Neighborhood(
        tuple(int(size) for size in kernel_size),
        tuple(int(distance) for distance in dilation),
        tuple(int(step) for step in stride),
        tuple(bool(flag) for flag in is_causal),
    )


def _check_whole_numbers(name: str, values: tuple[Any, ...], lowest: int) -> None:
    for value in values:
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < lowest:
            raise ValueError(
                f"{name} is {_one_or_all(values)}: a whole number of at least {lowest}, or one an "
                "axis, is taken"
            )


def _one_or_all(values: tuple[Any, ...]) -> str:
    """What a message says of one value an axis: one alone where all are equal."""
    return repr(values[0] if len(set(map(repr, values))) == 1 else values)


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
    num_heads, head_dim = query.shape[-2:]
    if num_heads == 0 or head_dim == 0:
        raise ValueError(
            f"query has shape {_shape(query)}: at least 1 head of at least 1 channel is taken"
        )
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape != query.shape:
            raise ValueError(
                f"{name} has shape {_shape(tensor)}: the shape of query, {_shape(query)}, is taken"
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
                f"{name} has shape {_shape(tensor)}: (B, M, heads, head_dim) is taken, here "
                f"({query.shape[0]}, M, {num_heads}, {head_dim}) with the same M of at least 1 "
                "for extra_key and extra_value"
            )


def _check_bias(bias: Tensor, num_heads: int, neighborhood: Neighborhood) -> None:
    kernel_size, stride = neighborhood.kernel_size, neighborhood.stride
    if any(size % 2 == 0 for size in kernel_size):
        limit = f"odd kernels, kernel_size is {_one_or_all(kernel_size)}"
    elif any(step > 1 for step in stride):
        limit = f"stride 1, stride is {_one_or_all(stride)}"
    elif any(neighborhood.is_causal):
        limit = f"is_causal=False, is_causal is {_one_or_all(neighborhood.is_causal)}"
    else:
        shape = (num_heads, *(2 * size - 1 for size in kernel_size))
        if tuple(bias.shape) != shape:
            raise ValueError(
                f"bias has shape {_shape(bias)}: (heads, 2 kernel_size - 1, ...) is taken, here "
                f"{shape}"
            )
        return
    raise ValueError(f"bias has shape {_shape(bias)}: a bias is taken with {limit}; leave it out")


def cast_under_autocast(tensors: Tensors) -> Tensors:
    """Cast to autocast's dtype where it is on; float64 stays, as in PyTorch's own operators."""
    device_type = tensors[0].device.type
    if device_type not in AUTOCAST_DEVICES or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        tensor.to(dtype)
        if tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
        else tensor
        for tensor in tensors
    )


def _check_alike(tensors: Tensors) -> None:
    """Raise a ValueError unless all tensors have one device and one floating-point dtype."""
    query = tensors[0]
    if not query.is_floating_point() or query.itemsize < 2:
        raise ValueError(
            f"query has dtype {query.dtype}: a floating-point dtype of at least 16 bits is taken"
        )
    for name, tensor in zip(TENSOR_NAMES[1:], tensors[1:], strict=True):
        if tensor is None:
            continue
        if tensor.dtype != query.dtype:
            raise ValueError(
                f"{name} has dtype {tensor.dtype}: the dtype of query, {query.dtype}, is taken"
            )
        if tensor.device != query.device:
            raise ValueError(
                f"{name} is on the device {tensor.device}: that of query, {query.device}, is taken"
            )

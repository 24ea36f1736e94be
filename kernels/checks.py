"""Checks of calls that operators share: each a ValueError that names the argument."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import inf
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")

# Characters of a wrong value that a message repeats.
_LONGEST = 60


def brief(value: object) -> str:
    """What a message, which is one line, says of a wrong value: long contents are left out."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {shape(value)}"
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape}"
    text = repr(value)
    return text if len(text) <= _LONGEST else f"a {type(value).__name__}"


def shape(tensor: Tensor) -> tuple[int, ...]:
    """Give the shape of a tensor as messages write it."""
    return tuple(tensor.shape)


def check_tensors(tensors: Mapping[str, Any], optional: Sequence[str] = ()) -> None:
    """Raise a ValueError unless all are tensors; the `optional` ones may be None."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) and not (name in optional and tensor is None):
            raise ValueError(f"{name} is {brief(tensor)}: a tensor is taken")


def per_axis(name: str, value: Any, num_axes: int) -> tuple[Any, ...]:
    """Give one entry an axis."""
    if not isinstance(value, (tuple, list)):
        return (value,) * num_axes
    if len(value) != num_axes:
        raise ValueError(
            f"{name} is {brief(value)}: one value, or {num_axes} of them, one an axis, is taken"
        )
    return tuple(value)


def one_or_all(values: tuple[Any, ...]) -> str:
    """What a message says of one value an axis: one alone where all are equal."""
    return brief(values[0] if len(set(map(repr, values))) == 1 else values)


def check_whole_numbers(name: str, values: tuple[Any, ...], lowest: int) -> None:
    """Raise a ValueError unless each value of an axis is a whole number of at least `lowest`."""
    for value in values:
        if not is_whole_number(value) or value < lowest:
            raise ValueError(
                f"{name} is {one_or_all(values)}: a whole number of at least {lowest}, or one an "
                "axis, is taken"
            )


def is_whole_number(value: object) -> bool:
    """Whether a value is an integer, symbolic ones included; bools are none."""
    is_integer = isinstance(value, (int, np.integer, torch.SymInt))
    return is_integer and not isinstance(value, bool)


def checked_scale(scale: float | None, head_dim: int) -> float:
    """Give the factor of the logits; raise a ValueError unless it is a finite number or None."""
    if scale is None:
        return head_dim**-0.5
    is_number = isinstance(scale, (int, float, np.number)) and not isinstance(scale, bool)
    if not is_number or not -inf < scale < inf:
        raise ValueError(f"scale is {brief(scale)}: a finite number is taken, or None")
    return float(scale)


def check_heads(query: Tensor) -> None:
    """Raise a ValueError unless there is a head, and a channel in it."""
    if 0 in query.shape[-2:]:
        raise ValueError(
            f"query has shape {shape(query)}: at least 1 head of at least 1 channel is taken"
        )


def check_maps(query: Tensor, key: Tensor) -> None:
    """Raise a ValueError unless both are (B, H, W, heads, head_dim), of a token at least."""
    if query.ndim != 5:
        raise ValueError(f"query has shape {shape(query)}: (B, H, W, heads, head_dim) is taken")
    if torch.jit.is_tracing():  # there sizes are tensors
        return
    if 0 in query.shape[1:3]:
        raise ValueError(f"query has shape {shape(query)}: a map of at least 1 token is taken")
    check_heads(query)
    if key.shape != query.shape:
        raise ValueError(
            f"key has shape {shape(key)}: the shape of query, {shape(query)}, is taken"
        )


def check_values(value: Tensor, query: Tensor) -> None:
    """Raise a ValueError unless it is (B, H, W, heads, value_dim), of a channel at least."""
    if value.shape[:-1] != query.shape[:-1] or value.shape[-1] == 0:
        raise ValueError(
            f"value has shape {shape(value)}: (B, H, W, heads, value_dim) is taken, here "
            f"({', '.join(map(str, query.shape[:-1]))}, value_dim)"
        )


def check_alike(tensors: Mapping[str, Tensor | None]) -> None:
    """Raise a ValueError unless all have the first one's device and floating-point dtype."""
    first = next(iter(tensors))
    expected = tensors[first]
    if not expected.is_floating_point() or expected.itemsize < 2:
        raise ValueError(
            f"{first} has dtype {expected.dtype}: a floating-point dtype of at least 16 bits is "
            "taken"
        )
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype != expected.dtype:
            raise ValueError(
                f"{name} has dtype {tensor.dtype}: the dtype of {first}, {expected.dtype}, is taken"
            )
        check_device(name, tensor, first, expected)


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise a ValueError unless two tensors are on one device."""
    if tensor.device != other.device:
        raise ValueError(
            f"{name} is on the device {tensor.device}: that of {other_name}, {other.device}, is "
            "taken"
        )


def cast_under_autocast(tensors: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Cast to autocast's dtype where it is on; float64 stays, as in PyTorch's own operators."""
    tensors = tuple(tensors)
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


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Give a context in which autocast casts nothing on a device, of any kind."""
    if device.type not in AUTOCAST_DEVICES:
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def can_be_read(tensor: Tensor) -> bool:
    """Whether Python may look at a tensor's numbers here.

    It may not while a compiler, an exporter or torch.jit.trace follows the call, under torch.func,
    during the capture of a CUDA graph, and of tensors without numbers.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if tensor.is_meta or isinstance(tensor, FakeTensor):
        return False
    if torch._C._functorch.get_interpreter_stack():
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())

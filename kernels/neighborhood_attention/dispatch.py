"""The public function: checks, the choice of a path, registration with PyTorch, counting.

The fast paths run inside ``torch.ops.densezoo.neighborhood_attention``, which compilers and
exporters keep as one node; its gradient is another operator. The definition in plain PyTorch is
called as it is.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from math import isfinite, prod
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import runtime
from . import cpu
from .reference import neighborhood_attention_reference
from .windows import Neighborhood, num_attention_macs

_NAME = "neighborhood_attention"
_TENSOR_NAMES = ("query", "key", "value", "bias", "extra_key", "extra_value")
_Tensors = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    *,
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    bias: Tensor | None = None,
    scale: float | None = None,
    extra_key: Tensor | None = None,
    extra_value: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from every position of a grid to a window of keys around it.

    softmax(scale * q k^T + bias) v over the window of each query, which along each axis holds
    ``kernel_size`` keys at distance ``dilation`` of one another: at the ends of the axis it is
    shifted inside, neither cut nor padded, and it always holds the query itself. An even kernel
    reaches one key further back than ahead. Windows must fit into the grid: pad it before where
    they do not.

    Backends, in order: "triton" (CUDA and ROCm, 1-D and 2-D), "cpu" (dense attention by tiles of
    queries, 1-D and 2-D), "reference" (plain PyTorch that gathers the keys of every window: any
    device, 1-D to 3-D; what torch.jit.trace and ONNX files get). All give equal results up to
    rounding, and deterministic ones, but for the reference's gradients on a GPU. Forward-mode
    and second derivatives are the reference's alone. :func:`densezoo.kernels.runtime.which_backend`
    tells which one a call takes.

    Under autocast all inputs are cast to its dtype. Softmax and lse are computed in at least
    float32.

    Args:
        query: (B, *grid, heads, head_dim), a grid of 1 to 3 axes, any strides.
        key: like query.
        value: like query.
        kernel_size: keys of a window, at least 2, for all axes or each; with ``dilation`` it
            spans kernel_size x dilation positions, at most the length of the axis.
        dilation: distance of neighbouring keys of a window, positions.
        stride: that many neighbouring queries share the window of their middle one (the last one
            where the axis is causal), 1 to kernel_size. The output has a value for every query.
        is_causal: whether a query sees no key after itself, along all axes or each.
        bias: (heads, 2 K_1 - 1, ...), added to the logit by the offset of key minus query,
            counted in steps of ``dilation``, plus K - 1; for odd kernels, stride 1, not causal.
        scale: factor of the products of query and key; by default head_dim ** -0.5.
        extra_key: (B, M, heads, head_dim), M further keys that every query sees, without bias,
            in causal attention too.
        extra_value: like extra_key.
        return_lse: whether to return the logarithm of the softmax's denominators too.
        backend: "triton", "cpu" or "reference"; by default what
            :func:`densezoo.kernels.runtime.use_backend` or DENSEZOO_BACKEND says, or the first
            that can.

    Returns:
        The output (B, *grid, heads, head_dim), contiguous; with ``return_lse`` also the natural
        logarithm (B, *grid, heads), in float32, or in float64 for float64. Both have gradients.
        An empty batch gives empty ones.

    Raises:
        ValueError: shapes, dtypes or devices do not belong together, a window does not fit into
            the grid, an argument is out of its range, or the backend that is asked for does not
            exist or cannot run the call.

    Source: Hassani et al., "Neighborhood Attention Transformer", CVPR 2023, arXiv 2204.07143;
    "Dilated Neighborhood Attention Transformer", arXiv 2209.15001; stride and causality as in
    "Generalized Neighborhood Attention", arXiv 2504.16922.
    """
    tensors, neighborhood, scale = _checked(
        query, key, value, bias, extra_key, extra_value,
        kernel_size, dilation, stride, is_causal, scale,
    )  # fmt: skip
    name = _choose_backend(tensors, neighborhood, backend).backend
    if name == "reference":
        out, lse = neighborhood_attention_reference(*tensors, neighborhood, scale)
    else:
        if torch.compiler.is_compiling() and runtime.requested_backend(backend)[0] is None:
            name = ""  # chosen when it runs
        out, lse = _OPERATOR(*tensors, *_as_lists(neighborhood), scale, name)
    return (out, lse) if return_lse else out


def _checked(
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
) -> tuple[_Tensors, Neighborhood, float]:
    """Check the arguments of a call; give its tensors (cast, under autocast), windows and scale."""
    tensors = (query, key, value, bias, extra_key, extra_value)
    for name, tensor in zip(_TENSOR_NAMES, tensors, strict=True):
        is_optional = name in _TENSOR_NAMES[3:]
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
    tensors = _cast_under_autocast(tensors)
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


def _cast_under_autocast(tensors: _Tensors) -> _Tensors:
    """Cast to autocast's dtype where it is on; float64 stays, as in PyTorch's own operators."""
    device_type = tensors[0].device.type
    is_on = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    if not is_on:
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        tensor.to(dtype)
        if tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
        else tensor
        for tensor in tensors
    )


def _check_alike(tensors: _Tensors) -> None:
    """Raise a ValueError unless all tensors have one device and one floating-point dtype."""
    query = tensors[0]
    if not query.is_floating_point():
        raise ValueError(f"query has dtype {query.dtype}: a floating-point dtype is taken")
    for name, tensor in zip(_TENSOR_NAMES[1:], tensors[1:], strict=True):
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


def _choose_backend(
    tensors: _Tensors, neighborhood: Neighborhood, backend: str | None = None
) -> runtime.Choice:
    return runtime.choose(
        _NAME,
        {
            "triton": lambda: _why_not_triton(tensors, neighborhood),
            "cpu": lambda: _why_not_cpu(tensors, neighborhood),
            "reference": lambda: None,
        },
        backend,
    )


def _why_not_triton(tensors: _Tensors, neighborhood: Neighborhood) -> str | None:
    # Asked first, so that Triton is imported only where its kernels may run.
    return runtime.why_no_triton(tensors[0].device) or _triton().why_not(*tensors, neighborhood)


def _why_not_cpu(tensors, neighborhood):
    return cpu.why_not(*tensors, neighborhood) if hasattr(cpu, "backward") else "not there yet"


def _triton() -> ModuleType:
    from . import triton

    return triton


def _explain(*args: Any, **kwargs: Any) -> runtime.Choice:
    """Give the choice for a call of :func:`neighborhood_attention` with these arguments."""
    call = inspect.signature(neighborhood_attention).bind(*args, **kwargs)
    call.apply_defaults()
    arguments = dict(call.arguments)
    backend = arguments.pop("backend")
    del arguments["return_lse"]
    tensors, neighborhood, _ = _checked(**arguments)
    return _choose_backend(tensors, neighborhood, backend)


runtime.register_chooser(neighborhood_attention, _explain)

# The operators as PyTorch's dispatcher knows them. One kernel stands for all devices; `backend`
# is the name of one, or empty: then the first that can is chosen when the operator runs, so that
# an exported program may move to another device.
_library = torch.library.Library("densezoo", "FRAGMENT")
_WINDOWS_SCHEMA = "int[] kernel_size, int[] dilation, int[] stride, bool[] is_causal, float scale"
_library.define(
    "neighborhood_attention(Tensor query, Tensor key, Tensor value, Tensor? bias, "
    f"Tensor? extra_key, Tensor? extra_value, {_WINDOWS_SCHEMA}, str backend) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "neighborhood_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, "
    "Tensor value, Tensor? bias, Tensor? extra_key, Tensor? extra_value, Tensor out, Tensor lse, "
    f"{_WINDOWS_SCHEMA}, bool needs_bias_grad, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_OPERATOR = torch.ops.densezoo.neighborhood_attention.default
_BACKWARD_OPERATOR = torch.ops.densezoo.neighborhood_attention_backward.default


def _as_lists(neighborhood: Neighborhood) -> tuple[list[int] | list[bool], ...]:
    return (
        list(neighborhood.kernel_size),
        list(neighborhood.dilation),
        list(neighborhood.stride),
        list(neighborhood.is_causal),
    )


def _fast_path(backend: str, tensors: _Tensors, neighborhood: Neighborhood) -> ModuleType:
    """Get the module that runs a call of the operator."""
    refusals = {
        "triton": lambda: _why_not_triton(tensors, neighborhood),
        "cpu": lambda: _why_not_cpu(tensors, neighborhood),
    }
    if not backend:
        backend = runtime.first_able(_NAME, refusals).backend
    return cpu if backend == "cpu" else _triton()


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    kernel_size: list[int],
    dilation: list[int],
    stride: list[int],
    is_causal: list[bool],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if query.shape[0] == 0:
        return _fake_forward(query)
    tensors = (query, key, value, bias, extra_key, extra_value)
    neighborhood = Neighborhood(
        tuple(kernel_size), tuple(dilation), tuple(stride), tuple(is_causal)
    )
    path = _fast_path(backend, tensors, neighborhood)
    return path.forward(*tensors, neighborhood, scale)


def _fake_forward(query: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """Give what the operator returns, uninitialised."""
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape), query.new_empty(query.shape[:-1], dtype=lse_dtype)


def _backward(
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
    kernel_size: list[int],
    dilation: list[int],
    stride: list[int],
    is_causal: list[bool],
    scale: float,
    needs_bias_grad: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    tensors = (query, key, value, bias, extra_key, extra_value)
    if query.shape[0] == 0:
        grads = tuple(None if tensor is None else torch.zeros_like(tensor) for tensor in tensors)
    else:
        neighborhood = Neighborhood(
            tuple(kernel_size), tuple(dilation), tuple(stride), tuple(is_causal)
        )
        path = _fast_path(backend, tensors, neighborhood)
        grads = path.backward(grad_out, grad_lse, *tensors, out, lse, neighborhood, scale)
    is_needed = (True, True, True, needs_bias_grad, True, True)
    return tuple(
        query.new_empty(0) if tensor is None or not needed else grad  # operators return no None
        for tensor, grad, needed in zip(tensors, grads, is_needed, strict=True)
    )


def _fake_backward(grad_out: Tensor, grad_lse: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    tensors, needs_bias_grad = args[:6], args[-2]
    is_needed = (True, True, True, needs_bias_grad, True, True)
    return tuple(
        args[0].new_empty(0 if tensor is None or not needed else tensor.shape)
        for tensor, needed in zip(tensors, is_needed, strict=True)
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.arguments = inputs[6:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    *tensors, out, lse = ctx.saved_tensors
    *windows_and_scale, backend = ctx.arguments
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    needed = ctx.needs_input_grad[:6]
    grads = _BACKWARD_OPERATOR(
        grad_out, grad_lse, *tensors, out, lse, *windows_and_scale, needed[3], backend
    )
    return (
        *(grad if is_needed else None for grad, is_needed in zip(grads, needed, strict=True)),
        *(None for _ in ctx.arguments),
    )


def _refuse_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError(
        "neighborhood_attention has second derivatives with backend='reference' alone: take it "
        "for calls that are differentiated twice"
    )


def _autocast(operator: torch._ops.OpOverload, device_type: str, *args: Any) -> Any:
    """Cast as autocast would and run the operator outside of it."""
    num_tensors = next(i for i, arg in enumerate(args) if isinstance(arg, (list, tuple)))
    tensors = _cast_under_autocast(args[:num_tensors])
    with torch.autocast(device_type, enabled=False):
        return operator(*tensors, *args[num_tensors:])


def _vmap_forward(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    """Fold the mapped axis into the batch; loop over it if the bias, which images share, has it."""
    if in_dims[3] is not None:
        return _vmap_loop(_OPERATOR, info, in_dims, *args)
    tensors = [
        None if tensor is None else _mapped_first(tensor, dim, info.batch_size).flatten(0, 1)
        for tensor, dim in zip(args[:3] + args[4:6], in_dims[:3] + in_dims[4:6], strict=True)
    ]
    tensors.insert(3, args[3])
    outputs = _OPERATOR(*tensors, *args[6:])
    return tuple(output.unflatten(0, (info.batch_size, -1)) for output in outputs), (0, 0)


def _mapped_first(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _vmap_loop(
    operator: torch._ops.OpOverload, info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> tuple[Any, Any]:
    """Run the operator for each entry of the mapped axis: each has its own gradient of the bias."""
    results = [
        operator(
            *(
                arg if dim is None else arg.select(dim, index)
                for arg, dim in zip(args, in_dims, strict=True)
            )
        )
        for index in range(info.batch_size)
    ]
    outputs = tuple(torch.stack(output) for output in zip(*results, strict=True))
    return outputs, (0,) * len(outputs)


def _decompose(*args: Any) -> tuple[Tensor, Tensor]:
    """Give the operator in plain PyTorch, which ONNX files are made of."""
    neighborhood = Neighborhood(*(tuple(values) for values in args[6:10]))
    return neighborhood_attention_reference(*args[:6], neighborhood, args[10])


def _forward_flops(*args: Any, **kwargs: Any) -> int:
    """FLOPs of the forward operator, 2 a multiply-accumulate; arguments are shapes."""
    return 2 * operator_macs(*args[:10])


def _backward_flops(grad_out: Any, grad_lse: Any, *args: Any, **kwargs: Any) -> int:
    """FLOPs of the gradient: the 4 products that have to be made; none is counted twice."""
    return 4 * operator_macs(*args[:6], *args[8:12])


def operator_macs(
    query: Sequence[int],
    key: Sequence[int],
    value: Sequence[int],
    bias: Sequence[int] | None,
    extra_key: Sequence[int] | None,
    extra_value: Sequence[int] | None,
    kernel_size: Sequence[int],
    *args: Any,
) -> int:
    """Count the MACs of ``torch.ops.densezoo.neighborhood_attention`` by its inputs' shapes."""
    num_extra = 0 if extra_key is None else extra_key[1]
    return num_attention_macs(
        batch=query[0],
        num_heads=query[-2],
        num_queries=prod(query[1:-2]),
        head_dim=query[-1],
        kernel_size=kernel_size,
        num_extra=num_extra,
    )


def _register(
    operator: torch._ops.OpOverload,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None,
    backward: Callable[..., Any],
    vmap: Callable[..., Any],
    flops: Callable[..., int],
) -> None:
    """Tell PyTorch what an operator computes, returns, costs, and how it is transformed."""
    name = operator.name()
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=_library)
    torch.library.register_autograd(name, backward, setup_context=setup_context, lib=_library)
    torch.library.register_vmap(name, vmap, lib=_library)
    for device_type, dispatch_key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _library.impl(name, functools.partial(_autocast, operator, device_type), dispatch_key)
    register_flop_formula(operator.overloadpacket)(flops)


_register(
    _OPERATOR,
    kernel=_forward,
    fake=_fake_forward,
    setup_context=_save_for_backward,
    backward=_differentiate,
    vmap=_vmap_forward,
    flops=_forward_flops,
)
_register(
    _BACKWARD_OPERATOR,
    kernel=_backward,
    fake=_fake_backward,
    setup_context=None,
    backward=_refuse_second_derivative,
    vmap=functools.partial(_vmap_loop, _BACKWARD_OPERATOR),
    flops=_backward_flops,
)
torch._decomp.decomposition_table[_OPERATOR] = _decompose

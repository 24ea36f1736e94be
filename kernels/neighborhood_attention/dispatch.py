"""The public function: the choice of a path, registration with PyTorch, counting.

The fast paths run inside ``torch.ops.densezoo.neighborhood_attention``, which compilers and
exporters keep as one node; its gradient is another operator. The definition in plain PyTorch is
called as it is.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from math import prod
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import runtime
from . import cpu
from .checks import Tensors, cast_under_autocast, checked_call
from .reference import neighborhood_attention_reference
from .windows import Neighborhood

_NAME = "neighborhood_attention"


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
    and second derivatives are the reference's alone. :func:`densezoo.kernels.which_backend`
    tells which one a call takes. In the reference NaN and infinite keys and values reach the
    queries that see them; in the others they may reach neighbours of these too.

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
            :func:`densezoo.kernels.use_backend` or DENSEZOO_BACKEND says, or the first
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
    tensors, neighborhood, scale = checked_call(
        query, key, value, bias, extra_key, extra_value,
        kernel_size, dilation, stride, is_causal, scale,
    )  # fmt: skip
    name = _choose_backend(tensors, neighborhood, backend).backend
    if name == "reference":
        out, lse = neighborhood_attention_reference(*tensors, neighborhood, scale)
    else:
        is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if is_traced and runtime.requested_backend(backend)[0] is None:
            name = ""  # chosen when it runs
        out, lse = _OPERATOR(*tensors, *_as_lists(neighborhood), scale, name)
    return (out, lse) if return_lse else out


def _choose_backend(
    tensors: Tensors, neighborhood: Neighborhood, backend: str | None = None
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


def _why_not_triton(tensors: Tensors, neighborhood: Neighborhood) -> str | None:
    # Asked first, so that Triton is imported only where its kernels may run.
    refusal = runtime.why_no_operator() or runtime.why_no_triton(tensors[0].device)
    return refusal or _triton().why_not(*tensors, neighborhood)


def _why_not_cpu(tensors: Tensors, neighborhood: Neighborhood) -> str | None:
    return runtime.why_no_operator() or cpu.why_not(*tensors, neighborhood)


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
    tensors, neighborhood, _ = checked_call(**arguments)
    return _choose_backend(tensors, neighborhood, backend)


runtime.register_chooser(neighborhood_attention, _explain)

# The operators as PyTorch's dispatcher knows them. One kernel stands for all devices; `backend`
# is the name of one, or empty: then the first that can is chosen when the operator runs, so that
# an exported program may move to another device.
# A process has them once: the package imported anew takes those that are there.
_library = torch.library.Library("densezoo", "FRAGMENT")
_is_first = not hasattr(torch.ops.densezoo, _NAME)
_WINDOWS_SCHEMA = "int[] kernel_size, int[] dilation, int[] stride, int[] is_causal, float scale"
if _is_first:
    _library.define(
        "neighborhood_attention(Tensor query, Tensor key, Tensor value, Tensor? bias, "
        f"Tensor? extra_key, Tensor? extra_value, {_WINDOWS_SCHEMA}, str backend) "
        "-> (Tensor, Tensor)",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    _library.define(
        "neighborhood_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, "
        "Tensor key, Tensor value, Tensor? bias, Tensor? extra_key, Tensor? extra_value, "
        f"Tensor out, Tensor lse, {_WINDOWS_SCHEMA}, bool needs_bias_grad, str backend) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
_OPERATOR = torch.ops.densezoo.neighborhood_attention.default
_BACKWARD_OPERATOR = torch.ops.densezoo.neighborhood_attention_backward.default


def _as_lists(neighborhood: Neighborhood) -> tuple[list[int], ...]:
    """Give the windows as operators take them; torch.jit.trace knows no lists of bools."""
    return (
        list(neighborhood.kernel_size),
        list(neighborhood.dilation),
        list(neighborhood.stride),
        [int(flag) for flag in neighborhood.is_causal],
    )


def _as_neighborhood(
    kernel_size: list[int], dilation: list[int], stride: list[int], is_causal: list[int]
) -> Neighborhood:
    return Neighborhood(
        tuple(kernel_size), tuple(dilation), tuple(stride), tuple(bool(flag) for flag in is_causal)
    )


def _fast_path(backend: str, tensors: Tensors, neighborhood: Neighborhood) -> ModuleType:
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
    is_causal: list[int],
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
    is_causal: list[int],
    scale: float,
    needs_bias_grad: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    tensors = (query, key, value, bias, extra_key, extra_value)
    if query.shape[0] == 0:
        grads = tuple(None if tensor is None else torch.zeros_like(tensor) for tensor in tensors)
    else:
        neighborhood = _as_neighborhood(kernel_size, dilation, stride, is_causal)
        path = _fast_path(backend, tensors, neighborhood)
        grads = path.backward(
            grad_out, grad_lse, *tensors, out, lse, neighborhood, scale, needs_bias_grad
        )
    is_needed = (True, True, True, needs_bias_grad, True, True)
    # Operators return no None, and what their fake says: contiguous tensors.
    return tuple(
        query.new_empty(0) if tensor is None or not needed else grad.contiguous()
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
    tensors = cast_under_autocast(args[:num_tensors])
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
                arg.select(dim, index) if isinstance(dim, int) else arg
                for arg, dim in zip(args, in_dims, strict=True)
            )
        )
        for index in range(info.batch_size)
    ]
    outputs = tuple(torch.stack(output) for output in zip(*results, strict=True))
    return outputs, (0,) * len(outputs)


def _decompose(*args: Any) -> tuple[Tensor, Tensor]:
    """Give the operator in plain PyTorch, which ONNX files are made of."""
    return neighborhood_attention_reference(*args[:6], _as_neighborhood(*args[6:10]), args[10])


def count_operator_macs(
    query: Sequence[int], extra_key: Sequence[int] | None, kernel_size: Sequence[int]
) -> int:
    """Count the multiply-accumulates of a forward pass: those of the logits and of the values.

    The full window counts also where attention is causal, and adding the bias does not, which is
    how NATTEN counts since 0.17. Every path does at least these, whatever it computes beside them.

    Args:
        query: shape (B, *grid, heads, head_dim).
        extra_key: shape (B, M, heads, head_dim), or None.
        kernel_size: keys of a window along each axis.
    """
    num_keys = prod(kernel_size) + (0 if extra_key is None else extra_key[1])
    return 2 * prod(query) * num_keys


def _forward_flops(*args: Any, **kwargs: Any) -> int:
    """FLOPs of the operator, 2 a multiply-accumulate; of tensors there are the shapes."""
    return 2 * count_operator_macs(args[0], args[4], args[6])


def _backward_flops(grad_out: Any, grad_lse: Any, *args: Any, **kwargs: Any) -> int:
    """FLOPs of its gradient: the 4 products that it takes; logits made again count once."""
    return 4 * count_operator_macs(args[0], args[4], args[8])


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
    _register_flop_formula(operator, flops)


def _register_flop_formula(operator: torch._ops.OpOverload, flops: Callable[..., int]) -> None:
    """Let torch.utils.flop_counter count the operator."""
    logger = logging.getLogger("torch.utils.flop_counter")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns on import where there is no Triton; ours is silent
    try:
        from torch.utils.flop_counter import register_flop_formula
    finally:
        logger.setLevel(level)
    register_flop_formula(operator.overloadpacket)(flops)


if _is_first:
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
    # What torch.onnx.export looks at. Fake tensors look at both tables, at the second one first.
    torch._decomp.decomposition_table[_OPERATOR] = _decompose
    torch._decomp.meta_table[_OPERATOR] = _fake_forward

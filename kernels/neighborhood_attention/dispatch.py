"""The public function, and what it tells PyTorch of the operator."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from types import ModuleType

from torch import Tensor

from ..operators import Operator, Shape
from . import cpu
from .checks import checked_call
from .reference import neighborhood_attention_reference
from .windows import Neighborhood


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
    out, lse = OPERATOR(tensors, neighborhood, scale, backend)
    return (out, lse) if return_lse else out


def _import_triton() -> ModuleType:
    from . import triton

    return triton


def _as_arguments(neighborhood: Neighborhood) -> tuple[list[int], ...]:
    """Give the windows as operators take them; torch.jit.trace knows no lists of bools."""
    return (
        list(neighborhood.kernel_size),
        list(neighborhood.dilation),
        list(neighborhood.stride),
        [int(flag) for flag in neighborhood.is_causal],
    )


def _make_neighborhood(
    kernel_size: list[int], dilation: list[int], stride: list[int], is_causal: list[int]
) -> Neighborhood:
    return Neighborhood(
        tuple(kernel_size), tuple(dilation), tuple(stride), tuple(bool(flag) for flag in is_causal)
    )


def _count_macs(shapes: Sequence[Shape | None], neighborhood: Neighborhood) -> int:
    """Count the multiply-accumulates of a forward pass: those of the logits and of the values.

    The full window counts also where attention is causal, and adding the bias does not, which is
    how NATTEN counts since 0.17. Every path does at least these, whatever it computes beside them.
    """
    query, *_, extra_key, _ = shapes
    num_keys = neighborhood.window_area + (0 if extra_key is None else extra_key[1])
    return 2 * prod(query) * num_keys


OPERATOR = Operator(
    "neighborhood_attention",
    tensors=(
        "Tensor query",
        "Tensor key",
        "Tensor value",
        "Tensor? bias",
        "Tensor? extra_key",
        "Tensor? extra_value",
    ),
    geometry=("int[] kernel_size", "int[] dilation", "int[] stride", "int[] is_causal"),
    make_geometry=_make_neighborhood,
    as_arguments=_as_arguments,
    import_path={"triton": _import_triton, "cpu": lambda: cpu},
    reference=neighborhood_attention_reference,
    count_macs=_count_macs,
    shared=("bias",),
    spared=("bias",),
    spared_as="shared",
)
OPERATOR.explain(neighborhood_attention, checked_call)

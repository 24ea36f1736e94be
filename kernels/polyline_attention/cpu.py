"""Polyline attention on the CPU: in blocks that fit the cache, with masks of the block alone.

Both passes take some heads of images at a time, in at least float32; `cpu_full` and `cpu_axial`
have the two forms. Prefix sums of the decays are made by either pass. The backward pass makes the
weights anew. Neither holds more of them than those of a block of queries, or in the axial form
those of the lines of one axis where these are few. Both are deterministic.
"""

from __future__ import annotations

from torch import Tensor

from .. import runtime
from . import cpu_axial, cpu_full
from .cpu_pieces import prefix_sums
from .decays import Polyline, decay_gradients, sum_dtype


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_alpha: Tensor,
    log_beta: Tensor,
    geometry: Polyline,
) -> str | None:
    """Say why this path cannot take a call; None when it can."""
    return runtime.why_no_cpu_path(query)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_alpha: Tensor,
    log_beta: Tensor,
    geometry: Polyline,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute the output and the log-sum-exp.

    Args:
        query: (B, H, W, h, D), any strides, as all inputs.
        key: like query.
        value: (B, H, W, h, E).
        log_alpha: (B, H, W, h), log decays of steps along rows.
        log_beta: like log_alpha, of steps along columns.
        geometry: form and paths.
        scale: factor of the logits.

    Returns:
        (B, H, W, h, E) and (B, H, W, h, softmaxes), the latter in float32, or in float64 for
        float64.
    """
    dtype = sum_dtype(query)
    out = query.new_empty(value.shape)
    lse = query.new_empty((*query.shape[:4], geometry.num_softmaxes), dtype=dtype)
    form = cpu_full if geometry.form == "full" else cpu_axial
    sums = prefix_sums(log_alpha, log_beta, dtype, form.HEAD_AXIS)
    form.forward(query, key, value, *sums, geometry.paths, scale, out, lse)
    return out, lse


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_alpha: Tensor,
    log_beta: Tensor,
    out: Tensor,
    lse: Tensor,
    geometry: Polyline,
    scale: float,
    needs_decay_grad: bool = True,
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of query, key, value, log_alpha and log_beta.

    Args:
        grad_out: like `out`, its cotangent, any strides.
        query: what `forward` was given, as the arguments that follow.
        key: as above.
        value: as above.
        log_alpha: as above.
        log_beta: as above.
        out: what `forward` returned, of which nothing is read.
        lse: likewise.
        geometry: form and paths.
        scale: factor of the logits.
        needs_decay_grad: whether to compute those of log_alpha and log_beta.

    Returns:
        Gradients in the dtypes of their inputs; None for what is not needed.
    """
    dtype = sum_dtype(query)
    form = cpu_full if geometry.form == "full" else cpu_axial
    sums = prefix_sums(log_alpha, log_beta, dtype, form.HEAD_AXIS)
    grads = [t.new_empty(t.shape) for t in (query, key, value)]
    grad_sums = None
    if needs_decay_grad:
        grad_sums = tuple(t.new_empty(t.shape, dtype=dtype) for t in (log_alpha, log_beta))
    form.backward(
        grad_out, query, key, value, *sums, geometry.paths, scale, dtype, *grads, grad_sums
    )
    if grad_sums is None:
        return *grads, None, None
    return *grads, *decay_gradients(*grad_sums, log_alpha, log_beta)

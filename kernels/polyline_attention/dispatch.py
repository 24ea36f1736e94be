"""The public function, and what it tells PyTorch of the operator."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from types import ModuleType

from torch import Tensor

from ..operators import Operator, Shape
from . import cpu
from .checks import checked_call
from .decays import Polyline
from .reference import polyline_attention_reference


def polyline_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_alpha: Tensor,
    log_beta: Tensor,
    *,
    form: str = "full",
    paths: str = "both",
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attend from every token of a map to tokens along paths whose every step decays.

    Token (i, j) sees token (k, l) along two paths of at most two straight lines: along its row i
    to column l and then along that column to row k, or along its column j to row k and then along
    that row to column l. A step along a row multiplies by exp(log_alpha), one along a column by
    exp(log_beta), of that of its two tokens that has the higher index; so the first column of
    log_alpha and the first row of log_beta have no effect. With S = scale * q k^T, M the sums of
    log decays along the row-first paths and M' along the column-first ones::

        form="full", paths="both"         (softmax(S + M) + softmax(S + M')) / 2 v
        form="full", paths="row_first"    softmax(S + M) v
        form="axial", paths="both"        (Ah (Aw v) + Aw (Ah v)) / 2
        form="axial", paths="row_first"   Ah (Aw v)

    where Aw is the softmax of S + M over the tokens of the query's row, Ah that over those of its
    column. Maps of one row, one column or one token are taken, and empty batches.

    Backends, in order: "triton" (CUDA and ROCm), "cpu", "reference" (plain PyTorch that makes the
    masks: any device; what torch.jit.trace and ONNX files get). All give equal results up to
    rounding, and deterministic ones. Forward-mode and second derivatives are the reference's
    alone. :func:`densezoo.kernels.which_backend` tells which one a call takes. Where the decays
    of two tokens tie, gradients are those of the sums of decays between them.

    Under autocast query, key and value are cast to its dtype, decays are not. Sums of decays,
    masks and softmaxes are computed in at least float32.

    Args:
        query: (B, H, W, heads, head_dim), any strides.
        key: like query.
        value: (B, H, W, heads, value_dim).
        log_alpha: (B, H, W, heads), logarithms of the decays of steps along rows, finite numbers
            of at most 0 whose sums along lines are finite, in float32 or query's dtype. Their
            range is checked in eager mode alone, where the check makes a GPU wait; under compilers,
            exporters and torch.func what other numbers give is undefined.
        log_beta: like log_alpha, of steps along columns.
        form: "full" or "axial".
        paths: "both" or "row_first".
        scale: factor of the products of query and key; by default head_dim ** -0.5.
        backend: "triton", "cpu" or "reference"; by default what
            :func:`densezoo.kernels.use_backend` or DENSEZOO_BACKEND says, or the first
            that can.

    Returns:
        The output (B, H, W, heads, value_dim), contiguous.

    Raises:
        ValueError: shapes, dtypes or devices do not belong together, an argument is out of its
            range, or the backend that is asked for does not exist or cannot run the call.

    Source: Zhao et al., "Polyline Path Masked Attention for Vision Transformer", NeurIPS 2025,
    arXiv 2506.15940; one path alone is that of Fan et al., "RMT: Retentive Networks Meet Vision
    Transformers", CVPR 2024, arXiv 2309.11523.
    """
    tensors, geometry, scale = checked_call(
        query, key, value, log_alpha, log_beta, form, paths, scale
    )
    return OPERATOR(tensors, geometry, scale, backend)[0]


def attend_with_decays(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_alpha: Tensor,
    log_beta: Tensor,
    *,
    form: str = "full",
    paths: str = "both",
    scale: float | None = None,
) -> Tensor:
    """Compute :func:`polyline_attention` without a look at the arguments.

    For what belongs together, has one dtype (under autocast its own) and negative decays as it is
    made: a look takes time in every call, and a GPU would wait for the range of the decays.
    """
    tensors = (query, key, value, log_alpha, log_beta)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return OPERATOR(tensors, Polyline(form, paths), scale, None)[0]


def _import_triton() -> ModuleType:
    from . import triton

    return triton


def _as_arguments(geometry: Polyline) -> tuple[str, str]:
    return geometry.form, geometry.paths


def _lse_axes(geometry: Polyline) -> tuple[int]:
    return (geometry.num_softmaxes,)


def _count_macs(shapes: Sequence[Shape], geometry: Polyline) -> int:
    """Count the multiply-accumulates of a forward pass: those of the logits and of the values.

    The definition's: in the full form the mean of two softmaxes meets the values once.
    """
    query, _, value, _, _ = shapes
    _, height, width, _, head_dim = query
    value_dim = value[4]
    if geometry.form == "full":
        return prod(query[:4]) * height * width * (head_dim + value_dim)
    num_products = 2 if geometry.paths == "both" else 1
    return prod(query[:4]) * (height + width) * (head_dim + num_products * value_dim)


OPERATOR = Operator(
    "polyline_attention",
    tensors=(
        "Tensor query",
        "Tensor key",
        "Tensor value",
        "Tensor log_alpha",
        "Tensor log_beta",
    ),
    geometry=("str form", "str paths"),
    make_geometry=Polyline,
    as_arguments=_as_arguments,
    import_path={"triton": _import_triton, "cpu": lambda: cpu},
    reference=polyline_attention_reference,
    count_macs=_count_macs,
    spared=("log_alpha", "log_beta"),
    spared_as="decay",
    uncast=("log_alpha", "log_beta"),
    has_lse_grad=False,
    lse_axes=_lse_axes,
)
OPERATOR.explain(polyline_attention, checked_call)

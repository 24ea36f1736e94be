"""Polyline attention on Triton kernels: what can run, the launches, and their tuning.

The kernels are in :mod:`.triton_forward` and :mod:`.triton_backward`, which has those of
:mod:`.triton_backward_axial` too. They are imported when one is launched: importing this module
does not import Triton. Nothing of the size of a mask is in memory; prefix sums of decays, and the
sums of their gradients, are PyTorch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import runtime, triton_launch
from ..triton_launch import Tiling
from .decays import Polyline, decay_gradients, prefix_sums

# Columns of the least tile, each of which has a slot for what it adds to the others of its row.
_SLOT = 16

# The longest rows of a kind; others are "long".
_LENGTHS = {"short": 16, "medium": 32}

# Arguments of a kernel of gradients that leave it with none but the values'.
_NO_GRADIENTS = dict.fromkeys(
    ("middle_ptr", "grad_middle_ptr", "shared_ptr", "grad_key_ptr", "added_key_ptr")
    + ("added_value_ptr", "grad_sums_ptr")
)

# In the interpreter nothing is tuned. A tile of the full form has two slots.
_INTERPRETED = {"full": Tiling(32, 16, 1, 1), "axial": Tiling(16, 16, 1, 1)}

# What kernels are tuned over: by vendor, bytes of a number, and heads ("narrow" up to 32 channels,
# "wide" up to 64, "widest"), and by rows' length. All were compiled for sm_80, sm_90 and sm_100, or
# for gfx942; what spilled registers on one was dropped.
_TILINGS = {
    ("cuda", 2, "narrow"): {
        "short": ((16, 16, 1, 2), (16, 16, 2, 2)),
        "medium": ((16, 32, 2, 2), (32, 32, 4, 2), (32, 16, 2, 2)),
        "long": ((16, 32, 2, 2), (32, 32, 4, 2), (64, 32, 4, 2), (64, 32, 8, 2)),
    },
    ("cuda", 2, "wide"): {
        "short": ((16, 16, 2, 2),),
        "medium": ((16, 32, 2, 2), (32, 32, 4, 2)),
        "long": ((32, 32, 4, 2), (64, 32, 8, 2)),
    },
    ("cuda", 2, "widest"): {
        "short": ((16, 16, 4, 2),),
        "medium": ((16, 32, 4, 2), (32, 32, 8, 2)),
        "long": ((32, 32, 8, 2), (64, 32, 8, 2)),
    },
    ("cuda", 4, "narrow"): {
        "short": ((16, 16, 2, 2),),
        "medium": ((16, 32, 4, 2), (32, 32, 4, 2)),
        "long": ((32, 16, 4, 2), (32, 32, 4, 2), (64, 32, 8, 2)),
    },
    ("cuda", 4, "wide"): {
        "short": ((16, 16, 8, 2),),
        "medium": ((16, 32, 4, 2), (32, 16, 4, 2)),
        "long": ((32, 16, 4, 2), (32, 32, 8, 2)),
    },
    ("cuda", 4, "widest"): {
        "short": ((16, 16, 4, 2),),
        "medium": ((16, 16, 4, 2), (32, 16, 8, 2)),
        "long": ((32, 16, 8, 2),),
    },
}
# The same of the full form's backward kernels, which hold most, for CUDA.
_FULL_BACKWARD_TILINGS = {
    (2, "narrow"): {
        "short": ((16, 16, 2, 2),),
        "medium": ((16, 16, 2, 2), (16, 32, 2, 2)),
        "long": ((16, 16, 2, 2), (16, 32, 2, 2)),
    },
    (2, "wide"): {
        "short": ((16, 16, 4, 2),),
        "medium": ((16, 32, 4, 2),),
        "long": ((16, 16, 4, 2), (16, 32, 4, 2)),
    },
    (2, "widest"): {
        "short": ((16, 16, 4, 2),),
        "medium": ((16, 16, 4, 2),),
        "long": ((16, 16, 4, 2), (16, 32, 8, 2)),
    },
    (4, "narrow"): {
        "short": ((16, 16, 4, 2),),
        "medium": ((16, 16, 4, 2),),
        "long": ((16, 16, 4, 2),),
    },
    (4, "wide"): {
        "short": ((16, 16, 8, 2),),
        "medium": ((16, 16, 8, 2),),
        "long": ((16, 16, 8, 2),),
    },
    (4, "widest"): {
        "short": ((16, 16, 8, 2),),
        "medium": ((16, 16, 8, 2),),
        "long": ((16, 16, 8, 2),),
    },
}
_TILINGS_OF_HIP = {
    "short": ((16, 16, 1, 2),),
    "medium": ((16, 16, 1, 2), (32, 16, 2, 2)),
    "long": ((32, 16, 2, 2), (64, 16, 4, 2)),
}
for _bytes in (2, 4):
    for _heads in ("narrow", "wide"):
        _TILINGS["hip", _bytes, _heads] = _TILINGS_OF_HIP
    _TILINGS["hip", _bytes, "widest"] = _TILINGS_OF_HIP | {
        "short": ((16, 16, 2, 2),),
        "medium": ((16, 16, 2, 2), (32, 16, 2, 2)),
    }


def tilings(
    kernel: str, shape: str, dtype: torch.dtype, channels: int, vendor: str
) -> tuple[Tiling, ...]:
    """List the divisions that a kernel is tuned over on a GPU.

    Args:
        kernel: name of the kernel.
        shape: "short" for rows of up to 16 tokens, "medium" for up to 32, "long" for more; a
            column is a row of the transposed map.
        dtype: dtype of the tokens.
        channels: channels of a head, of keys or values, the more of them.
        vendor: "cuda" or "hip".
    """
    if runtime.is_interpreted():
        return (_INTERPRETED["axial" if "_line_" in kernel else "full"],)
    heads = triton_launch.width_of_heads(channels)
    found = _TILINGS[vendor, dtype.itemsize, heads]
    if vendor == "cuda" and kernel in ("_backward_query_kernel", "_backward_key_kernel"):
        found = _FULL_BACKWARD_TILINGS[dtype.itemsize, heads]
    return tuple(Tiling(*row) for row in found[shape])


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_alpha: Tensor,
    log_beta: Tensor,
    geometry: Polyline,
) -> str | None:
    """Tell why the kernels cannot run this call, or None if they can."""
    return triton_launch.why_not(query, head_dim=query.shape[-1], value_dim=value.shape[-1])


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_alpha: Tensor,
    log_beta: Tensor,
    geometry: Polyline,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute the output and the log-sum-exps, as the reference does.

    Args:
        query: (B, H, W, heads, head_dim); any strides, as all inputs.
        key: like query.
        value: (B, H, W, heads, value_dim).
        log_alpha: (B, H, W, heads), log decays of steps along rows.
        log_beta: like log_alpha, of steps along columns.
        geometry: form and paths.
        scale: factor of the logits.

    Returns:
        The output (B, H, W, heads, value_dim), contiguous; the natural logarithms of the softmaxes'
        denominators (B, H, W, heads, softmaxes), float32.
    """
    out = query.new_empty(value.shape)
    lse = query.new_empty((*query.shape[:-1], geometry.num_softmaxes), dtype=torch.float32)
    sums = prefix_sums(log_alpha, log_beta, torch.float32)
    if geometry.form == "full":
        call = _make_full_call(query, key, value, sums, geometry, scale)
        call.launch_tiled("_forward_kernel", out_ptr=out, lse_ptr=lse)
        return out, lse
    rows, columns = (_LineCall(query, key, value, sums, axis, scale) for axis in (0, 1))
    across = rows.attend(value, lse=lse)
    if geometry.paths == "row_first":
        return columns.attend(across, lse=lse), lse
    down, down_across = torch.empty_like(out), torch.empty_like(out)
    columns.attend(value, out=down, second_value=across, second_out=down_across, lse=lse)
    return rows.attend(down, out=out, other=down_across), lse


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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Compute the gradients of query, key, value, log_alpha and log_beta.

    They are deterministic: every sum is made in a fixed order.

    Args:
        grad_out: cotangent of the output, any strides.
        query: as in :func:`forward`, like all that follow.
        key: see there.
        value: see there.
        log_alpha: see there.
        log_beta: see there.
        out: what the forward pass returned, of which nothing is read.
        lse: what the forward pass returned.
        geometry: form and paths.
        scale: factor of the logits.
        needs_decay_grad: whether to compute those of log_alpha and log_beta.

    Returns:
        The gradients, contiguous, in the inputs' dtypes; None for what is not needed.
    """
    sums = prefix_sums(log_alpha, log_beta, torch.float32)
    lse = lse.contiguous()
    if geometry.form == "full":
        call = _make_full_call(query, key, value, sums, geometry, scale)
        grads = _differentiate_fully(call, query, key, value, grad_out, lse, needs_decay_grad)
    else:
        lines = [_LineCall(query, key, value, sums, axis, scale) for axis in (0, 1)]
        differentiate = _differentiate_both if geometry.paths == "both" else _differentiate_one
        grads = differentiate(*lines, grad_out, lse, needs_decay_grad)
    *grads, grad_rows, grad_columns = grads
    if not needs_decay_grad:
        return *grads, None, None
    return *grads, *decay_gradients(grad_rows, grad_columns, log_alpha, log_beta)


class _Call(triton_launch.Call):
    """The launches of a call's kernels on tokens as they see them."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, arguments: dict[str, Any]
    ) -> None:
        self.height, self.width = query.shape[1:3]
        head_dim, value_dim = query.shape[-1], value.shape[-1]
        arguments = arguments | {
            "scale": scale,
            "height": self.height,
            "width": self.width,
            "HEAD_DIM": head_dim,
            "VALUE_DIM": value_dim,
            "BLOCK_D": triton_launch.block_of_channels(head_dim),
            "BLOCK_V": triton_launch.block_of_channels(value_dim),
        }
        shape = next((name for name, most in _LENGTHS.items() if self.width <= most), "long")
        super().__init__("polyline_attention", shape, query, max(head_dim, value_dim), arguments)
        self.add_tokens(query=query, key=key, value=value)

    def num_tiles(self, options: dict[str, int]) -> int:
        """Count the tiles of an image."""
        return self.height * -(-self.width // options["TILE"])


def _make_full_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sums: tuple[Tensor, Tensor],
    geometry: Polyline,
    scale: float,
) -> _Call:
    """Make the call of the full form's kernels; the sums are (B, H, W, heads)."""
    call = _Call(query, key, value, scale, {"IS_BOTH": geometry.paths == "both"})
    row_sums, column_sums = (x.permute(0, 3, 1, 2) for x in sums)
    call.add_tables(row_sums=row_sums, column_sums=column_sums)
    return call


def _differentiate_fully(
    call: _Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    lse: Tensor,
    needs_decay_grad: bool,
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of query, key, value and the prefix sums, (B, H, W, heads)."""
    grad_query, grad_key, grad_value = (
        tokens.new_empty(tokens.shape) for tokens in (query, key, value)
    )
    slots = -(-call.width // _SLOT)
    parts = None
    if needs_decay_grad:
        maps = (call.batch_size, call.num_heads, 2)
        parts = lse.new_empty((*maps, call.height, 2 + 2 * slots, call.width))
    call.add_tokens(grad_out=grad_out)
    shared = torch.empty_like(lse)
    call.arguments |= dict(lse_ptr=lse, shared_ptr=shared, parts_ptr=parts, slots=slots)
    call.launch_tiled("_backward_query_kernel", grad_query_ptr=grad_query)
    call.launch_tiled("_backward_key_kernel", grad_key_ptr=grad_key, grad_value_ptr=grad_value)
    if parts is None:
        return grad_query, grad_key, grad_value, None, None
    return grad_query, grad_key, grad_value, *parts.sum(4).permute(2, 0, 3, 4, 1)


class _LineCall(_Call):
    """The launches of the axial form along one axis; kernels see columns as rows.

    Args:
        query: as in :func:`forward`, like what follows.
        key: see there.
        value: see there.
        sums: prefix sums along rows and columns, (B, H, W, heads).
        axis: 0 for rows, 1 for columns.
        scale: factor of the logits.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sums: tuple[Tensor, Tensor],
        axis: int,
        scale: float,
    ) -> None:
        _, _, width, num_heads, _ = query.shape
        steps = (num_heads, width * num_heads) if axis else (width * num_heads, num_heads)
        arguments = {"AXIS": axis, "tokens_h": steps[0], "tokens_w": steps[1]}
        self.tokens = query, key, value
        self.axis = axis
        super().__init__(*(self._seen(x) for x in self.tokens), scale, arguments)
        self.add_tables(sums=self._seen(sums[axis]).permute(0, 3, 1, 2))

    def _seen(self, tokens: Tensor) -> Tensor:
        return tokens.transpose(1, 2) if self.axis else tokens

    def attend(
        self,
        value: Tensor,
        *,
        out: Tensor | None = None,
        second_value: Tensor | None = None,
        second_out: Tensor | None = None,
        other: Tensor | None = None,
        lse: Tensor | None = None,
    ) -> Tensor:
        """Attend along the lines.

        Args:
            value: (B, H, W, heads, value_dim), any strides.
            out: what is filled, like all that follow contiguous; made by default.
            second_value: further values of the tokens.
            second_out: what is filled with their sums.
            other: what the output is made the mean of, with the attention.
            lse: (B, H, W, heads, 2), whose entry of the axis is filled.
        """
        if out is None:
            out = value.new_empty(value.shape)
        self.add_tokens(value=self._seen(value))
        self.launch_tiled(
            "_forward_line_kernel",
            out_ptr=out,
            second_value_ptr=second_value,
            second_out_ptr=second_out,
            other_ptr=other,
            lse_ptr=lse,
        )
        return out

    def spread(self, grad_out: Tensor, lse: Tensor) -> Tensor:
        """Multiply a cotangent, of any strides, with the transposed softmax."""
        self.add_tokens(grad_out=self._seen(grad_out))
        result = grad_out.new_empty(grad_out.shape)
        self.launch_tiled(
            "_backward_line_key_kernel", lse_ptr=lse, grad_value_ptr=result, **_NO_GRADIENTS
        )
        return result

    def differentiate(
        self,
        lse: Tensor,
        needs_decay_grad: bool,
        *,
        grad_out: Tensor | None = None,
        middle: Tensor | None = None,
        grad_middle: Tensor | None = None,
        added: Sequence[Tensor | None] = (None, None, None),
    ) -> tuple[Tensor | None, ...]:
        """Compute gradients of query, key, value and the prefix sums along the lines.

        Args:
            lse: what the forward pass gave.
            needs_decay_grad: whether to compute the last of them.
            grad_out: cotangent of the lines' attention to `middle`, any strides.
            middle: what the other axis gave, or None: then lines attend to the values alone.
            grad_middle: cotangent of the lines' attention to the values, or None: then there is
                none, and `middle` stands for the values in the results. With both, the results
                are halved, as those of the mean of two orders.
            added: gradients of query, key and value that the first three are added to.

        Returns:
            The gradients; that of the sums is (B, H, W, heads).
        """
        query, key, value = self.tokens
        grad_query, grad_key, grad_value = (x.new_empty(x.shape) for x in self.tokens)
        grad_sums = (None, None)
        if needs_decay_grad:
            shape = (2, self.batch_size, self.num_heads, self.height, self.width)
            grad_sums = lse.new_empty(shape)
        self.add_tokens(
            grad_out=self._seen(grad_middle if grad_out is None else grad_out),
            value=self._seen(value),
        )
        self.arguments |= dict(
            lse_ptr=lse,
            shared_ptr=lse.new_empty(lse.shape[:-1]),
            middle_ptr=middle,
            grad_middle_ptr=grad_middle,
        )
        self.launch_tiled(
            "_backward_line_query_kernel",
            added_query_ptr=added[0],
            grad_query_ptr=grad_query,
            grad_sums_ptr=grad_sums[0],
        )
        self.launch_tiled(
            "_backward_line_key_kernel",
            added_key_ptr=added[1],
            added_value_ptr=added[2],
            grad_key_ptr=grad_key,
            grad_value_ptr=grad_value,
            grad_sums_ptr=grad_sums[1],
        )
        if not needs_decay_grad:
            return grad_query, grad_key, grad_value, None
        return grad_query, grad_key, grad_value, self._seen(grad_sums.sum(0).permute(0, 2, 3, 1))


def _differentiate_one(
    rows: _LineCall, columns: _LineCall, grad_out: Tensor, lse: Tensor, needs_decay_grad: bool
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of query, key, value and the prefix sums of Ah (Aw v)."""
    across = rows.attend(rows.tokens[2])
    grad_query, grad_key, grad_across, grad_columns = columns.differentiate(
        lse, needs_decay_grad, grad_out=grad_out, middle=across
    )
    *grads, grad_rows = rows.differentiate(
        lse, needs_decay_grad, grad_middle=grad_across, added=(grad_query, grad_key, None)
    )
    return *grads, grad_rows, grad_columns


def _differentiate_both(
    rows: _LineCall, columns: _LineCall, grad_out: Tensor, lse: Tensor, needs_decay_grad: bool
) -> tuple[Tensor | None, ...]:
    """Compute those of (Ah (Aw v) + Aw (Ah v)) / 2."""
    *partial, grad_rows = rows.differentiate(
        lse,
        needs_decay_grad,
        grad_out=grad_out,
        middle=columns.attend(columns.tokens[2]),
        grad_middle=columns.spread(grad_out, lse),
    )
    *grads, grad_columns = columns.differentiate(
        lse,
        needs_decay_grad,
        grad_out=grad_out,
        middle=rows.attend(rows.tokens[2]),
        grad_middle=rows.spread(grad_out, lse),
        added=partial,
    )
    return *grads, grad_rows, grad_columns

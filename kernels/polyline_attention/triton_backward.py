"""The Triton kernels of the full form's backward pass.

They make masks, logits and weights anew:

- ``_backward_query_kernel``: a program owns a tile of queries of one row and walks twice through
  all keys, first for the mean of the weights' gradients, which those of the logits of a path share.
  It stores these means for the other kernel. That of a path is no product with its output: of two
  paths there is the mean alone, and its rounding would tell in half precision.
- ``_backward_key_kernel``: a program owns a tile of keys of one row and walks through all queries.

The kernels of the axial form, in :mod:`.triton_backward_axial`, go by what follows too. Gradients
of decays begin as those of prefix sums. The sign that a mask has in them is that of the difference
of columns or rows, also where tokens tie. Weights sum to 1 but for the rounding of lse; means are
divided by their sum, as a logit's gradient is a small difference where its weight is near 1. There
are no atomics: what programs of one row sum for the same tokens lies in slots, which the caller
adds.
"""

import triton
import triton.language as tl

from ..triton_tokens import load_tokens, store_tokens, token_offset

# Launches look for all backward kernels here, by their names.
from .triton_backward_axial import (  # noqa: F401
    _backward_line_key_kernel,
    _backward_line_query_kernel,
)
from .triton_forward import (
    _columns,
    _find_own_row,
    _line_mask,
    _own_column_mask,
    _own_row_mask,
    _row_number,
    _sign,
)

# Columns of the least tile: a slot.
SLOT = tl.constexpr(16)


@triton.jit
def _store_others(parts_ptr, sums, slots, first_own, other, exists, width, TILE: tl.constexpr):
    """Store what a tile sums for a block of its row's columns, and 0 in the tile's further slots.

    Tiles of any size so fill the slots of their row.
    """
    number = tl.arange(0, TILE // SLOT)
    slot = first_own // SLOT + number
    values = tl.where(number[:, None] == 0, sums[None, :], 0.0)
    is_slot = (slot < slots)[:, None] & exists[None, :]
    tl.store(parts_ptr + slot[:, None] * width + other[None, :], values, mask=is_slot)


@triton.jit
def _store_decay_block(
    parts_ptr,
    plane,
    row_grads,
    step_grads,
    column,
    first_own,
    other,
    exists,
    slots,
    width,
    TILE: tl.constexpr,
):
    """Store what a block of columns gives the prefix sums of the own row, P and then R.

    Returns the sums of the own tokens, for P.
    """
    signed = row_grads * _sign(column[:, None] - other[None, :])
    _store_others(parts_ptr, -tl.sum(signed, 0), slots, first_own, other, exists, width, TILE)
    steps = tl.sum(step_grads, 0)
    _store_others(parts_ptr + plane, steps, slots, first_own, other, exists, width, TILE)
    return tl.sum(signed, 1)


@triton.jit
def _backward_query_kernel(
    grad_out_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    row_sums_ptr,
    column_sums_ptr,
    lse_ptr,
    shared_ptr,
    grad_query_ptr,
    parts_ptr,
    grad_out_stride_b,
    grad_out_stride_h,
    grad_out_stride_w,
    grad_out_stride_n,
    grad_out_stride_d,
    query_stride_b,
    query_stride_h,
    query_stride_w,
    query_stride_n,
    query_stride_d,
    key_stride_b,
    key_stride_h,
    key_stride_w,
    key_stride_n,
    key_stride_d,
    value_stride_b,
    value_stride_h,
    value_stride_w,
    value_stride_n,
    value_stride_d,
    scale,
    num_heads,
    height,
    width,
    slots,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    IS_BOTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the gradient of a tile of queries, and for each path the mean -w dw over its keys.

    ``parts_ptr``: (B, heads, 2, H, 2 + 2 slots, W), gradients of P and R. Of a row this kernel
    fills the first slots, with what tiles sum for any columns, and the next, with sums of the
    queries; the key kernel fills the others likewise.
    """
    batch, head, row, first_own = _find_own_row(num_heads, height, width, TILE)
    column, is_query = _columns(first_own, width, TILE)
    grad_out_ptr += batch * grad_out_stride_b + head * grad_out_stride_n
    query_ptr += batch * query_stride_b + head * query_stride_n
    key_ptr += batch * key_stride_b + head * key_stride_n
    value_ptr += batch * value_stride_b + head * value_stride_n
    map_offset = (batch * num_heads + head) * height * width
    row_sums_ptr += map_offset
    column_sums_ptr += map_offset
    own_place = row * width + column
    q_offset = token_offset(row, column, query_stride_h, query_stride_w)
    q = load_tokens(query_ptr, q_offset, query_stride_d, HEAD_DIM, BLOCK_D)
    do_offset = token_offset(row, column, grad_out_stride_h, grad_out_stride_w)
    do = load_tokens(grad_out_ptr, do_offset, grad_out_stride_d, VALUE_DIM, BLOCK_V)
    token = token_offset(batch * height + row, column, width * num_heads, num_heads) + head
    own_sums = tl.load(row_sums_ptr + own_place)

    entry = token * (2 if IS_BOTH else 1)
    lse = tl.load(lse_ptr + entry)
    total = tl.zeros([TILE, BLOCK], tl.float32)
    products = tl.zeros([TILE, BLOCK], tl.float32)
    if IS_BOTH:
        column_lse = tl.load(lse_ptr + entry + 1)
        column_total = tl.zeros([TILE, BLOCK], tl.float32)
        column_products = tl.zeros([TILE, BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        other, is_key = _columns(first, width, BLOCK)
        across = row * width + other
        line_mask = _line_mask(own_sums, tl.load(row_sums_ptr + across))
        for other_row in range(0, height):
            place = other_row * width + other
            number = _row_number(other_row)
            k_offset = token_offset(number, other, key_stride_h, key_stride_w)
            k = load_tokens(key_ptr, k_offset, key_stride_d, HEAD_DIM, BLOCK_D)
            v_offset = token_offset(number, other, value_stride_h, value_stride_w)
            v = load_tokens(value_ptr, v_offset, value_stride_d, VALUE_DIM, BLOCK_V)
            logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            logits = tl.where(is_key[None, :], logits, float("-inf"))
            grad_weights = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            mask = _own_row_mask(line_mask, column_sums_ptr, across, place)
            weights = tl.exp(logits + mask - lse[:, None])
            total += weights
            products += weights * grad_weights
            if IS_BOTH:
                beside = other_row * width + column
                mask = _own_column_mask(row_sums_ptr, column_sums_ptr, own_place, beside, place)
                weights = tl.exp(logits + mask - column_lse[:, None])
                column_total += weights
                column_products += weights * grad_weights
    shared = -tl.sum(products, 1) / tl.sum(total, 1)
    tl.store(shared_ptr + entry, shared, mask=is_query)
    if IS_BOTH:
        column_shared = -tl.sum(column_products, 1) / tl.sum(column_total, 1)
        tl.store(shared_ptr + entry + 1, column_shared, mask=is_query)

    share = 0.5 if IS_BOTH else 1.0
    plane = height * (2 + 2 * slots) * width
    if parts_ptr is not None:
        parts_ptr += map_offset * (4 + 4 * slots) + row.to(tl.int64) * (2 + 2 * slots) * width
    grad_query = tl.zeros([TILE, BLOCK_D], tl.float32)
    grad_own_row = tl.zeros([TILE], tl.float32)
    grad_own_column = tl.zeros([TILE, BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        other, is_key = _columns(first, width, BLOCK)
        exists = is_query[:, None] & is_key[None, :]
        across = row * width + other
        line_mask = _line_mask(own_sums, tl.load(row_sums_ptr + across))
        row_grads = tl.zeros([TILE, BLOCK], tl.float32)
        step_grads = tl.zeros([TILE, BLOCK], tl.float32)
        for other_row in range(0, height):
            place = other_row * width + other
            number = _row_number(other_row)
            k_offset = token_offset(number, other, key_stride_h, key_stride_w)
            k = load_tokens(key_ptr, k_offset, key_stride_d, HEAD_DIM, BLOCK_D)
            v_offset = token_offset(number, other, value_stride_h, value_stride_w)
            v = load_tokens(value_ptr, v_offset, value_stride_d, VALUE_DIM, BLOCK_V)
            logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            logits = tl.where(exists, logits, float("-inf"))
            grad_weights = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            mask = _own_row_mask(line_mask, column_sums_ptr, across, place)
            grad_logits = tl.exp(logits + mask - lse[:, None]) * (grad_weights + shared[:, None])
            step = _sign(row - other_row)
            if parts_ptr is not None:
                row_grads += grad_logits
                step_grads += grad_logits * step
            if IS_BOTH:
                beside = other_row * width + column
                mask = _own_column_mask(row_sums_ptr, column_sums_ptr, own_place, beside, place)
                weights = tl.exp(logits + mask - column_lse[:, None])
                column_grads = weights * (grad_weights + column_shared[:, None])
                if parts_ptr is not None:
                    grad_own_column += column_grads * step
                grad_logits += column_grads
            grad_query += tl.dot(grad_logits.to(k.dtype), k, input_precision=PRECISION)
        if parts_ptr is not None:
            grad_own_row += _store_decay_block(
                parts_ptr,
                plane,
                row_grads * share,
                step_grads * share,
                column,
                first_own,
                other,
                is_key,
                slots,
                width,
                TILE,
            )

    grad_query *= scale * share
    store_tokens(grad_query_ptr, token * HEAD_DIM, grad_query, is_query, HEAD_DIM, BLOCK_D)
    if parts_ptr is not None:
        parts_ptr += slots * width + column
        tl.store(parts_ptr, grad_own_row, mask=is_query)
        tl.store(parts_ptr + plane, tl.sum(grad_own_column, 1) * share, mask=is_query)


@triton.jit
def _backward_key_kernel(
    grad_out_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    row_sums_ptr,
    column_sums_ptr,
    lse_ptr,
    shared_ptr,
    grad_key_ptr,
    grad_value_ptr,
    parts_ptr,
    grad_out_stride_b,
    grad_out_stride_h,
    grad_out_stride_w,
    grad_out_stride_n,
    grad_out_stride_d,
    query_stride_b,
    query_stride_h,
    query_stride_w,
    query_stride_n,
    query_stride_d,
    key_stride_b,
    key_stride_h,
    key_stride_w,
    key_stride_n,
    key_stride_d,
    value_stride_b,
    value_stride_h,
    value_stride_w,
    value_stride_n,
    value_stride_d,
    scale,
    num_heads,
    height,
    width,
    slots,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    IS_BOTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the gradients of a tile of keys and their values; logits are (keys, queries)."""
    batch, head, row, first_own = _find_own_row(num_heads, height, width, TILE)
    column, is_key = _columns(first_own, width, TILE)
    grad_out_ptr += batch * grad_out_stride_b + head * grad_out_stride_n
    query_ptr += batch * query_stride_b + head * query_stride_n
    key_ptr += batch * key_stride_b + head * key_stride_n
    value_ptr += batch * value_stride_b + head * value_stride_n
    map_offset = (batch * num_heads + head) * height * width
    row_sums_ptr += map_offset
    column_sums_ptr += map_offset
    own_place = row * width + column
    k_offset = token_offset(row, column, key_stride_h, key_stride_w)
    k = load_tokens(key_ptr, k_offset, key_stride_d, HEAD_DIM, BLOCK_D)
    v_offset = token_offset(row, column, value_stride_h, value_stride_w)
    v = load_tokens(value_ptr, v_offset, value_stride_d, VALUE_DIM, BLOCK_V)
    own_sums = tl.load(row_sums_ptr + own_place)

    share = 0.5 if IS_BOTH else 1.0
    num_softmaxes = 2 if IS_BOTH else 1
    plane = height * (2 + 2 * slots) * width
    if parts_ptr is not None:
        parts_ptr += map_offset * (4 + 4 * slots) + row.to(tl.int64) * (2 + 2 * slots) * width
        parts_ptr += (slots + 1) * width
    grad_key = tl.zeros([TILE, BLOCK_D], tl.float32)
    grad_value = tl.zeros([TILE, BLOCK_V], tl.float32)
    grad_own_row = tl.zeros([TILE], tl.float32)
    grad_own_column = tl.zeros([TILE, BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        other, is_query = _columns(first, width, BLOCK)
        exists = is_key[:, None] & is_query[None, :]
        across = row * width + other
        line_mask = _line_mask(own_sums, tl.load(row_sums_ptr + across))
        row_grads = tl.zeros([TILE, BLOCK], tl.float32)
        step_grads = tl.zeros([TILE, BLOCK], tl.float32)
        for other_row in range(0, height):
            place = other_row * width + other
            beside = other_row * width + column
            number = _row_number(other_row)
            q_offset = token_offset(number, other, query_stride_h, query_stride_w)
            q = load_tokens(query_ptr, q_offset, query_stride_d, HEAD_DIM, BLOCK_D)
            do_offset = token_offset(number, other, grad_out_stride_h, grad_out_stride_w)
            do = load_tokens(grad_out_ptr, do_offset, grad_out_stride_d, VALUE_DIM, BLOCK_V)
            token = (
                token_offset(batch * height + number, other, width * num_heads, num_heads) + head
            )
            token *= num_softmaxes
            lse = tl.load(lse_ptr + token)
            shared = tl.load(shared_ptr + token)
            logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
            logits = tl.where(exists, logits, float("-inf"))
            grad_weights = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            # The row-first paths of queries are those that go along the key's column first.
            mask = _own_column_mask(row_sums_ptr, column_sums_ptr, own_place, beside, place)
            weights = tl.exp(logits + mask - lse[None, :])
            grad_logits = weights * (grad_weights + shared[None, :])
            step = _sign(row - other_row)
            if parts_ptr is not None:
                grad_own_column += grad_logits * step
            if IS_BOTH:
                lse = tl.load(lse_ptr + token + 1)
                shared = tl.load(shared_ptr + token + 1)
                mask = _own_row_mask(line_mask, column_sums_ptr, across, place)
                row_weights = tl.exp(logits + mask - lse[None, :])
                grads = row_weights * (grad_weights + shared[None, :])
                if parts_ptr is not None:
                    row_grads += grads
                    step_grads += grads * step
                weights += row_weights
                grad_logits += grads
            grad_value += tl.dot(weights.to(do.dtype), do, input_precision=PRECISION)
            grad_key += tl.dot(grad_logits.to(q.dtype), q, input_precision=PRECISION)
        if parts_ptr is not None:
            grad_own_row += _store_decay_block(
                parts_ptr,
                plane,
                row_grads * share,
                step_grads * share,
                column,
                first_own,
                other,
                is_query,
                slots,
                width,
                TILE,
            )

    token = token_offset(batch * height + row, column, width * num_heads, num_heads) + head
    grad_key *= scale * share
    store_tokens(grad_key_ptr, token * HEAD_DIM, grad_key, is_key, HEAD_DIM, BLOCK_D)
    grad_value *= share
    store_tokens(grad_value_ptr, token * VALUE_DIM, grad_value, is_key, VALUE_DIM, BLOCK_V)
    if parts_ptr is not None:
        parts_ptr += slots * width + column
        tl.store(parts_ptr, grad_own_row, mask=is_key)
        tl.store(parts_ptr + plane, tl.sum(grad_own_column, 1) * share, mask=is_key)

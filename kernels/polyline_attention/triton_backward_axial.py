"""The Triton kernels of the axial form's backward pass, by rows; columns are transposed maps' rows.

- ``_backward_line_query_kernel``: a program owns a tile of queries of one row and walks twice
  through the keys of that row.
- ``_backward_line_key_kernel``: a program owns a tile of keys of one row and walks through its
  queries. Without logits' gradients it multiplies with the transposed softmax.

What :mod:`.triton_backward` says of means, of the gradients of decays and of signs holds here; no
two programs sum for the same tokens.
"""

import triton
import triton.language as tl

from ..triton_tokens import load_tokens, store_tokens, token_offset
from .triton_forward import _columns, _find_own_row, _line_mask, _sign


@triton.jit
def _backward_line_query_kernel(
    grad_out_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    middle_ptr,
    grad_middle_ptr,
    sums_ptr,
    lse_ptr,
    shared_ptr,
    added_query_ptr,
    grad_query_ptr,
    grad_sums_ptr,
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
    tokens_h,
    tokens_w,
    AXIS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the gradient of a tile of queries of one row, and the mean -w dw of each.

    The gradient of weights is that of products of the softmax with what the other axis gave,
    ``middle_ptr``, which the output's cotangent meets, and with the values, which
    ``grad_middle_ptr`` meets, twice the cotangent of what this axis gave; either may be absent.
    ``added_query_ptr``: the gradient from the other axis, or None.
    """
    batch, head, row, first_own = _find_own_row(num_heads, height, width, TILE)
    column, is_query = _columns(first_own, width, TILE)
    grad_out_ptr += batch * grad_out_stride_b + head * grad_out_stride_n
    query_ptr += batch * query_stride_b + head * query_stride_n
    key_ptr += batch * key_stride_b + head * key_stride_n
    value_ptr += batch * value_stride_b + head * value_stride_n
    sums_ptr += ((batch * num_heads + head) * height + row) * width
    line = batch * height * width * num_heads + row.to(tl.int64) * tokens_h + head
    token = line + column.to(tl.int64) * tokens_w
    q_offset = token_offset(row, column, query_stride_h, query_stride_w)
    q = load_tokens(query_ptr, q_offset, query_stride_d, HEAD_DIM, BLOCK_D)
    own_sums = tl.load(sums_ptr + column)
    lse = tl.load(lse_ptr + token * 2 + AXIS)
    share = 1.0
    if middle_ptr is not None:
        do_offset = token_offset(row, column, grad_out_stride_h, grad_out_stride_w)
        do = load_tokens(grad_out_ptr, do_offset, grad_out_stride_d, VALUE_DIM, BLOCK_V)
        if grad_middle_ptr is not None:
            share = 0.5
    if grad_middle_ptr is not None:
        dm = load_tokens(grad_middle_ptr, token * VALUE_DIM, 1, VALUE_DIM, BLOCK_V)

    total = tl.zeros([TILE], tl.float32)
    shared = tl.zeros([TILE], tl.float32)
    grad_query = tl.zeros([TILE, BLOCK_D], tl.float32)
    grad_sums = tl.zeros([TILE], tl.float32)
    for is_last in tl.static_range(2):
        for first in range(0, width, BLOCK):
            other, is_key = _columns(first, width, BLOCK)
            k_offset = token_offset(row, other, key_stride_h, key_stride_w)
            k = load_tokens(key_ptr, k_offset, key_stride_d, HEAD_DIM, BLOCK_D)
            logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            logits += _line_mask(own_sums, tl.load(sums_ptr + other))
            logits = tl.where(is_key[None, :], logits, float("-inf"))
            grad_weights = tl.zeros([TILE, BLOCK], tl.float32)
            if middle_ptr is not None:
                place = (line + other.to(tl.int64) * tokens_w) * VALUE_DIM
                m = load_tokens(middle_ptr, place, 1, VALUE_DIM, BLOCK_V)
                grad_weights += tl.dot(do, tl.trans(m), input_precision=PRECISION)
            if grad_middle_ptr is not None:
                v_offset = token_offset(row, other, value_stride_h, value_stride_w)
                v = load_tokens(value_ptr, v_offset, value_stride_d, VALUE_DIM, BLOCK_V)
                grad_weights += tl.dot(dm, tl.trans(v), input_precision=PRECISION)
            weights = tl.exp(logits - lse[:, None])
            if is_last == 0:
                total += tl.sum(weights, 1)
                shared -= tl.sum(weights * grad_weights, 1)
            else:
                grad_logits = weights * (grad_weights + shared[:, None])
                if grad_sums_ptr is not None:
                    sign = _sign(column[:, None] - other[None, :])
                    grad_sums += tl.sum(grad_logits * sign, 1)
                grad_query += tl.dot(grad_logits.to(k.dtype), k, input_precision=PRECISION)
        if is_last == 0:
            shared /= total

    tl.store(shared_ptr + token, shared, mask=is_query)
    grad_query *= scale * share
    if added_query_ptr is not None:
        added = load_tokens(added_query_ptr, token * HEAD_DIM, 1, HEAD_DIM, BLOCK_D)
        grad_query += added.to(tl.float32)
    store_tokens(grad_query_ptr, token * HEAD_DIM, grad_query, is_query, HEAD_DIM, BLOCK_D)
    if grad_sums_ptr is not None:
        place = ((batch * num_heads + head) * height + row) * width + column
        tl.store(grad_sums_ptr + place, grad_sums * share, mask=is_query)


@triton.jit
def _backward_line_key_kernel(
    grad_out_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    middle_ptr,
    grad_middle_ptr,
    sums_ptr,
    lse_ptr,
    shared_ptr,
    added_key_ptr,
    added_value_ptr,
    grad_key_ptr,
    grad_value_ptr,
    grad_sums_ptr,
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
    tokens_h,
    tokens_w,
    AXIS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the gradients of a tile of keys of one row and their values; as the kernel above.

    Logits are (keys, queries). Without ``grad_middle_ptr`` the gradient of values is that of
    ``middle_ptr``; without ``grad_key_ptr`` there is no other.
    """
    batch, head, row, first_own = _find_own_row(num_heads, height, width, TILE)
    column, is_key = _columns(first_own, width, TILE)
    grad_out_ptr += batch * grad_out_stride_b + head * grad_out_stride_n
    query_ptr += batch * query_stride_b + head * query_stride_n
    key_ptr += batch * key_stride_b + head * key_stride_n
    value_ptr += batch * value_stride_b + head * value_stride_n
    sums_ptr += ((batch * num_heads + head) * height + row) * width
    line = batch * height * width * num_heads + row.to(tl.int64) * tokens_h + head
    own_token = line + column.to(tl.int64) * tokens_w
    k_offset = token_offset(row, column, key_stride_h, key_stride_w)
    k = load_tokens(key_ptr, k_offset, key_stride_d, HEAD_DIM, BLOCK_D)
    own_sums = tl.load(sums_ptr + column)
    share = 1.0
    if middle_ptr is not None:
        m = load_tokens(middle_ptr, own_token * VALUE_DIM, 1, VALUE_DIM, BLOCK_V)
        if grad_middle_ptr is not None:
            share = 0.5
    if grad_middle_ptr is not None:
        v_offset = token_offset(row, column, value_stride_h, value_stride_w)
        v = load_tokens(value_ptr, v_offset, value_stride_d, VALUE_DIM, BLOCK_V)

    grad_key = tl.zeros([TILE, BLOCK_D], tl.float32)
    grad_value = tl.zeros([TILE, BLOCK_V], tl.float32)
    grad_sums = tl.zeros([TILE], tl.float32)
    for first in range(0, width, BLOCK):
        other, is_query = _columns(first, width, BLOCK)
        token = line + other.to(tl.int64) * tokens_w
        q_offset = token_offset(row, other, query_stride_h, query_stride_w)
        q = load_tokens(query_ptr, q_offset, query_stride_d, HEAD_DIM, BLOCK_D)
        lse = tl.load(lse_ptr + token * 2 + AXIS)
        logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
        logits += _line_mask(own_sums, tl.load(sums_ptr + other))
        logits = tl.where(is_query[None, :], logits, float("-inf"))
        weights = tl.exp(logits - lse[None, :])
        grad_weights = tl.zeros([TILE, BLOCK], tl.float32)
        if grad_middle_ptr is not None:
            dm = load_tokens(grad_middle_ptr, token * VALUE_DIM, 1, VALUE_DIM, BLOCK_V)
            grad_value += tl.dot(weights.to(dm.dtype), dm, input_precision=PRECISION)
            grad_weights += tl.dot(v, tl.trans(dm), input_precision=PRECISION)
        if middle_ptr is not None or grad_middle_ptr is None:
            do_offset = token_offset(row, other, grad_out_stride_h, grad_out_stride_w)
            do = load_tokens(grad_out_ptr, do_offset, grad_out_stride_d, VALUE_DIM, BLOCK_V)
            if grad_middle_ptr is None:
                grad_value += tl.dot(weights.to(do.dtype), do, input_precision=PRECISION)
            if middle_ptr is not None:
                grad_weights += tl.dot(m, tl.trans(do), input_precision=PRECISION)
        if grad_key_ptr is not None:
            shared = tl.load(shared_ptr + token)
            grad_logits = weights * (grad_weights + shared[None, :])
            if grad_sums_ptr is not None:
                sign = _sign(column[:, None] - other[None, :])
                grad_sums += tl.sum(grad_logits * sign, 1)
            grad_key += tl.dot(grad_logits.to(q.dtype), q, input_precision=PRECISION)

    grad_value *= share
    if added_value_ptr is not None:
        added = load_tokens(added_value_ptr, own_token * VALUE_DIM, 1, VALUE_DIM, BLOCK_V)
        grad_value += added.to(tl.float32)
    store_tokens(grad_value_ptr, own_token * VALUE_DIM, grad_value, is_key, VALUE_DIM, BLOCK_V)
    if grad_key_ptr is not None:
        grad_key *= scale * share
        if added_key_ptr is not None:
            added = load_tokens(added_key_ptr, own_token * HEAD_DIM, 1, HEAD_DIM, BLOCK_D)
            grad_key += added.to(tl.float32)
        store_tokens(grad_key_ptr, own_token * HEAD_DIM, grad_key, is_key, HEAD_DIM, BLOCK_D)
        if grad_sums_ptr is not None:
            place = ((batch * num_heads + head) * height + row) * width + column
            tl.store(grad_sums_ptr + place, grad_sums * share, mask=is_key)

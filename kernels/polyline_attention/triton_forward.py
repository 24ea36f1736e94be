"""The Triton kernels of the forward pass, and the pieces that the backward kernels share with them.

- ``_forward_kernel``, of the full form: a program owns a tile of queries of one row and walks
  through all keys, of one row at a time, with a running softmax for each path.
- ``_forward_line_kernel``, of the axial form: a program owns a tile of queries of one row and walks
  through the keys of that row. Columns are the rows of transposed maps. With values along rows or
  columns, Aw or Ah, three launches make the mean of both orders: t = Aw v; Ah v and Ah t; and
  the mean of the latter and Aw (Ah v).

No mask is in memory: that of a tile of one row and a block of one row is made from vectors of
prefix sums, P of the decays along rows and R of those along columns, (B, heads, H, W) float32.
Kernels of both passes own tokens (o, a), of row o, and walk through tokens (p, c), of row p, by
blocks of columns and, for each, through the rows. The two paths between them are::

    own row first       -|P[o,a] - P[o,c]| - |R[o,c] - R[p,c]|
    own column first    -|P[p,c] - P[p,a]| - |R[p,a] - R[o,a]|

For tiles of queries these are the row-first and the column-first path, for tiles of keys the
reverse. Every sum is made by one program in a fixed order: results are deterministic.
"""

import triton
import triton.language as tl

from ..triton_tokens import (
    LOWEST,
    accumulate,
    load_tokens,
    store_tokens,
    token_offset,
    weigh_block,
)


@triton.jit
def _find_own_row(num_heads, height, width, TILE: tl.constexpr):
    """Image, head and row of this program's tile, and the tile's first column."""
    num_tiles = tl.cdiv(width, TILE)
    program = tl.program_id(0)
    first = program % num_tiles * TILE
    row = program // num_tiles % height
    program = program // num_tiles // height
    head = (program % num_heads).to(tl.int64)
    batch = (program // num_heads).to(tl.int64)
    return batch, head, row, first


@triton.jit
def _columns(first, width, BLOCK: tl.constexpr):
    """Columns first .. first + BLOCK - 1 and which exist: the last stands for those that do not."""
    column = first + tl.arange(0, BLOCK)
    return tl.minimum(column, width - 1), column < width


@triton.jit
def _row_number(row):
    """Number of a row that a loop counts, (1,), for offsets."""
    return tl.zeros([1], tl.int64) + row


@triton.jit
def _line_mask(own, other):
    """Log mask of tokens of a line, (own, others), from their prefix sums."""
    return -tl.abs(own[:, None] - other[None, :])


@triton.jit
def _sign(difference):
    """-1, 0 or 1, float32."""
    return tl.where(difference > 0, 1.0, 0.0) - tl.where(difference < 0, 1.0, 0.0)


@triton.jit
def _own_row_mask(line_mask, column_sums_ptr, across, place):
    """Log mask of the paths along the own row first, (own, others).

    Args:
        line_mask: that of the own row, (own, others).
        column_sums_ptr: prefix sums R of the head.
        across: places of (o, c), (others,).
        place: places of (p, c), (others,).
    """
    step = -tl.abs(tl.load(column_sums_ptr + across) - tl.load(column_sums_ptr + place))
    return line_mask + step[None, :]


@triton.jit
def _own_column_mask(row_sums_ptr, column_sums_ptr, own_place, beside, place):
    """Log mask of the paths along the own column first, (own, others).

    Args:
        row_sums_ptr: prefix sums P of the head.
        column_sums_ptr: prefix sums R.
        own_place: places of (o, a), (own,).
        beside: places of (p, a), (own,).
        place: places of (p, c), (others,).
    """
    step = -tl.abs(tl.load(column_sums_ptr + beside) - tl.load(column_sums_ptr + own_place))
    return _line_mask(tl.load(row_sums_ptr + beside), tl.load(row_sums_ptr + place)) + step[:, None]


@triton.jit
def _forward_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    row_sums_ptr,
    column_sums_ptr,
    out_ptr,
    lse_ptr,
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
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    IS_BOTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Attend along both paths, or along the row-first ones alone."""
    batch, head, row, first_own = _find_own_row(num_heads, height, width, TILE)
    column, is_query = _columns(first_own, width, TILE)
    query_ptr += batch * query_stride_b + head * query_stride_n
    key_ptr += batch * key_stride_b + head * key_stride_n
    value_ptr += batch * value_stride_b + head * value_stride_n
    map_offset = (batch * num_heads + head) * height * width
    row_sums_ptr += map_offset
    column_sums_ptr += map_offset
    own_place = row * width + column
    q_offset = token_offset(row, column, query_stride_h, query_stride_w)
    q = load_tokens(query_ptr, q_offset, query_stride_d, HEAD_DIM, BLOCK_D)
    own_sums = tl.load(row_sums_ptr + own_place)

    highest = tl.full([TILE], LOWEST, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    out = tl.zeros([TILE, BLOCK_V], tl.float32)
    column_highest = tl.full([TILE], LOWEST, tl.float32)
    column_total = tl.zeros([TILE], tl.float32)
    column_out = tl.zeros([TILE, BLOCK_V], tl.float32)
    for first in range(0, width, BLOCK):
        other, is_key = _columns(first, width, BLOCK)
        across = row * width + other
        line_mask = _line_mask(own_sums, tl.load(row_sums_ptr + across))
        for other_row in range(0, height):
            place = other_row * width + other
            k_offset = token_offset(_row_number(other_row), other, key_stride_h, key_stride_w)
            k = load_tokens(key_ptr, k_offset, key_stride_d, HEAD_DIM, BLOCK_D)
            v_offset = token_offset(_row_number(other_row), other, value_stride_h, value_stride_w)
            v = load_tokens(value_ptr, v_offset, value_stride_d, VALUE_DIM, BLOCK_V)
            logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            logits = tl.where(is_key[None, :], logits, float("-inf"))
            mask = _own_row_mask(line_mask, column_sums_ptr, across, place)
            highest, total, out = accumulate(highest, total, out, logits + mask, v, PRECISION)
            if IS_BOTH:
                beside = other_row * width + column
                mask = _own_column_mask(row_sums_ptr, column_sums_ptr, own_place, beside, place)
                column_highest, column_total, column_out = accumulate(
                    column_highest, column_total, column_out, logits + mask, v, PRECISION
                )

    token = token_offset(batch * height + row, column, width * num_heads, num_heads) + head
    out = out / total[:, None]
    lse = highest + tl.log(total)
    if IS_BOTH:
        out = (out + column_out / column_total[:, None]) * 0.5
        tl.store(lse_ptr + token * 2, lse, mask=is_query)
        tl.store(lse_ptr + token * 2 + 1, column_highest + tl.log(column_total), mask=is_query)
    else:
        tl.store(lse_ptr + token, lse, mask=is_query)
    store_tokens(out_ptr, token * VALUE_DIM, out, is_query, VALUE_DIM, BLOCK_V)


@triton.jit
def _forward_line_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    second_value_ptr,
    other_ptr,
    sums_ptr,
    out_ptr,
    second_out_ptr,
    lse_ptr,
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
    """Attend along rows, to values and, where given, to others of the same tokens.

    ``other_ptr``: what the output is the mean of, beside the attention.
    ``tokens_h`` and ``tokens_w``: steps along the map in tensors without strides of their own,
    which are contiguous as maps that were not transposed.
    ``AXIS``: 0 for rows, 1 for columns: the entry of lse.
    """
    batch, head, row, first_own = _find_own_row(num_heads, height, width, TILE)
    column, is_query = _columns(first_own, width, TILE)
    query_ptr += batch * query_stride_b + head * query_stride_n
    key_ptr += batch * key_stride_b + head * key_stride_n
    value_ptr += batch * value_stride_b + head * value_stride_n
    sums_ptr += ((batch * num_heads + head) * height + row) * width
    line = batch * height * width * num_heads + row.to(tl.int64) * tokens_h + head
    q_offset = token_offset(row, column, query_stride_h, query_stride_w)
    q = load_tokens(query_ptr, q_offset, query_stride_d, HEAD_DIM, BLOCK_D)
    own_sums = tl.load(sums_ptr + column)

    highest = tl.full([TILE], LOWEST, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    out = tl.zeros([TILE, BLOCK_V], tl.float32)
    second_out = tl.zeros([TILE, BLOCK_V], tl.float32)
    for first in range(0, width, BLOCK):
        other, is_key = _columns(first, width, BLOCK)
        k_offset = token_offset(row, other, key_stride_h, key_stride_w)
        k = load_tokens(key_ptr, k_offset, key_stride_d, HEAD_DIM, BLOCK_D)
        v_offset = token_offset(row, other, value_stride_h, value_stride_w)
        v = load_tokens(value_ptr, v_offset, value_stride_d, VALUE_DIM, BLOCK_V)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        logits += _line_mask(own_sums, tl.load(sums_ptr + other))
        logits = tl.where(is_key[None, :], logits, float("-inf"))
        highest, total, weights, decay = weigh_block(highest, total, logits)
        weights = weights.to(v.dtype)
        out = out * decay[:, None] + tl.dot(weights, v, input_precision=PRECISION)
        if second_value_ptr is not None:
            token = line + other.to(tl.int64) * tokens_w
            v = load_tokens(second_value_ptr, token * VALUE_DIM, 1, VALUE_DIM, BLOCK_V)
            second_out *= decay[:, None]
            second_out += tl.dot(weights, v, input_precision=PRECISION)

    token = line + column.to(tl.int64) * tokens_w
    out = out / total[:, None]
    if other_ptr is not None:
        other_out = load_tokens(other_ptr, token * VALUE_DIM, 1, VALUE_DIM, BLOCK_V)
        out = (out + other_out.to(tl.float32)) * 0.5
    store_tokens(out_ptr, token * VALUE_DIM, out, is_query, VALUE_DIM, BLOCK_V)
    if second_value_ptr is not None:
        second_out = second_out / total[:, None]
        store_tokens(second_out_ptr, token * VALUE_DIM, second_out, is_query, VALUE_DIM, BLOCK_V)
    if lse_ptr is not None:
        tl.store(lse_ptr + token * 2 + AXIS, highest + tl.log(total), mask=is_query)

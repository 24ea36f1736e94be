"""The Triton kernel of the forward pass, and the pieces that the backward kernels share with it.

A grid of two axes (a 1-D one has a first axis of length 1) falls apart into dilation groups. A
tile is TILE_H x TILE_W members of one group. The members of a rectangle of a group are numbered
row by row, and a kernel walks through such numbers in blocks, so that no shape of tile, window or
map wastes more than the end of the last block. The forward kernel's program owns a tile of queries
and walks through the union of their windows: the windows are exact masks inside it.

Every sum is made by one program in a fixed order: results are deterministic.
"""

import triton
import triton.language as tl

from ..triton_tokens import LOWEST, accumulate, load_tokens, store_tokens, token_offset


@triton.jit
def _window(index, size, KERNEL: tl.constexpr, STRIDE: tl.constexpr, IS_CAUSAL: tl.constexpr):
    """Start and number of the keys that members ``index`` of a group of ``size`` see."""
    if IS_CAUSAL:
        leader = tl.minimum(index // STRIDE * STRIDE + (STRIDE - 1), size - 1)
        start = tl.maximum(leader - (KERNEL - 1), 0)
        return start, index + 1 - start
    else:
        leader = index // STRIDE * STRIDE + STRIDE // 2
        start = tl.minimum(tl.maximum(leader - KERNEL // 2, 0), size - KERNEL)
        return start, index * 0 + KERNEL


@triton.jit
def _windows_of_tile(
    first,
    size,
    TILE: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
):
    """Start and length of the union of the windows of queries first .. first + TILE - 1."""
    begin, _ = _window(first, size, KERNEL, STRIDE, IS_CAUSAL)
    start, count = _window(
        tl.minimum(first + (TILE - 1), size - 1), size, KERNEL, STRIDE, IS_CAUSAL
    )
    return begin, start + count - begin


@triton.jit
def _queries_of_tile(
    first,
    size,
    TILE: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
):
    """Start and length of a range that holds all queries that see keys first .. first + TILE - 1.

    Windows that were shifted inside at an end of the group are seen by all queries up to the end.
    """
    last = tl.minimum(first + (TILE - 1), size - 1)
    if IS_CAUSAL:
        begin = first
        end = tl.minimum(last + (KERNEL - 1), size - 1)
    else:
        LEFT: tl.constexpr = KERNEL // 2
        RIGHT: tl.constexpr = KERNEL - 1 - LEFT
        HALF: tl.constexpr = STRIDE // 2
        begin = tl.where(first < KERNEL, 0, tl.maximum(first - (RIGHT + HALF), 0))
        end = tl.where(last >= size - KERNEL, size - 1, last + (LEFT + STRIDE - 1 - HALF))
        end = tl.minimum(end, size - 1)
    return begin, end + 1 - begin


@triton.jit
def _group_size(length, dilation, group):
    """Members of a dilation group of an axis."""
    return (length - group + dilation - 1) // dilation


@triton.jit
def _find_tile(
    index, height, width, dilation_h, dilation_w, TILE_H: tl.constexpr, TILE_W: tl.constexpr
):
    """Turn a number below the tiles of a map into its group and first members.

    All groups have as many tiles as the largest: the last of a smaller one can be empty.
    """
    num_tiles_h = tl.cdiv(tl.cdiv(height, dilation_h), TILE_H)
    num_tiles_w = tl.cdiv(tl.cdiv(width, dilation_w), TILE_W)
    first_w = index % num_tiles_w * TILE_W
    index = index // num_tiles_w
    first_h = index % num_tiles_h * TILE_H
    index = index // num_tiles_h
    return index // dilation_w, index % dilation_w, first_h, first_w


@triton.jit
def _num_tiles(height, width, dilation_h, dilation_w, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Tiles of a map, empty ones of smaller groups included."""
    num_tiles_h = tl.cdiv(tl.cdiv(height, dilation_h), TILE_H)
    num_tiles_w = tl.cdiv(tl.cdiv(width, dilation_w), TILE_W)
    return num_tiles_h * num_tiles_w * dilation_h * dilation_w


@triton.jit
def _find_own_tile(
    num_heads, height, width, dilation_h, dilation_w, TILE_H: tl.constexpr, TILE_W: tl.constexpr
):
    """Image, head, group, first members and group sizes of the tile that this program owns."""
    num_tiles = _num_tiles(height, width, dilation_h, dilation_w, TILE_H, TILE_W)
    program = tl.program_id(0)
    group_h, group_w, first_h, first_w = _find_tile(
        program % num_tiles, height, width, dilation_h, dilation_w, TILE_H, TILE_W
    )
    size_h = _group_size(height, dilation_h, group_h)
    size_w = _group_size(width, dilation_w, group_w)
    head = (program // num_tiles % num_heads).to(tl.int64)
    batch = (program // num_tiles // num_heads).to(tl.int64)
    return batch, head, group_h, group_w, first_h, first_w, size_h, size_w


@triton.jit
def _members_of_tile(first_h, first_w, size_h, size_w, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Members of a group in a tile, and which exist: the last stands for those behind the end."""
    number = tl.arange(0, TILE_H * TILE_W)
    member_h = first_h + number // TILE_W
    member_w = first_w + number % TILE_W
    exists = (member_h < size_h) & (member_w < size_w)
    return tl.minimum(member_h, size_h - 1), tl.minimum(member_w, size_w - 1), exists


@triton.jit
def _members_of_block(first, begin_h, begin_w, span_h, span_w, BLOCK: tl.constexpr):
    """Members first .. first + BLOCK - 1 of a rectangle, and which exist, as for a tile."""
    number = first + tl.arange(0, BLOCK)
    exists = number < span_h * span_w
    number = tl.minimum(number, span_h * span_w - 1)
    return begin_h + number // span_w, begin_w + number % span_w, exists


@triton.jit
def _mask_logits(
    logits,
    bias_ptr,
    head,
    query_h,
    query_w,
    key_h,
    key_w,
    size_h,
    size_w,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    CAUSAL_H: tl.constexpr,
    CAUSAL_W: tl.constexpr,
):
    """Add the bias, and set to minus infinity what a query does not see.

    Members of queries and keys are shaped to broadcast to the logits. No query sees key -1.
    """
    start_h, count_h = _window(query_h, size_h, KERNEL_H, STRIDE_H, CAUSAL_H)
    start_w, count_w = _window(query_w, size_w, KERNEL_W, STRIDE_W, CAUSAL_W)
    # Unsigned: one comparison holds both ends of a window.
    is_seen = (key_h - start_h).to(tl.uint32) < count_h.to(tl.uint32)
    is_seen &= (key_w - start_w).to(tl.uint32) < count_w.to(tl.uint32)
    if bias_ptr is not None:
        SIZE_W: tl.constexpr = 2 * KERNEL_W - 1
        LAST: tl.constexpr = (2 * KERNEL_H - 1) * SIZE_W - 1
        index = (key_h * SIZE_W + key_w) - (query_h * SIZE_W + query_w - LAST // 2)
        # A place in the table for what is not seen too: masks would cost registers.
        index = tl.minimum(tl.maximum(index, 0), LAST)
        logits += tl.load(bias_ptr + head * (LAST + 1) + index).to(tl.float32)
    return tl.where(is_seen, logits, float("-inf"))


@triton.jit
def _score_block(
    q,
    query_h,
    query_w,
    first_key,
    begin_h,
    begin_w,
    span_h,
    span_w,
    key_ptr,
    value_ptr,
    bias_ptr,
    head,
    key_stride_h,
    key_stride_w,
    key_stride_d,
    value_stride_h,
    value_stride_w,
    value_stride_d,
    scale,
    group_h,
    group_w,
    size_h,
    size_w,
    dilation_h,
    dilation_w,
    HEAD_DIM: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    CAUSAL_H: tl.constexpr,
    CAUSAL_W: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Load keys first_key .. first_key + BLOCK - 1 of a rectangle and their values, and score them.

    Returns keys (BLOCK, BLOCK_D), values likewise, and logits (queries, BLOCK).
    """
    key_h, key_w, is_key = _members_of_block(first_key, begin_h, begin_w, span_h, span_w, BLOCK)
    row = group_h + dilation_h * key_h
    column = group_w + dilation_w * key_w
    k_offset = token_offset(row, column, key_stride_h, key_stride_w)
    k = load_tokens(key_ptr, k_offset, key_stride_d, HEAD_DIM, BLOCK_D)
    v_offset = token_offset(row, column, value_stride_h, value_stride_w)
    v = load_tokens(value_ptr, v_offset, value_stride_d, HEAD_DIM, BLOCK_D)
    logits = _mask_logits(
        tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale,
        bias_ptr,
        head,
        query_h[:, None],
        query_w[:, None],
        tl.where(is_key, key_h, -1)[None, :],
        key_w[None, :],
        size_h,
        size_w,
        KERNEL_H,
        KERNEL_W,
        STRIDE_H,
        STRIDE_W,
        CAUSAL_H,
        CAUSAL_W,
    )
    return k, v, logits


@triton.jit
def _score_extra_block(
    q,
    first_key,
    num_extra,
    key_ptr,
    value_ptr,
    stride,
    scale,
    HEAD_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The same for a block of extra keys, ``stride`` elements from one to the next."""
    number = first_key + tl.arange(0, BLOCK)
    is_key = number < num_extra
    offset = tl.minimum(number, num_extra - 1) * stride
    k = load_tokens(key_ptr, offset, 1, HEAD_DIM, BLOCK_D)
    v = load_tokens(value_ptr, offset, 1, HEAD_DIM, BLOCK_D)
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    return k, v, tl.where(is_key[None, :], logits, float("-inf"))


@triton.jit
def _forward_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    bias_ptr,
    extra_key_ptr,
    extra_value_ptr,
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
    dilation_h,
    dilation_w,
    num_extra,
    HEAD_DIM: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    CAUSAL_H: tl.constexpr,
    CAUSAL_W: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Attend: a program owns a tile of queries of one image and head."""
    batch, head, group_h, group_w, first_h, first_w, size_h, size_w = _find_own_tile(
        num_heads, height, width, dilation_h, dilation_w, TILE_H, TILE_W
    )
    if (first_h >= size_h) | (first_w >= size_w):
        return
    query_ptr += batch * query_stride_b + head * query_stride_n
    key_ptr += batch * key_stride_b + head * key_stride_n
    value_ptr += batch * value_stride_b + head * value_stride_n

    query_h, query_w, is_query = _members_of_tile(first_h, first_w, size_h, size_w, TILE_H, TILE_W)
    row = group_h + dilation_h * query_h
    column = group_w + dilation_w * query_w
    q_offset = token_offset(row, column, query_stride_h, query_stride_w)
    q = load_tokens(query_ptr, q_offset, query_stride_d, HEAD_DIM, BLOCK_D)

    highest = tl.full([TILE_H * TILE_W], LOWEST, tl.float32)
    total = tl.zeros([TILE_H * TILE_W], tl.float32)
    out = tl.zeros([TILE_H * TILE_W, BLOCK_D], tl.float32)
    begin_h, span_h = _windows_of_tile(first_h, size_h, TILE_H, KERNEL_H, STRIDE_H, CAUSAL_H)
    begin_w, span_w = _windows_of_tile(first_w, size_w, TILE_W, KERNEL_W, STRIDE_W, CAUSAL_W)
    for first_key in range(0, span_h * span_w, BLOCK):
        k, v, logits = _score_block(
            q,
            query_h,
            query_w,
            first_key,
            begin_h,
            begin_w,
            span_h,
            span_w,
            key_ptr,
            value_ptr,
            bias_ptr,
            head,
            key_stride_h,
            key_stride_w,
            key_stride_d,
            value_stride_h,
            value_stride_w,
            value_stride_d,
            scale,
            group_h,
            group_w,
            size_h,
            size_w,
            dilation_h,
            dilation_w,
            HEAD_DIM,
            KERNEL_H,
            KERNEL_W,
            STRIDE_H,
            STRIDE_W,
            CAUSAL_H,
            CAUSAL_W,
            PRECISION,
            BLOCK_D,
            BLOCK,
        )
        highest, total, out = accumulate(highest, total, out, logits, v, PRECISION)
    if extra_key_ptr is not None:
        extra_base = (batch * num_extra * num_heads + head) * HEAD_DIM
        for first_key in range(0, num_extra, BLOCK):
            k, v, logits = _score_extra_block(
                q,
                first_key,
                num_extra,
                extra_key_ptr + extra_base,
                extra_value_ptr + extra_base,
                num_heads * HEAD_DIM,
                scale,
                HEAD_DIM,
                PRECISION,
                BLOCK_D,
                BLOCK,
            )
            highest, total, out = accumulate(highest, total, out, logits, v, PRECISION)

    token = token_offset(batch * height + row, column, width * num_heads, num_heads) + head
    store_tokens(out_ptr, token * HEAD_DIM, out / total[:, None], is_query, HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + token, highest + tl.log(total), mask=is_query)

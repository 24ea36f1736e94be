"""The Triton kernels of the backward pass.

- ``_backward_query_kernel``: a program owns a tile of queries and walks through the union of their
  windows, as the forward kernel does. It also stores the term that all gradients of a query's
  logits share, for the other kernels.
- ``_backward_key_kernel``: a program owns a tile of keys and walks through the queries that may
  see one of them.
- ``_backward_bias_kernel``: a program owns a block of pairs (query of a tile, key relative to the
  tile), whose offsets are the same in every tile, and sums them over a share of all tiles.
- ``_backward_extra_kernel``: a program owns a block of extra keys and walks through a share of the
  queries of an image.

There are no atomics; the shares' sums are added by the caller.
"""

import triton
import triton.language as tl

from ..triton_tokens import (
    accumulate_grad_key,
    accumulate_grad_query,
    load_tokens,
    store_tokens,
    token_offset,
    weigh_gradients,
)
from .triton_forward import (
    _find_own_tile,
    _find_tile,
    _group_size,
    _mask_logits,
    _members_of_block,
    _members_of_tile,
    _num_tiles,
    _queries_of_tile,
    _score_block,
    _score_extra_block,
    _windows_of_tile,
)


@triton.jit
def _backward_query_kernel(
    grad_out_ptr,
    grad_lse_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    bias_ptr,
    extra_key_ptr,
    extra_value_ptr,
    out_ptr,
    lse_ptr,
    shared_ptr,
    grad_query_ptr,
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
    """Compute the gradient of a tile of queries, and dlse - <dO, O> of each, (B, H, W, heads)."""
    batch, head, group_h, group_w, first_h, first_w, size_h, size_w = _find_own_tile(
        num_heads, height, width, dilation_h, dilation_w, TILE_H, TILE_W
    )
    if (first_h >= size_h) | (first_w >= size_w):
        return
    grad_out_ptr += batch * grad_out_stride_b + head * grad_out_stride_n
    query_ptr += batch * query_stride_b + head * query_stride_n
    key_ptr += batch * key_stride_b + head * key_stride_n
    value_ptr += batch * value_stride_b + head * value_stride_n

    query_h, query_w, is_query = _members_of_tile(first_h, first_w, size_h, size_w, TILE_H, TILE_W)
    row = group_h + dilation_h * query_h
    column = group_w + dilation_w * query_w
    q_offset = token_offset(row, column, query_stride_h, query_stride_w)
    q = load_tokens(query_ptr, q_offset, query_stride_d, HEAD_DIM, BLOCK_D)
    do_offset = token_offset(row, column, grad_out_stride_h, grad_out_stride_w)
    do = load_tokens(grad_out_ptr, do_offset, grad_out_stride_d, HEAD_DIM, BLOCK_D)
    token = token_offset(batch * height + row, column, width * num_heads, num_heads) + head
    out = load_tokens(out_ptr, token * HEAD_DIM, 1, HEAD_DIM, BLOCK_D)
    lse = tl.load(lse_ptr + token)
    shared = -tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    if grad_lse_ptr is not None:
        shared += tl.load(grad_lse_ptr + token)
    tl.store(shared_ptr + token, shared, mask=is_query)

    grad_query = tl.zeros([TILE_H * TILE_W, BLOCK_D], tl.float32)
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
        weights, grad_weights = weigh_gradients(logits, lse, do, v, PRECISION)
        grad_query = accumulate_grad_query(grad_query, weights, grad_weights, shared, k, PRECISION)
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
            weights, grad_weights = weigh_gradients(logits, lse, do, v, PRECISION)
            grad_query = accumulate_grad_query(
                grad_query, weights, grad_weights, shared, k, PRECISION
            )

    store_tokens(grad_query_ptr, token * HEAD_DIM, grad_query * scale, is_query, HEAD_DIM, BLOCK_D)


@triton.jit
def _backward_key_kernel(
    grad_out_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    bias_ptr,
    lse_ptr,
    shared_ptr,
    grad_key_ptr,
    grad_value_ptr,
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
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the gradients of a tile of keys and their values; logits are (keys, queries)."""
    batch, head, group_h, group_w, first_h, first_w, size_h, size_w = _find_own_tile(
        num_heads, height, width, dilation_h, dilation_w, TILE_H, TILE_W
    )
    if (first_h >= size_h) | (first_w >= size_w):
        return
    grad_out_ptr += batch * grad_out_stride_b + head * grad_out_stride_n
    query_ptr += batch * query_stride_b + head * query_stride_n
    key_ptr += batch * key_stride_b + head * key_stride_n
    value_ptr += batch * value_stride_b + head * value_stride_n

    key_h, key_w, is_key = _members_of_tile(first_h, first_w, size_h, size_w, TILE_H, TILE_W)
    row = group_h + dilation_h * key_h
    column = group_w + dilation_w * key_w
    k_offset = token_offset(row, column, key_stride_h, key_stride_w)
    k = load_tokens(key_ptr, k_offset, key_stride_d, HEAD_DIM, BLOCK_D)
    v_offset = token_offset(row, column, value_stride_h, value_stride_w)
    v = load_tokens(value_ptr, v_offset, value_stride_d, HEAD_DIM, BLOCK_D)

    grad_key = tl.zeros([TILE_H * TILE_W, BLOCK_D], tl.float32)
    grad_value = tl.zeros([TILE_H * TILE_W, BLOCK_D], tl.float32)
    begin_h, span_h = _queries_of_tile(first_h, size_h, TILE_H, KERNEL_H, STRIDE_H, CAUSAL_H)
    begin_w, span_w = _queries_of_tile(first_w, size_w, TILE_W, KERNEL_W, STRIDE_W, CAUSAL_W)
    for first_query in range(0, span_h * span_w, BLOCK):
        query_h, query_w, is_query = _members_of_block(
            first_query, begin_h, begin_w, span_h, span_w, BLOCK
        )
        row_q = group_h + dilation_h * query_h
        column_q = group_w + dilation_w * query_w
        q_offset = token_offset(row_q, column_q, query_stride_h, query_stride_w)
        q = load_tokens(query_ptr, q_offset, query_stride_d, HEAD_DIM, BLOCK_D)
        do_offset = token_offset(row_q, column_q, grad_out_stride_h, grad_out_stride_w)
        do = load_tokens(grad_out_ptr, do_offset, grad_out_stride_d, HEAD_DIM, BLOCK_D)
        token = token_offset(batch * height + row_q, column_q, width * num_heads, num_heads) + head
        # The weights of queries that do not exist are 0.
        lse = tl.where(is_query, tl.load(lse_ptr + token), float("inf"))
        shared = tl.load(shared_ptr + token)
        logits = _mask_logits(
            tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale,
            bias_ptr,
            head,
            query_h[None, :],
            query_w[None, :],
            key_h[:, None],
            key_w[:, None],
            size_h,
            size_w,
            KERNEL_H,
            KERNEL_W,
            STRIDE_H,
            STRIDE_W,
            CAUSAL_H,
            CAUSAL_W,
        )
        grad_key, grad_value = accumulate_grad_key(
            grad_key, grad_value, logits, lse, shared, q, do, v, PRECISION
        )

    token = token_offset(batch * height + row, column, width * num_heads, num_heads) + head
    offset = token * HEAD_DIM
    store_tokens(grad_key_ptr, offset, grad_key * scale, is_key, HEAD_DIM, BLOCK_D)
    store_tokens(grad_value_ptr, offset, grad_value, is_key, HEAD_DIM, BLOCK_D)


@triton.jit
def _backward_bias_kernel(
    grad_out_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    bias_ptr,
    lse_ptr,
    shared_ptr,
    partial_ptr,
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
    batch_size,
    num_heads,
    height,
    width,
    dilation_h,
    dilation_w,
    num_shares,
    HEAD_DIM: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the gradients of logits over a share of tiles, into (shares, heads, blocks, Q, K).

    Q = TILE_H * TILE_W queries, K = BLOCK of the keys that any tile's windows can hold: those up
    to KERNEL - 1 before its first and behind its last row and column, numbered row by row.
    """
    SPAN_H: tl.constexpr = TILE_H + 2 * KERNEL_H - 2
    SPAN_W: tl.constexpr = TILE_W + 2 * KERNEL_W - 2
    NUM_BLOCKS: tl.constexpr = (SPAN_H * SPAN_W + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    block = program % NUM_BLOCKS
    head = (program // NUM_BLOCKS % num_heads).to(tl.int64)
    share = program // NUM_BLOCKS // num_heads
    grad_out_ptr += head * grad_out_stride_n
    query_ptr += head * query_stride_n
    key_ptr += head * key_stride_n
    value_ptr += head * value_stride_n

    number = block * BLOCK + tl.arange(0, BLOCK)
    relative_h = number // SPAN_W - (KERNEL_H - 1)
    relative_w = number % SPAN_W - (KERNEL_W - 1)
    total = tl.zeros([TILE_H * TILE_W, BLOCK], tl.float32)
    num_tiles = _num_tiles(height, width, dilation_h, dilation_w, TILE_H, TILE_W)
    for tile in range(share, num_tiles * batch_size, num_shares):
        group_h, group_w, first_h, first_w = _find_tile(
            tile % num_tiles, height, width, dilation_h, dilation_w, TILE_H, TILE_W
        )
        batch = (tile // num_tiles).to(tl.int64)
        size_h = _group_size(height, dilation_h, group_h)
        size_w = _group_size(width, dilation_w, group_w)
        query_h, query_w, is_query = _members_of_tile(
            first_h, first_w, size_h, size_w, TILE_H, TILE_W
        )
        row_q = group_h + dilation_h * query_h
        column_q = group_w + dilation_w * query_w
        q_offset = batch * query_stride_b + token_offset(
            row_q, column_q, query_stride_h, query_stride_w
        )
        q = load_tokens(query_ptr, q_offset, query_stride_d, HEAD_DIM, BLOCK_D)
        do_offset = batch * grad_out_stride_b + token_offset(
            row_q, column_q, grad_out_stride_h, grad_out_stride_w
        )
        do = load_tokens(grad_out_ptr, do_offset, grad_out_stride_d, HEAD_DIM, BLOCK_D)
        token = token_offset(batch * height + row_q, column_q, width * num_heads, num_heads) + head
        lse = tl.where(is_query, tl.load(lse_ptr + token), float("inf"))
        shared = tl.load(shared_ptr + token)

        # Keys outside of the group are in no window.
        key_h = first_h + relative_h
        key_w = first_w + relative_w
        row_k = group_h + dilation_h * tl.minimum(tl.maximum(key_h, 0), size_h - 1)
        column_k = group_w + dilation_w * tl.minimum(tl.maximum(key_w, 0), size_w - 1)
        k_offset = batch * key_stride_b + token_offset(row_k, column_k, key_stride_h, key_stride_w)
        k = load_tokens(key_ptr, k_offset, key_stride_d, HEAD_DIM, BLOCK_D)
        v_offset = batch * value_stride_b + token_offset(
            row_k, column_k, value_stride_h, value_stride_w
        )
        v = load_tokens(value_ptr, v_offset, value_stride_d, HEAD_DIM, BLOCK_D)
        logits = _mask_logits(
            tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale,
            bias_ptr,
            head,
            query_h[:, None],
            query_w[:, None],
            key_h[None, :],
            key_w[None, :],
            size_h,
            size_w,
            KERNEL_H,
            KERNEL_W,
            1,
            1,
            False,
            False,
        )
        grad_weights = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        total += tl.exp(logits - lse[:, None]) * (grad_weights + shared[:, None])

    place = ((share * num_heads + head) * NUM_BLOCKS + block) * (TILE_H * TILE_W * BLOCK)
    pair = tl.arange(0, TILE_H * TILE_W)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(partial_ptr + place + pair, total)


@triton.jit
def _backward_extra_kernel(
    grad_out_ptr,
    query_ptr,
    extra_key_ptr,
    extra_value_ptr,
    lse_ptr,
    shared_ptr,
    partial_key_ptr,
    partial_value_ptr,
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
    scale,
    batch_size,
    num_heads,
    height,
    width,
    num_extra,
    num_shares,
    HEAD_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the gradients of extra keys and values over a share of the queries of an image.

    Into (shares, B, M, heads, D), float32, those of keys without the factor `scale`.
    """
    program = tl.program_id(0)
    num_blocks = tl.cdiv(num_extra, TILE_W)
    block = program % num_blocks
    program = program // num_blocks
    head = (program % num_heads).to(tl.int64)
    program = program // num_heads
    batch = (program % batch_size).to(tl.int64)
    share = program // batch_size
    grad_out_ptr += batch * grad_out_stride_b + head * grad_out_stride_n
    query_ptr += batch * query_stride_b + head * query_stride_n

    number = block * TILE_W + tl.arange(0, TILE_W)
    is_key = number < num_extra
    offset = ((batch * num_extra + tl.minimum(number, num_extra - 1)) * num_heads + head) * HEAD_DIM
    k = load_tokens(extra_key_ptr, offset, 1, HEAD_DIM, BLOCK_D)
    v = load_tokens(extra_value_ptr, offset, 1, HEAD_DIM, BLOCK_D)
    grad_key = tl.zeros([TILE_W, BLOCK_D], tl.float32)
    grad_value = tl.zeros([TILE_W, BLOCK_D], tl.float32)
    for first_query in range(share * BLOCK, height * width, num_shares * BLOCK):
        position = first_query + tl.arange(0, BLOCK)
        is_query = position < height * width
        position = tl.minimum(position, height * width - 1)
        row, column = position // width, position % width
        q_offset = token_offset(row, column, query_stride_h, query_stride_w)
        q = load_tokens(query_ptr, q_offset, query_stride_d, HEAD_DIM, BLOCK_D)
        do_offset = token_offset(row, column, grad_out_stride_h, grad_out_stride_w)
        do = load_tokens(grad_out_ptr, do_offset, grad_out_stride_d, HEAD_DIM, BLOCK_D)
        token = (batch * (height * width) + position) * num_heads + head
        lse = tl.where(is_query, tl.load(lse_ptr + token), float("inf"))
        shared = tl.load(shared_ptr + token)
        logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
        grad_key, grad_value = accumulate_grad_key(
            grad_key, grad_value, logits, lse, shared, q, do, v, PRECISION
        )

    image = share.to(tl.int64) * batch_size + batch
    offset = ((image * num_extra + number) * num_heads + head) * HEAD_DIM
    store_tokens(partial_key_ptr, offset, grad_key, is_key, HEAD_DIM, BLOCK_D)
    store_tokens(partial_value_ptr, offset, grad_value, is_key, HEAD_DIM, BLOCK_D)

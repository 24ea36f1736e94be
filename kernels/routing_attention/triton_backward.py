"""The Triton kernels of the backward pass.

- ``_backward_query_kernel``: a program owns a tile of queries and walks through keys, as the
  forward kernel does. It also stores the term that all gradients of a query's logits share, for
  the other kernels: the mean of the weights' gradients. Its own is the product with the output,
  which the mean is but for rounding; in half precision that tells where padded tokens, whose
  gradients are sums over all queries, have most of the weight.
- ``_backward_key_kernel``: a program owns a tile of keys and walks through the queries of the
  regions that keep its region, by the transposed list of the routes, or through all queries of the
  image if dense.
- ``_backward_pad_kernel``: a program owns the padded tokens of a head and walks through a share of
  all queries.

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
    _find_own_tokens,
    _listed_tokens,
    _load_pad_value,
    _mask_logits,
    _region_of,
    _score_block,
    _score_pad,
)


@triton.jit
def _backward_query_kernel(
    grad_out_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    routes_ptr,
    counts_ptr,
    pad_count_ptr,
    pad_key_ptr,
    pad_value_ptr,
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
    rows,
    columns,
    region_h,
    region_w,
    topk,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the gradient of a tile of queries, and -<dO, O> of each, (B, H, W, heads)."""
    batch, head, region, row, column, is_query, has_queries = _find_own_tokens(
        num_heads,
        height,
        width,
        rows,
        columns,
        region_h,
        region_w,
        counts_ptr is not None,
        TILE,
    )
    if not has_queries:
        return
    grad_out_ptr += batch * grad_out_stride_b + head * grad_out_stride_n
    query_ptr += batch * query_stride_b + head * query_stride_n
    key_ptr += batch * key_stride_b + head * key_stride_n
    value_ptr += batch * value_stride_b + head * value_stride_n
    num_regions = rows * columns
    num_keys = height * width
    if counts_ptr is not None:
        counts_ptr += batch * num_regions * num_regions
    else:
        routes_ptr += (batch * num_regions + region) * topk
        num_keys = topk * region_h * region_w

    q_offset = token_offset(row, column, query_stride_h, query_stride_w)
    q = load_tokens(query_ptr, q_offset, query_stride_d, HEAD_DIM, BLOCK_D)
    do_offset = token_offset(row, column, grad_out_stride_h, grad_out_stride_w)
    do = load_tokens(grad_out_ptr, do_offset, grad_out_stride_d, VALUE_DIM, BLOCK_V)
    token = token_offset(batch * height + row, column, width * num_heads, num_heads) + head
    out = load_tokens(out_ptr, token * VALUE_DIM, 1, VALUE_DIM, BLOCK_V)
    lse = tl.load(lse_ptr + token)
    shared = -tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    query_region = _region_of(row, column, columns, region_h, region_w)

    grad_query = tl.zeros([TILE, BLOCK_D], tl.float32)
    total = tl.zeros([TILE], tl.float32)
    mean = tl.zeros([TILE], tl.float32)
    if pad_count_ptr is not None:
        pad_count_ptr += batch * num_regions
        pad_logits, pad_key = _score_pad(
            q, query_region, pad_count_ptr, pad_key_ptr, head, scale, HEAD_DIM, BLOCK_D
        )
        pad_value = _load_pad_value(pad_value_ptr, head, VALUE_DIM, BLOCK_V)
        grad_pad_weights = tl.sum(do.to(tl.float32) * pad_value[None, :], 1)
        total = tl.exp(pad_logits - lse)
        mean = total * grad_pad_weights
        grad_pad_logits = total * (grad_pad_weights + shared)
        grad_query = grad_pad_logits[:, None] * pad_key[None, :]
    for first_key in range(0, num_keys, BLOCK):
        k, v, logits = _score_block(
            q,
            query_region,
            first_key,
            routes_ptr,
            counts_ptr,
            topk,
            key_ptr,
            value_ptr,
            key_stride_h,
            key_stride_w,
            key_stride_d,
            value_stride_h,
            value_stride_w,
            value_stride_d,
            scale,
            height,
            width,
            rows,
            columns,
            region_h,
            region_w,
            HEAD_DIM,
            VALUE_DIM,
            PRECISION,
            BLOCK_D,
            BLOCK_V,
            BLOCK,
        )
        weights, grad_weights = weigh_gradients(logits, lse, do, v, PRECISION)
        total += tl.sum(weights, 1)
        mean += tl.sum(weights * grad_weights, 1)
        grad_query = accumulate_grad_query(grad_query, weights, grad_weights, shared, k, PRECISION)

    tl.store(shared_ptr + token, -mean / total, mask=is_query)  # total is 1 but for lse's rounding
    store_tokens(grad_query_ptr, token * HEAD_DIM, grad_query * scale, is_query, HEAD_DIM, BLOCK_D)


@triton.jit
def _backward_key_kernel(
    grad_out_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    keepers_ptr,
    keepers_start_ptr,
    counts_ptr,
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
    rows,
    columns,
    region_h,
    region_w,
    topk,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the gradients of a tile of keys and their values; logits are (keys, queries)."""
    batch, head, region, row, column, is_key, has_keys = _find_own_tokens(
        num_heads,
        height,
        width,
        rows,
        columns,
        region_h,
        region_w,
        counts_ptr is not None,
        TILE,
    )
    if not has_keys:
        return
    grad_out_ptr += batch * grad_out_stride_b + head * grad_out_stride_n
    query_ptr += batch * query_stride_b + head * query_stride_n
    key_ptr += batch * key_stride_b + head * key_stride_n
    value_ptr += batch * value_stride_b + head * value_stride_n
    num_regions = rows * columns
    num_queries = height * width
    num_keepers = 0
    if counts_ptr is not None:
        counts_ptr += batch * num_regions * num_regions
    else:
        keepers_start_ptr += batch * (num_regions + 1) + region
        begin = tl.load(keepers_start_ptr).to(tl.int32)
        num_keepers = tl.load(keepers_start_ptr + 1).to(tl.int32) - begin
        keepers_ptr += batch * num_regions * topk + begin
        num_queries = num_keepers * region_h * region_w

    k_offset = token_offset(row, column, key_stride_h, key_stride_w)
    k = load_tokens(key_ptr, k_offset, key_stride_d, HEAD_DIM, BLOCK_D)
    v_offset = token_offset(row, column, value_stride_h, value_stride_w)
    v = load_tokens(value_ptr, v_offset, value_stride_d, VALUE_DIM, BLOCK_V)
    key_region = _region_of(row, column, columns, region_h, region_w)

    grad_key = tl.zeros([TILE, BLOCK_D], tl.float32)
    grad_value = tl.zeros([TILE, BLOCK_V], tl.float32)
    for first_query in range(0, num_queries, BLOCK):
        row_q, column_q, is_query = _listed_tokens(
            first_query,
            keepers_ptr,
            num_keepers,
            height,
            width,
            columns,
            region_h,
            region_w,
            counts_ptr is not None,
            BLOCK,
        )
        q_offset = token_offset(row_q, column_q, query_stride_h, query_stride_w)
        q = load_tokens(query_ptr, q_offset, query_stride_d, HEAD_DIM, BLOCK_D)
        do_offset = token_offset(row_q, column_q, grad_out_stride_h, grad_out_stride_w)
        do = load_tokens(grad_out_ptr, do_offset, grad_out_stride_d, VALUE_DIM, BLOCK_V)
        token = token_offset(batch * height + row_q, column_q, width * num_heads, num_heads) + head
        lse = tl.load(lse_ptr + token)
        shared = tl.load(shared_ptr + token)
        query_region = _region_of(row_q, column_q, columns, region_h, region_w)
        logits = _mask_logits(
            tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale,
            counts_ptr,
            query_region[None, :],
            key_region[:, None],
            is_query[None, :],
            num_regions,
        )
        grad_key, grad_value = accumulate_grad_key(
            grad_key, grad_value, logits, lse, shared, q, do, v, PRECISION
        )

    token = token_offset(batch * height + row, column, width * num_heads, num_heads) + head
    store_tokens(grad_key_ptr, token * HEAD_DIM, grad_key * scale, is_key, HEAD_DIM, BLOCK_D)
    store_tokens(grad_value_ptr, token * VALUE_DIM, grad_value, is_key, VALUE_DIM, BLOCK_V)


@triton.jit
def _backward_pad_kernel(
    grad_out_ptr,
    query_ptr,
    pad_count_ptr,
    pad_key_ptr,
    pad_value_ptr,
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
    rows,
    columns,
    region_h,
    region_w,
    num_shares,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the gradients of the pad key and value over a share of the queries of each image.

    Into (shares, heads, channels), float32, those of the key without the factor ``scale``.
    """
    program = tl.program_id(0)
    head = (program % num_heads).to(tl.int64)
    share = program // num_heads
    grad_out_ptr += head * grad_out_stride_n
    query_ptr += head * query_stride_n
    pad_value = _load_pad_value(pad_value_ptr, head, VALUE_DIM, BLOCK_V)
    grad_key = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    grad_value = tl.zeros([BLOCK, BLOCK_V], tl.float32)
    num_blocks = tl.cdiv(height * width, BLOCK)
    for block in range(share, num_blocks * batch_size, num_shares):
        batch = (block // num_blocks).to(tl.int64)
        position = block % num_blocks * BLOCK + tl.arange(0, BLOCK)
        is_query = position < height * width
        position = tl.minimum(position, height * width - 1)
        row, column = position // width, position % width
        q_offset = batch * query_stride_b + token_offset(
            row, column, query_stride_h, query_stride_w
        )
        q = load_tokens(query_ptr, q_offset, query_stride_d, HEAD_DIM, BLOCK_D).to(tl.float32)
        do_offset = batch * grad_out_stride_b + token_offset(
            row, column, grad_out_stride_h, grad_out_stride_w
        )
        do = load_tokens(grad_out_ptr, do_offset, grad_out_stride_d, VALUE_DIM, BLOCK_V)
        do = do.to(tl.float32)
        token = (batch * (height * width) + position) * num_heads + head
        lse = tl.load(lse_ptr + token)
        shared = tl.load(shared_ptr + token)
        logits, _ = _score_pad(
            q,
            _region_of(row, column, columns, region_h, region_w),
            pad_count_ptr + batch * (rows * columns),
            pad_key_ptr,
            head,
            scale,
            HEAD_DIM,
            BLOCK_D,
        )
        weights = tl.where(is_query, tl.exp(logits - lse), 0.0)
        grad_logits = weights * (tl.sum(do * pad_value[None, :], 1) + shared)
        grad_key += grad_logits[:, None] * q
        grad_value += weights[:, None] * do

    place = share * num_heads + head
    channel = tl.arange(0, BLOCK_D)
    tl.store(
        partial_key_ptr + place * HEAD_DIM + channel, tl.sum(grad_key, 0), mask=channel < HEAD_DIM
    )
    channel = tl.arange(0, BLOCK_V)
    tl.store(
        partial_value_ptr + place * VALUE_DIM + channel,
        tl.sum(grad_value, 0),
        mask=channel < VALUE_DIM,
    )

"""The Triton kernel of the forward pass, and the pieces that the backward kernels share with it.

A program owns a tile of queries of an image and head, and walks through the keys that these may
see in blocks, in one of two ways:

- By regions: the tile is of one region. The tokens of its kept regions are one list, region after
  region, so that no size of region wastes more than the end of the last block; which region a
  token of the list is in is read from the routes, for each token.
- Dense, where ``counts_ptr`` is given: the tile is of tokens in image order, of any regions, and
  the keys are all tokens of the map. A table (B, regions, regions) holds the logarithm of how
  often each region kept each, minus infinity for never.

Keys and values are read in image order, through their strides. All padded tokens of the kept
regions are one key: its logit is raised by the logarithm of their number.

Every sum is made by one program in a fixed order: results are deterministic.
"""

import triton
import triton.language as tl

from ..triton_tokens import LOWEST, accumulate, load_tokens, store_tokens, token_offset


@triton.jit
def _find_own_tokens(
    num_heads,
    height,
    width,
    rows,
    columns,
    region_h,
    region_w,
    IS_DENSE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Image, head and region of this program's tile (dense: 0), and its tokens.

    These are rows, columns, which exist (the last stands for those that do not), and whether any.
    """
    begin_h, begin_w, real_w, count, num_regions = 0, 0, width, height * width, 1
    num_tiles = tl.cdiv(height * width, TILE)
    program = tl.program_id(0)
    if not IS_DENSE:
        num_regions = rows * columns
        num_tiles = tl.cdiv(region_h * region_w, TILE)
    region = program // num_tiles % num_regions
    if not IS_DENSE:
        begin_h = region // columns * region_h
        begin_w = region % columns * region_w
        real_w = tl.minimum(tl.maximum(width - begin_w, 0), region_w)
        count = real_w * tl.minimum(tl.maximum(height - begin_h, 0), region_h)
    first = program % num_tiles * TILE
    program = program // num_tiles // num_regions
    head = (program % num_heads).to(tl.int64)
    batch = (program // num_heads).to(tl.int64)
    number = first + tl.arange(0, TILE)
    is_token = number < count
    number = tl.minimum(number, tl.maximum(count - 1, 0))
    real_w = tl.maximum(real_w, 1)
    row, column = begin_h + number // real_w, begin_w + number % real_w
    return batch, head, region, row, column, is_token, first < count


@triton.jit
def _listed_tokens(
    first,
    list_ptr,
    length,
    height,
    width,
    columns,
    region_h,
    region_w,
    IS_DENSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Tokens first .. first + BLOCK - 1 of those of a list of regions, or of the map if dense.

    Rows, columns, and which exist: a token of the map stands for those that do not.
    """
    number = first + tl.arange(0, BLOCK)
    if IS_DENSE:
        exists = number < height * width
        number = tl.minimum(number, height * width - 1)
        return number // width, number % width, exists
    else:
        area = region_h * region_w
        exists = number < length * area
        number = tl.minimum(number, length * area - 1)
        region = tl.load(list_ptr + number // area).to(tl.int32)
        row = region // columns * region_h + number % area // region_w
        column = region % columns * region_w + number % area % region_w
        exists &= (row < height) & (column < width)
        return tl.minimum(row, height - 1), tl.minimum(column, width - 1), exists


@triton.jit
def _region_of(row, column, columns, region_h, region_w):
    """Number of the region that tokens are in."""
    return row // region_h * columns + column // region_w


@triton.jit
def _mask_logits(logits, counts_ptr, query_region, key_region, is_seen, num_regions):
    """Set to minus infinity what a query does not see; if dense, weight what it sees repeatedly.

    Regions and ``is_seen`` are shaped to broadcast to the logits.
    """
    if counts_ptr is not None:
        logits += tl.load(counts_ptr + query_region * num_regions + key_region)
    return tl.where(is_seen, logits, float("-inf"))


@triton.jit
def _score_block(
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
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Load keys first_key .. first_key + BLOCK - 1 of the walk and their values, and score them.

    Returns keys (BLOCK, BLOCK_D), values (BLOCK, BLOCK_V), and logits (queries, BLOCK).
    """
    row, column, is_key = _listed_tokens(
        first_key,
        routes_ptr,
        topk,
        height,
        width,
        columns,
        region_h,
        region_w,
        counts_ptr is not None,
        BLOCK,
    )
    k_offset = token_offset(row, column, key_stride_h, key_stride_w)
    k = load_tokens(key_ptr, k_offset, key_stride_d, HEAD_DIM, BLOCK_D)
    v_offset = token_offset(row, column, value_stride_h, value_stride_w)
    v = load_tokens(value_ptr, v_offset, value_stride_d, VALUE_DIM, BLOCK_V)
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    key_region = _region_of(row, column, columns, region_h, region_w)
    logits = _mask_logits(
        logits,
        counts_ptr,
        query_region[:, None],
        key_region[None, :],
        is_key[None, :],
        rows * columns,
    )
    return k, v, logits


@triton.jit
def _score_pad(
    q,
    query_region,
    pad_count_ptr,
    pad_key_ptr,
    head,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Logits of the padded tokens that queries see, taken together: LOWEST where there are none.

    Returns them and the pad key (BLOCK_D,), which is 0 where none is given.
    """
    logits = tl.load(pad_count_ptr + query_region)
    channel = tl.arange(0, BLOCK_D)
    pad_key = tl.zeros([BLOCK_D], tl.float32)
    if pad_key_ptr is not None:
        place = pad_key_ptr + head * HEAD_DIM + channel
        pad_key = tl.load(place, mask=channel < HEAD_DIM, other=0.0).to(tl.float32)
        logits += tl.sum(q.to(tl.float32) * pad_key[None, :], 1) * scale
    return tl.maximum(logits, LOWEST), pad_key


@triton.jit
def _load_pad_value(pad_value_ptr, head, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr):
    """The padded tokens' value (BLOCK_V,), 0 where none is given."""
    channel = tl.arange(0, BLOCK_V)
    pad_value = tl.zeros([BLOCK_V], tl.float32)
    if pad_value_ptr is not None:
        place = pad_value_ptr + head * VALUE_DIM + channel
        pad_value = tl.load(place, mask=channel < VALUE_DIM, other=0.0).to(tl.float32)
    return pad_value


@triton.jit
def _forward_kernel(
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
    """Attend: a program owns a tile of queries of one image and head."""
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
    query_region = _region_of(row, column, columns, region_h, region_w)

    highest = tl.full([TILE], LOWEST, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    out = tl.zeros([TILE, BLOCK_V], tl.float32)
    if pad_count_ptr is not None:
        pad_count_ptr += batch * num_regions
        highest, _ = _score_pad(
            q, query_region, pad_count_ptr, pad_key_ptr, head, scale, HEAD_DIM, BLOCK_D
        )
        total = tl.where(highest > LOWEST, 1.0, 0.0)
        pad_value = _load_pad_value(pad_value_ptr, head, VALUE_DIM, BLOCK_V)
        out = total[:, None] * pad_value[None, :]
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
        highest, total, out = accumulate(highest, total, out, logits, v, PRECISION)

    token = token_offset(batch * height + row, column, width * num_heads, num_heads) + head
    store_tokens(out_ptr, token * VALUE_DIM, out / total[:, None], is_query, VALUE_DIM, BLOCK_V)
    tl.store(lse_ptr + token, highest + tl.log(total), mask=is_query)

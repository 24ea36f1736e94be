"""What the operators' Triton kernels share: tokens in memory, and the sums over keys.

Tokens of a head are (tokens, channels). Positions are multiplied with strides in int64: tensors
may have more than 2**31 elements.
"""

import triton
import triton.language as tl

# Below every logit and finite: the difference of two of them is 0, not NaN.
LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def token_offset(row, column, stride_h, stride_w):
    """Elements from the first token of an image to others of its map."""
    return row.to(tl.int64) * stride_h + column.to(tl.int64) * stride_w


@triton.jit
def load_tokens(pointer, offset, stride_d, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load (tokens, channels), 0 in channels that pad the head; all tokens must exist.

    That is why callers repeat a token in place of one that does not: masks of so many loads cost
    registers, and spill on AMD's GPUs.
    """
    channel = tl.arange(0, BLOCK_D)
    place = pointer + offset[:, None] + channel.to(tl.int64)[None, :] * stride_d
    if HEAD_DIM < BLOCK_D:
        return tl.load(place, mask=(channel < HEAD_DIM)[None, :], other=0.0)
    else:
        return tl.load(place)


@triton.jit
def store_tokens(pointer, offset, tokens, is_token, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store (tokens, channels) into a tensor that is contiguous in the channels."""
    channel = tl.arange(0, BLOCK_D)
    tl.store(
        pointer + offset[:, None] + channel[None, :],
        tokens.to(pointer.dtype.element_ty),
        mask=is_token[:, None] & (channel < HEAD_DIM)[None, :],
    )


@triton.jit
def weigh_block(highest, total, logits):
    """Take a block of keys into the online softmax: row maxima and denominators.

    Logits are (queries, keys), minus infinity where a query does not see a key; row maxima begin
    at LOWEST or above. Returns the new ones, the weights of the block's values, and what the sums
    of earlier ones are multiplied with, (queries,).
    """
    new_highest = tl.maximum(highest, tl.max(logits, 1))
    weights = tl.exp(logits - new_highest[:, None])
    decay = tl.exp(highest - new_highest)
    return new_highest, total * decay + tl.sum(weights, 1), weights, decay


@triton.jit
def accumulate(highest, total, out, logits, v, PRECISION: tl.constexpr):
    """Take a block of keys and values into the online softmax, as :func:`weigh_block` does."""
    highest, total, weights, decay = weigh_block(highest, total, logits)
    out = out * decay[:, None]
    out += tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    return highest, total, out


@triton.jit
def weigh_gradients(logits, lse, do, v, PRECISION: tl.constexpr):
    """Weights of a block of keys and their gradients, both (queries, keys)."""
    grad_weights = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    return tl.exp(logits - lse[:, None]), grad_weights


@triton.jit
def accumulate_grad_query(grad_query, weights, grad_weights, shared, k, PRECISION: tl.constexpr):
    """Add what a block of keys gives the gradient of queries, without the factor of the logits.

    ``shared`` is the term that the gradients of a query's logits share.
    """
    grad_logits = weights * (grad_weights + shared[:, None])
    return grad_query + tl.dot(grad_logits.to(k.dtype), k, input_precision=PRECISION)


@triton.jit
def accumulate_grad_key(
    grad_key, grad_value, logits, lse, shared, q, do, v, PRECISION: tl.constexpr
):
    """Add what a block of queries gives the gradients of keys and values, keys as above.

    Logits are (keys, queries); the lse of queries that do not count is infinity.
    """
    weights = tl.exp(logits - lse[None, :])
    grad_value += tl.dot(weights.to(do.dtype), do, input_precision=PRECISION)
    grad_weights = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    grad_logits = weights * (grad_weights + shared[None, :])
    grad_key += tl.dot(grad_logits.to(q.dtype), q, input_precision=PRECISION)
    return grad_key, grad_value

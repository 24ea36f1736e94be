"""What both forms of polyline attention on the CPU go over: heads of images, some at a time.

Shapes: B batch, (H, W) the map, h heads, G heads of images together, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Group(NamedTuple):
    """Some heads of an image, or all heads of some images: G of them.

    Attributes:
        images: which images.
        heads: which heads of each.
    """

    images: slice
    heads: slice

    def of(self, tokens: Tensor) -> Tensor:
        """Take theirs of (B, H, W, h, ...): a view."""
        return tokens[self.images, :, :, self.heads]


def prefix_sums(
    log_alpha: Tensor, log_beta: Tensor, dtype: torch.dtype, head_axis: int
) -> tuple[Tensor, Tensor]:
    """Sum decays along lines: as `decays.prefix_sums` does, with fewer passes.

    Args:
        log_alpha: (B, H, W, h).
        log_beta: like log_alpha.
        dtype: that of the sums.
        head_axis: where these have their heads: 1, (B, h, H, W), or 2, (B, H, h, W).

    Returns:
        Those along rows, and those along columns, contiguous.
    """
    log_alpha, log_beta = (t.movedim(3, head_axis) for t in (log_alpha, log_beta))
    return _sum_along(log_alpha, 3, dtype), _sum_along(log_beta, 3 - head_axis, dtype)


def _sum_along(decays: Tensor, axis: int, dtype: torch.dtype) -> Tensor:
    """Sum decays along an axis, from 0 at its first one, which is left out."""
    sums = decays.new_empty(decays.shape, dtype=dtype)
    sums.select(axis, 0).zero_()
    rest = (axis, 1, decays.shape[axis] - 1)
    torch.cumsum(decays.narrow(*rest), axis, dtype=dtype, out=sums.narrow(*rest))
    return sums


def groups(batch: int, num_heads: int, most: int) -> Iterator[Group]:
    """Go over the heads of all images, about evenly, at most `most` at a time or one."""
    num_images, step = even_size(batch, most // num_heads), even_size(num_heads, most)
    for images in cut(batch, num_images):
        for heads in cut(num_heads, step):
            yield Group(images, heads)


def cut(length: int, size: int) -> list[slice]:
    """Cut a length into parts of a size and a rest; one of all is no limit."""
    if size >= length:
        return [slice(None)]
    return [slice(begin, min(begin + size, length)) for begin in range(0, length, size)]


def even_size(length: int, most: int) -> int:
    """Give the size of a length's about even parts, the fewest that are at most `most`, or of 1."""
    num_parts = -(-length // max(1, most))
    return -(-length // num_parts)


def is_for_onednn(factor: Tensor) -> bool:
    """Whether `multiply` leaves it to oneDNN, which takes half the time of PyTorch's products.

    It takes contiguous factors of one head, (1, rows, D).
    """
    backend = torch.backends.mkldnn
    is_one = len(factor) == 1 and factor.dtype == torch.float32
    return is_one and backend.is_available() and backend.enabled


def multiply(left: Tensor, right: Tensor, space: Tensor | None = None) -> Tensor:
    """Multiply (G, rows, D) by the transposes of (G, columns, D): (G, rows, columns).

    In `space` if that is given, but not by oneDNN.
    """
    if is_for_onednn(left):
        return torch.ops.mkldnn._linear_pointwise(left[0], right[0], None, "none", [], "")[None]
    return torch.bmm(left, right.transpose(1, 2), out=space)


def log_sum_exp(own_logits: Tensor, own_weights: Tensor) -> Tensor | None:
    """Give the logarithms of the denominators of softmaxes by one logit and weight of each.

    None where a weight is too small to be precise.
    """
    if float(own_weights.min()) < torch.finfo(own_weights.dtype).tiny:
        return None
    return own_logits - own_weights.log()


def index_sign(length: int, dtype: torch.dtype, at: slice = slice(None)) -> Tensor:
    """Give the sign of i - j for those i of a line that are `at`, and all j: (places, length).

    The log mask of a line is the prefix sum P of i less that of j where i > j, and the reverse
    elsewhere: its gradient, times this sign, adds to that of P of i and takes from that of P of j.
    """
    place = torch.arange(length, dtype=dtype, device="cpu")
    return (place[at, None] - place).sign_()

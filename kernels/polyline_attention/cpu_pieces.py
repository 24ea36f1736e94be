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

    def take(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """Give (B, H, W, h, ...) as (G, H, W, ...): contiguous, or for one head a view."""
        part = tokens[self.images, :, :, self.heads].movedim(3, 1).to(dtype)
        is_one = part.shape[:2] == (1, 1)
        return part[0] if is_one else part.contiguous().flatten(0, 1)

    def put(self, part: Tensor, tokens: Tensor) -> None:
        """Write (G, H, W, ...) into (B, H, W, h, ...)."""
        view = tokens[self.images, :, :, self.heads].movedim(3, 1)
        view.copy_(part.reshape(view.shape))


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


def multiply(left: Tensor, right: Tensor, space: Tensor | None = None) -> Tensor:
    """Multiply (G, rows, D) by the transposes of (G, columns, D): (G, rows, columns).

    By oneDNN where it can, which takes half the time of PyTorch's products; elsewhere the result is
    in `space` if that is given.
    """
    backend = torch.backends.mkldnn
    if (
        len(left) > 1
        or left.dtype != torch.float32
        or not (backend.is_available() and backend.enabled)
    ):
        return torch.bmm(left, right.transpose(1, 2), out=space)
    return torch.ops.mkldnn._linear_pointwise(left[0], right[0], None, "none", [], "")[None]


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

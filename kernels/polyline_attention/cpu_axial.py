"""Axial polyline attention on the CPU: batched attention along lines, some lines at a time.

With both paths the output is Ah (Aw v) + Aw (Ah v), halved: lines of one axis are gone over, then
those of the other, then those of the first again. The first axis is the one of shorter lines; its
weights are kept meanwhile where they are few, and made anew elsewhere.

Maps are (B, H, h, W, ...): of one image the lines of rows and of columns both are views, n after n.

Shapes: B images, (H, W) the map, h heads, D and E channels of a head of keys and of values, n lines
of L tokens, K keys of a line: its tokens, or more, that no query attends to.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .cpu_pieces import Group, even_size, groups, index_sign, log_sum_exp

# Weights of some lines that are made at a time: 1 MiB of float32.
BLOCK = 1 << 18
# Channels of queries of the heads that go together: 1 MiB of float32.
GROUP = 1 << 18
# Weights of an axis that are kept: 16 MiB of float32.
MOST_KEPT = 1 << 22
# Fewer keys make no vector, and PyTorch's softmax takes ten times as long.
_FEWEST_KEYS = 16
# What products are written to: lines of columns are views, empty_like would keep their strides.
_CONTIGUOUS = dict(memory_format=torch.contiguous_format)
# Where maps have their heads.
HEAD_AXIS = 2


class _Axis:
    """The lines of one axis of some heads of images: n of L tokens.

    Args:
        query: (B, H, h, W, D).
        key: (B, H, h, W, D).
        sums: (B, H, h, W), prefix sums of decays along the lines.
        scale: factor of the logits.
        is_row: whether lines are rows, not columns.
        is_kept: whether weights are gone over twice.
    """

    def __init__(
        self, query: Tensor, key: Tensor, sums: Tensor, scale: float, is_row: bool, is_kept: bool
    ) -> None:
        self.is_row = is_row
        self.scale = scale
        self.grid = query.shape[:4]
        self.query, self.key = self.lines(query), self.keys(key)
        self.sums = self.lines(sums).contiguous()
        num_lines, length = self.sums.shape
        self.shape = num_lines, length, self.key.shape[1]  # n, L, K
        self.key_sums, missing = self.sums, self.shape[2] - length
        if missing > 0:  # what is no token is infinitely far
            self.key_sums = F.pad(self.sums, (0, missing), value=-torch.inf)
        self.step = even_size(num_lines, BLOCK // prod(self.shape[1:]))
        is_kept = is_kept and prod(self.shape) <= MOST_KEPT
        self._kept: list[tuple[slice, Tensor]] | None = [] if is_kept else None

    def lines(self, tokens: Tensor) -> Tensor:
        """(B, H, h, W, ...) as lines (n, L, ...)."""
        return (tokens if self.is_row else tokens.movedim(1, 3)).flatten(0, 2)

    def keys(self, tokens: Tensor) -> Tensor:
        """(B, H, h, W, D) as those of lines (n, K, D), zeros after the tokens."""
        lines = self.lines(tokens)
        missing = _FEWEST_KEYS - lines.shape[1]
        return F.pad(lines, (0, 0, 0, missing)) if missing > 0 else lines

    def map(self, lines: Tensor) -> Tensor:
        """Lines (n, L, ...), or keys, as (B, H, h, W, ...)."""
        batch, height, heads, width = self.grid
        tokens = lines[:, : self.shape[1]]
        if self.is_row:
            return tokens.unflatten(0, (batch, height, heads))
        return tokens.unflatten(0, (batch, heads, width)).movedim(3, 1)

    def blocks(self, own: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Go over some lines at a time: which ones, and their weights (lines, L, K).

        Args:
            own: (2, n, L), what the logits and weights of own tokens are written to if asked for.
        """
        if self._kept:
            yield from self._kept
            return
        # One for all blocks: fresh memory costs more than what is done with it.
        space = None if self._kept is not None else self._space()
        for at, logits in self.logits():
            out = None if space is None else space[: len(logits)]
            weights = torch.softmax(logits, -1, out=out)
            if own is not None:
                for pairs, tokens in zip((logits, weights), own, strict=True):
                    tokens[at] = pairs.diagonal(dim1=1, dim2=2)
            if self._kept is not None:
                self._kept.append((at, weights))
            yield at, weights

    def logits(self) -> Iterator[tuple[slice, Tensor]]:
        """Go over some lines at a time: which ones, and their logits with the mask, (lines, L, K).

        All are in one memory.
        """
        space = self._space()
        for begin in range(0, self.shape[0], self.step):
            at = slice(begin, min(begin + self.step, self.shape[0]))
            logits = space[: at.stop - begin]
            torch.sub(self.sums[at].unsqueeze(2), self.key_sums[at].unsqueeze(1), out=logits)
            keys = self.key[at].transpose(1, 2)
            logits.abs_().baddbmm_(self.query[at], keys, beta=-1, alpha=self.scale)
            yield at, logits

    def log_sum_exp(self, own: Tensor) -> Tensor:
        """Give the logarithms of the denominators, (B, H, h, W), by what `blocks` wrote."""
        logarithms = log_sum_exp(*own)
        if logarithms is None:
            logarithms = own[0]
            for at, logits in self.logits():
                logarithms[at] = logits.logsumexp(-1)
        return self.map(logarithms)

    def _space(self) -> Tensor:
        """Make room for some lines: (lines, L, K)."""
        return self.sums.new_empty(min(self.step, self.shape[0]), *self.shape[1:])


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    along_rows: Tensor,
    along_columns: Tensor,
    paths: str,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Fill `out`, (B, H, W, h, E), and `lse`, (B, H, W, h, 2), for the other arguments.

    `along_rows` and `along_columns`, prefix sums, are (B, H, h, W).
    """
    has_both = paths == "both"
    for group in _groups(query):
        q, k, v = (_take(group, t, lse.dtype) for t in (query, key, value))
        sums = [t[group.images, :, group.heads] for t in (along_rows, along_columns)]
        axes = _axes(q, k, *sums, scale, paths, has_both)
        first, second = axes
        own = [axis.sums.new_empty(2, *axis.sums.shape) for axis in axes]
        (once,) = _attend(first, [v], own[0])
        if has_both:
            twice, other = _attend(second, [once, v], own[1])
            result = _attend(first, [other])[0].add_(twice).mul_(0.5)
        else:
            (result,) = _attend(second, [once], own[1])
        _put(result, group, out)
        for axis, of_axis in zip(axes, own, strict=True):
            _put(axis.log_sum_exp(of_axis), group, lse[..., 0 if axis.is_row else 1])


def _attend(axis: _Axis, values: list[Tensor], own: Tensor | None = None) -> list[Tensor]:
    """Sum values along lines: (B, H, h, W, E) to the same."""
    values = [axis.keys(value) for value in values]
    results = [value.new_empty(*axis.shape[:2], value.shape[2]) for value in values]
    for at, weights in axis.blocks(own):
        for value, result in zip(values, results, strict=True):
            torch.bmm(weights, value[at], out=result[at])
    return [axis.map(result) for result in results]


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    along_rows: Tensor,
    along_columns: Tensor,
    paths: str,
    scale: float,
    dtype: torch.dtype,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    grad_sums: tuple[Tensor, Tensor] | None,
) -> None:
    """Fill the gradients of query, key and value, and those of the prefix sums if asked for.

    The latter are (B, H, W, h), `along_rows` and `along_columns` (B, H, h, W); `dtype` is that of
    all that is computed.
    """
    differentiate = _differentiate_both if paths == "both" else _differentiate_row_first
    for group in _groups(query):
        q, k, v, grad = (_take(group, t, dtype) for t in (query, key, value, grad_out))
        sums = [t[group.images, :, group.heads] for t in (along_rows, along_columns)]
        axes = _axes(q, k, *sums, scale, paths, True)
        grad_v, *of_axes = differentiate(*axes, v, grad, grad_sums is not None)
        _put(grad_v, group, grad_value)
        _put((of_axes[0].query + of_axes[1].query).mul_(scale), group, grad_query)
        _put((of_axes[0].key + of_axes[1].key).mul_(scale), group, grad_key)
        if grad_sums is not None:
            for axis, of_axis in zip(axes, of_axes, strict=True):
                _put(of_axis.sums, group, grad_sums[0 if axis.is_row else 1])


class _Gradients(NamedTuple):
    """Those of the product of an axis' weights and values, all as maps (B, H, h, W, ...).

    Attributes:
        value: (B, H, h, W, E).
        query: (B, H, h, W, D), less the scale.
        key: (B, H, h, W, D), less the scale.
        sums: (B, H, h, W), of the prefix sums; None if not asked for.
    """

    value: Tensor
    query: Tensor
    key: Tensor
    sums: Tensor | None


def _differentiate_row_first(
    first: _Axis, second: _Axis, value: Tensor, grad: Tensor, needs_sums: bool
) -> tuple[Tensor, _Gradients, _Gradients]:
    """Give the gradient of v in A2 (A1 v), and those of both products."""
    of_second, _ = _differentiate(second, grad, _attend(first, [value])[0], needs_sums)
    of_first, _ = _differentiate(first, of_second.value, value, needs_sums)
    return of_first.value, of_first, of_second


def _differentiate_both(
    first: _Axis, second: _Axis, value: Tensor, grad: Tensor, needs_sums: bool
) -> tuple[Tensor, _Gradients, _Gradients]:
    """Give the gradient of v in (A2 (A1 v) + A1 (A2 v)) / 2, and those of both axes' products.

    An axis has two products with its weights: their values and cotangents go side by side.
    """
    channels = value.shape[-1]
    grad = grad * 0.5
    once, grad_other = _attend_both_ways(first, value, grad)
    of_second, other = _differentiate(
        second, torch.cat([grad, grad_other], -1), torch.cat([once, value], -1), needs_sums, value
    )
    grad_once, grad_value = of_second.value.split(channels, dim=-1)
    of_first, _ = _differentiate(
        first, torch.cat([grad_once, grad], -1), torch.cat([value, other], -1), needs_sums
    )
    return of_first.value[..., :channels] + grad_value, of_first, of_second


def _attend_both_ways(axis: _Axis, value: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply values by weights and cotangents by transposed weights: (B, H, h, W, E) both."""
    values, cotangents = axis.keys(value), axis.lines(grad)
    result, transposed = (torch.empty_like(t, **_CONTIGUOUS) for t in (cotangents, values))
    for at, weights in axis.blocks():
        torch.bmm(weights, values[at], out=result[at])
        torch.bmm(weights.transpose(1, 2), cotangents[at], out=transposed[at])
    return axis.map(result), axis.map(transposed)


def _differentiate(
    axis: _Axis,
    grad: Tensor,
    value: Tensor,
    needs_sums: bool,
    attended: Tensor | None = None,
) -> tuple[_Gradients, Tensor | None]:
    """Differentiate the product of an axis' weights and values.

    Args:
        axis: the lines.
        grad: (B, H, h, W, E), cotangent of the product.
        value: (B, H, h, W, E).
        needs_sums: whether to give the gradient of the prefix sums.
        attended: (B, H, h, W, E') or None, other values to multiply by the weights.

    Returns:
        The gradients, and the product with `attended`.
    """
    cotangents, values = axis.lines(grad), axis.keys(value)
    grads = [torch.empty_like(t, **_CONTIGUOUS) for t in (values, axis.query, axis.key)]
    grad_values, grad_query, grad_key = grads
    grad_sums = axis.sums.new_empty(axis.sums.shape) if needs_sums else None
    others = products = None
    if attended is not None:
        others = axis.keys(attended)
        products = others.new_empty(*axis.shape[:2], others.shape[2])
    sign = index_sign(axis.shape[2], values.dtype)[: axis.shape[1]]
    for at, weights in axis.blocks():
        if products is not None:
            torch.bmm(weights, others[at], out=products[at])
        torch.bmm(weights.transpose(1, 2), cotangents[at], out=grad_values[at])
        grad_weights = torch.bmm(cotangents[at], values[at].transpose(1, 2))
        grad_logits = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        torch.bmm(grad_logits, axis.key[at], out=grad_query[at])
        torch.bmm(grad_logits.transpose(1, 2), axis.query[at], out=grad_key[at])
        if grad_sums is not None:
            grad_logits.mul_(sign)
            of_keys = grad_logits.sum(1)[:, : axis.shape[1]]
            torch.sub(grad_logits.sum(2), of_keys, out=grad_sums[at])
    maps = (None if t is None else axis.map(t) for t in (*grads, grad_sums))
    return _Gradients(*maps), None if products is None else axis.map(products)


def _take(group: Group, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Take those of a group of (B, H, W, h, ...): (B, H, h, W, ...), whose lines are views."""
    part = group.of(tokens).movedim(3, 2).to(dtype)
    is_one_head = part.shape[0] == part.shape[2] == 1
    return part if is_one_head else part.contiguous()


def _put(part: Tensor, group: Group, tokens: Tensor) -> None:
    """Write (B, H, h, W, ...) into those of a group of (B, H, W, h, ...)."""
    group.of(tokens).movedim(3, 2).copy_(part)


def _groups(query: Tensor) -> Iterator[Group]:
    """Go over some heads of images at a time: those that have few channels, or one."""
    batch, height, width, heads, head_dim = query.shape
    return groups(batch, heads, GROUP // (height * width * head_dim))


def _axes(
    query: Tensor,
    key: Tensor,
    along_rows: Tensor,
    along_columns: Tensor,
    scale: float,
    paths: str,
    is_twice: bool,
) -> tuple[_Axis, _Axis]:
    """Give the axis that values meet first, and the other one.

    With both paths the order is free. The first one's weights, if gone over twice, are made twice
    where they are not kept: it is the one of shorter lines.
    """
    height, width = query.shape[1:3]
    is_row_first = paths == "row_first" or width <= height
    row = query, key, along_rows, scale, True, is_twice and is_row_first
    column = query, key, along_columns, scale, False, is_twice and not is_row_first
    return (_Axis(*row), _Axis(*column)) if is_row_first else (_Axis(*column), _Axis(*row))

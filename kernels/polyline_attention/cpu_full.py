"""Full polyline attention on the CPU: all keys of some queries at a time.

A block has the queries of some rows, or of some columns of one row where rows are long, of some
heads where maps are small. Its logits are made once and get the masks of both paths, which are
sums of a table over (query's column, keys) of all rows and of small ones of the rows at hand.

Shapes: (H, W) the map, N its tokens, h heads, G heads of images together, D and E channels of a
head of keys and of values, (I, J) rows and columns of queries of a block. Indices: (i, j) the
query's row and column, (k, l) the key's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from .cpu_pieces import Group, even_size, groups, index_sign, is_for_onednn, log_sum_exp, multiply

# Logits of a block: 2 MiB of float32. Half or twice as many take within 10% of the time; fewer are
# products that are too small, more do not fit the cache. In float32 with head_dim 32, on one core
# of an AMD EPYC (AVX-512) beside other work, a logit of 32x42 tokens takes 3.5 ns, with two calls
# of flash attention, which would be given the masks, 5 ns and the time to make these.
BLOCK = 1 << 19
# Columns of a map below which its rows fill no vector in sums that broadcast along one axis.
_FEWEST_COLUMNS = 32
# Where prefix sums have their heads.
HEAD_AXIS = 1


class _Mask(NamedTuple):
    """The log mask of a path: of its line from the query to where it turns, and of the rest.

    The former is |of_query - of_turn|, the prefix sums of both along that line.

    Attributes:
        of_query: (G, I, J, 1, 1).
        of_turn: (G, I, 1, 1, W) or (G, 1, J, H, 1), the columns or rows where paths turn; or as
            `to_key`, that of each key, where rows are short.
        to_key: (G, I, 1, H, W) or (G, 1, J, H, W), with signs changed.
    """

    of_query: Tensor
    of_turn: Tensor
    to_key: Tensor

    def add(self, logits: Tensor, space: Tensor, out: Tensor) -> None:
        """Add it to logits; all are (G, I, J, H, W), and `out` may be either."""
        is_of_keys = self.of_turn.shape == self.to_key.shape
        to_turn = torch.sub(self.of_query, self.of_turn, out=space if is_of_keys else None)
        torch.sub(logits, to_turn.abs_(), out=out).sub_(self.to_key)


class _Block(NamedTuple):
    """The queries of a block.

    Attributes:
        rows: which rows.
        columns: which columns.
        shape: (G, I, J, H, W).
        masks: of the row-first path, and of the column-first one if there are both.
    """

    rows: slice
    columns: slice
    shape: tuple[int, int, int, int, int]
    masks: tuple[_Mask, ...]

    def queries(self, tokens: Tensor) -> Tensor:
        """Take those of (G, H, W, ...): (G, I * J, ...)."""
        return tokens[:, self.rows, self.columns].flatten(1, 2)

    def put(self, part: Tensor, tokens: Tensor) -> None:
        """Write (G, I * J, ...) into (G, H, W, ...)."""
        view = tokens[:, self.rows, self.columns]
        view.copy_(part.view(view.shape))

    def put_own(self, pairs: Tensor, tokens: Tensor) -> None:
        """Write what own tokens have of (paths, G, I * J, N) into (paths, G, H, W)."""
        num_heads, rows, columns, height, width = self.shape
        keys = height * width
        tokens[:, :, self.rows, self.columns] = pairs.as_strided(
            (len(pairs), num_heads, rows, columns),
            (pairs.stride(0), rows * columns * keys, columns * keys + width, keys + 1),
            pairs.storage_offset() + self.rows.start * width + self.columns.start,
        )

    def spaces(self, space: Tensor) -> Tensor:
        """Cut (3, entries) to the logits of this block: (3, G, I * J, N)."""
        num_heads, rows, columns, height, width = self.shape
        shape = num_heads, rows * columns, height * width
        return space[:, : prod(shape)].unflatten(1, shape)

    def logits(self, query: Tensor, key: Tensor, spaces: Tensor) -> Iterator[Tensor]:
        """Make the logits of the paths, with their masks, one after the other: (G, I * J, N).

        Args:
            query: (G, H, W, D), multiplied by the scale.
            key: (G, N, D).
            spaces: (3, G, I * J, N), of which the first and the last are written to.
        """
        logits = multiply(self.queries(query), key, spaces[0])
        for path, mask in enumerate(self.masks):
            masked = spaces[2] if path < len(self.masks) - 1 else logits
            mask.add(*(t.view(self.shape) for t in (logits, spaces[2], masked)))
            yield masked

    def weights(
        self, query: Tensor, key: Tensor, spaces: Tensor, own: Tensor | None = None
    ) -> Tensor:
        """Make the weights of the paths, (paths, G, I * J, N), in the last of `spaces`.

        Args:
            query: as of `logits`.
            key: as of `logits`.
            spaces: as of `logits`.
            own: (1 + paths, G, H, W), what own tokens' logits, which have no mask, and weights are
                written to if asked for.
        """
        for path, logits in enumerate(self.logits(query, key, spaces)):
            torch.softmax(logits, -1, out=spaces[1 + path])
        weights = spaces[1 : 1 + len(self.masks)]
        if own is not None:
            self.put_own(logits.unsqueeze(0), own[:1])
            self.put_own(weights, own[1:])
        return weights


def _blocks(along_rows: Tensor, along_columns: Tensor, paths: str) -> Iterator[_Block]:
    """Cut the queries of a map; blocks of the same columns follow each other.

    Args:
        along_rows: (G, H, W), prefix sums of decays.
        along_columns: (G, H, W) as well.
        paths: "both" or "row_first".
    """
    num_heads, height, width = along_rows.shape
    queries = max(1, BLOCK // (num_heads * height * width))
    num_rows, num_columns = even_size(height, queries // width), even_size(width, queries)
    for left in range(0, width, num_columns):
        columns = slice(left, min(left + num_columns, width))
        if paths == "both":
            of_turn = along_columns[:, None, :, columns].transpose(2, 3).unsqueeze(4)
            to_key = along_rows[:, None, :, columns].transpose(2, 3).unsqueeze(4)
            of_column = _turns(of_turn, (to_key - along_rows[:, None, None]).abs_())
        for top in range(0, height, num_rows):
            rows = slice(top, min(top + num_rows, height))
            on_rows, on_columns = (
                t[:, rows, columns, None, None] for t in (along_rows, along_columns)
            )
            of_turn = along_rows[:, rows, None, None]
            to_key = along_columns[:, rows, None, None] - along_columns[:, None, None]
            masks = [_Mask(on_rows, *_turns(of_turn, to_key.abs_()))]
            if paths == "both":
                masks.append(_Mask(on_columns, *of_column))
            shape = num_heads, rows.stop - top, columns.stop - left, height, width
            yield _Block(rows, columns, shape, tuple(masks))


def _turns(of_turn: Tensor, to_key: Tensor) -> tuple[Tensor, Tensor]:
    """Give a mask's prefix sums at turns, for each key where rows are short, and the rest of it."""
    is_short = to_key.shape[4] < _FEWEST_COLUMNS
    return of_turn.expand_as(to_key).contiguous() if is_short else of_turn, to_key


def _space(query: Tensor, dtype: torch.dtype) -> Tensor:
    """Make room for what the blocks of a call make: fresh memory costs more than what is done."""
    batch, height, width, heads, _ = query.shape
    tokens = height * width
    entries = min(max(BLOCK, tokens), batch * heads * tokens**2)
    return query.new_empty(3, entries, dtype=dtype)


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
    """Fill `out`, (B, H, W, h, E), and `lse`, (B, H, W, h, paths), for the other arguments.

    `along_rows` and `along_columns`, prefix sums, are (B, h, H, W).
    """
    dtype = lse.dtype
    factor = 0.5 if paths == "both" else 1.0
    space = _space(query, dtype)
    for group in _groups(query):
        q = _take(group, query, dtype) * scale
        k = _take(group, key, dtype).flatten(1, 2)
        v = (_take(group, value, dtype) * factor).flatten(1, 2).transpose(1, 2)
        if is_for_onednn(q):
            q, k, v = (t.contiguous() for t in (q, k, v))
        sums = [t[group.images, group.heads].flatten(0, 1) for t in (along_rows, along_columns)]
        result = q.new_empty(*q.shape[:3], v.shape[1])
        own = q.new_empty(1 + lse.shape[-1], *q.shape[:3])
        for block in _blocks(*sums, paths):
            weights = block.weights(q, k, block.spaces(space), own)
            block.put(multiply(_total(weights), v), result)
        _put(result, group, out)
        logarithms = log_sum_exp(own[0], own[1:])
        if logarithms is None:
            logarithms = own[1:]
            for block in _blocks(*sums, paths):
                for path, logits in enumerate(block.logits(q, k, block.spaces(space))):
                    block.put(logits.logsumexp(-1), logarithms[path])
        _put(logarithms.movedim(0, 3), group, lse)


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

    The latter are (B, H, W, h), `along_rows` and `along_columns` (B, h, H, W); `dtype` is that of
    all that is computed.
    """
    factor = 0.5 if paths == "both" else 1.0
    space = _space(query, dtype)
    for group in _groups(query):
        q = (_take(group, query, dtype) * scale).contiguous()
        grad = (_take(group, grad_out, dtype) * factor).contiguous()
        k, v = (_take(group, t, dtype).flatten(1, 2).contiguous() for t in (key, value))
        sums = [t[group.images, group.heads].flatten(0, 1) for t in (along_rows, along_columns)]
        grad_q = torch.empty_like(q)
        # Transposed, as products take and give them.
        key_channels = k.transpose(1, 2).contiguous()
        grad_k, grad_v = (t.new_zeros(len(t), t.shape[2], t.shape[1]) for t in (k, v))
        of_sums = _SumGradients(*map(torch.zeros_like, sums))
        for block in _blocks(*sums, paths):
            queries, cotangents = block.queries(q), block.queries(grad)
            weights = block.weights(q, k, block.spaces(space))
            grad_weights = multiply(cotangents, v)
            grad_logits = [
                torch._softmax_backward_data(grad_weights, path, -1, dtype) for path in weights
            ]
            if grad_sums is not None:
                of_sums.add(block, *grad_logits)
            total, grad_total = _total(weights), _total(grad_logits)
            for grads, left, right in (
                (grad_v, cotangents, total),
                (grad_k, queries, grad_total),
            ):
                grads += multiply(left.transpose(1, 2).contiguous(), right.transpose(1, 2))
            block.put(multiply(grad_total, key_channels), grad_q)
        _put(grad_q.mul_(scale), group, grad_query)
        _put(grad_k.transpose(1, 2), group, grad_key)
        _put(grad_v.transpose(1, 2), group, grad_value)
        if grad_sums is not None:
            for part, total in zip(of_sums, grad_sums, strict=True):
                _put(part, group, total)


def _total(of_paths: Sequence[Tensor]) -> Tensor:
    """Add what there is of each path to the first."""
    first, *others = of_paths
    for other in others:
        first += other
    return first


class _SumGradients(NamedTuple):
    """Gradients of the prefix sums.

    The gradient of a log mask, times the sign of the index difference of its two tokens, adds to
    the sum of the first token and takes from that of the second.

    Attributes:
        rows: (G, H, W), of those along rows.
        columns: (G, H, W), of those along columns.
    """

    rows: Tensor
    columns: Tensor

    def add(self, block: _Block, row_first: Tensor, column_first: Tensor | None = None) -> None:
        """Add what gradients of the logits of a block are, (G, I * J, N) for either path."""
        rows, columns = block.rows, block.columns
        row_sign = index_sign(self.rows.shape[2], self.rows.dtype, columns)  # (J, W)
        column_sign = index_sign(self.rows.shape[1], self.rows.dtype, rows)  # (I, H)
        row_first = row_first.view(block.shape)
        along_row = row_first.sum(3).mul_(row_sign)  # (G, I, J, W)
        self.rows[:, rows, columns] += along_row.sum(3)
        self.rows[:, rows] -= along_row.sum(2)
        along_column = row_first.sum(2).mul_(column_sign.unsqueeze(2))  # (G, I, H, W)
        self.columns[:, rows] += along_column.sum(2)
        self.columns.sub_(along_column.sum(1))
        if column_first is None:
            return
        column_first = column_first.view(block.shape)
        along_row = column_first.sum(1).mul_(row_sign.unsqueeze(1))  # (G, J, H, W)
        self.rows[:, :, columns] += along_row.sum(3).transpose(1, 2)
        self.rows.sub_(along_row.sum(1))
        along_column = column_first.sum(4).mul_(column_sign.unsqueeze(1))  # (G, I, J, H)
        self.columns[:, rows, columns] += along_column.sum(3)
        self.columns[:, :, columns] -= along_column.sum(1).transpose(1, 2)


def _take(group: Group, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Take those of a group of (B, H, W, h, ...): (G, H, W, ...), a view where it can be one."""
    return group.of(tokens).movedim(3, 1).to(dtype).flatten(0, 1)


def _put(part: Tensor, group: Group, tokens: Tensor) -> None:
    """Write (G, H, W, ...), or (G, N, ...), into those of a group of (B, H, W, h, ...)."""
    view = group.of(tokens).movedim(3, 1)
    view.copy_(part.reshape(view.shape))


def _groups(query: Tensor) -> Iterator[Group]:
    """Go over some heads of images at a time: those of which all logits fill a block."""
    batch, height, width, heads, _ = query.shape
    return groups(batch, heads, BLOCK // (height * width) ** 2)

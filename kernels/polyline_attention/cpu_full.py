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

from .cpu_pieces import Group, even_size, groups, index_sign, log_sum_exp, multiply

# Logits of a block: 2 MiB of float32. Half or twice as many take within 10% of the time; fewer are
# products that are too small, more do not fit the cache. In float32 with head_dim 32, on one core
# of an AMD EPYC (AVX-512) beside other work, a logit of 32x42 tokens takes 3.5 ns, with two calls
# of flash attention, which would be given the masks, 5 ns and the time to make these.
BLOCK = 1 << 19


class _Block(NamedTuple):
    """The queries of a block.

    Attributes:
        rows: which rows.
        columns: which columns.
        shape: (G, I, J, H, W).
        masks: of each path two log masks with their signs changed, which broadcast to that shape:
            of the row-first path (G, I, J, 1, W) along the query's row and (G, I, 1, H, W) along
            the key's column, of the column-first one (G, 1, J, H, W) along the key's row and
            (G, I, J, H, 1) along the query's column.
    """

    rows: slice
    columns: slice
    shape: tuple[int, int, int, int, int]
    masks: tuple[tuple[Tensor, Tensor], ...]

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
            spaces: (3, G, I * J, N), of which the first is written to, and the last for the first
                of two paths.
        """
        logits = multiply(self.queries(query), key, spaces[0])
        for path, masks in enumerate(self.masks):
            masked = spaces[2] if path < len(self.masks) - 1 else logits
            view = masked.view(self.shape)
            torch.sub(logits.view(self.shape), masks[0], out=view)
            view.sub_(masks[1])
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
        on_columns = along_rows[:, :, columns]
        key_row = None
        if paths == "both":
            key_row = on_columns.transpose(1, 2).unsqueeze(3) - along_rows.unsqueeze(1)
            key_row = key_row.abs_().unsqueeze(1)
        for top in range(0, height, num_rows):
            rows = slice(top, min(top + num_rows, height))
            query_row = on_columns[:, rows].unsqueeze(3) - along_rows[:, rows].unsqueeze(2)
            key_column = along_columns[:, rows].unsqueeze(2) - along_columns.unsqueeze(1)
            masks = [(query_row.abs_().unsqueeze(3), key_column.abs_().unsqueeze(2))]
            if paths == "both":
                of_keys = along_columns[:, :, columns].transpose(1, 2).unsqueeze(1)
                query_column = along_columns[:, rows, columns].unsqueeze(3) - of_keys
                masks.append((key_row, query_column.abs_().unsqueeze(4)))
            shape = num_heads, rows.stop - top, columns.stop - left, height, width
            yield _Block(rows, columns, shape, tuple(masks))


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
    """Fill `out`, (B, H, W, h, E), and `lse`, (B, H, W, h, paths), for the other arguments."""
    dtype = lse.dtype
    factor = 0.5 if paths == "both" else 1.0
    space = _space(query, dtype)
    for group in _groups(query):
        q = (group.take(query, dtype) * scale).contiguous()
        k, v = (group.take(t, dtype).flatten(1, 2) for t in (key, value))
        k, v = k.contiguous(), (v.transpose(1, 2) * factor).contiguous()
        sums = [group.take(t, dtype) for t in (along_rows, along_columns)]
        result = q.new_empty(*q.shape[:3], v.shape[1])
        own = q.new_empty(1 + lse.shape[-1], *q.shape[:3])
        for block in _blocks(*sums, paths):
            weights = block.weights(q, k, block.spaces(space), own)
            block.put(multiply(_total(weights), v), result)
        group.put(result, out)
        logarithms = log_sum_exp(own[0], own[1:])
        if logarithms is None:
            logarithms = own[1:]
            for block in _blocks(*sums, paths):
                for path, logits in enumerate(block.logits(q, k, block.spaces(space))):
                    block.put(logits.logsumexp(-1), logarithms[path])
        group.put(logarithms.movedim(0, 3), lse)


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

    `dtype` is that of all that is computed.
    """
    factor = 0.5 if paths == "both" else 1.0
    space = _space(query, dtype)
    for group in _groups(query):
        q = (group.take(query, dtype) * scale).contiguous()
        grad = (group.take(grad_out, dtype) * factor).contiguous()
        k, v = (group.take(t, dtype).flatten(1, 2).contiguous() for t in (key, value))
        sums = [group.take(t, dtype) for t in (along_rows, along_columns)]
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
        group.put(grad_q.mul_(scale), grad_query)
        group.put(grad_k.transpose(1, 2), grad_key)
        group.put(grad_v.transpose(1, 2), grad_value)
        if grad_sums is not None:
            for part, total in zip(of_sums, grad_sums, strict=True):
                group.put(part, total)


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


def _groups(query: Tensor) -> Iterator[Group]:
    """Go over some heads of images at a time: those of which all logits fill a block."""
    batch, height, width, heads, _ = query.shape
    return groups(batch, heads, BLOCK // (height * width) ** 2)

"""Padded tokens on the CPU: what they add to attention to the tokens that are on the map.

All of them have one key and one value. A query that attends to some of them attends to one more
key, the logit of which has the logarithm of their number added.

Shapes: N tokens of all images, n queries at a time, h heads, D and E channels of a head of keys
and of values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .regions import Regions

# Channels that are gone over at a time, which stay in the cache.
_PIECE = 1 << 17


class Padding(NamedTuple):
    """The queries of a call that attend to padded tokens, P of them, and what those carry.

    Attributes:
        queries_at: (P,) numbers of the queries' tokens.
        log_count: (P, 1) logarithm of the number of padded tokens.
        key: (h, D).
        value: (h, E).
        scale: factor of the logits.
    """

    queries_at: Tensor
    log_count: Tensor
    key: Tensor
    value: Tensor
    scale: float

    @classmethod
    def of(
        cls,
        query: Tensor,
        value: Tensor,
        routes: Tensor,
        pad_key: Tensor | None,
        pad_value: Tensor | None,
        regions: Regions,
        scale: float,
        dtype: torch.dtype,
    ) -> Padding | None:
        """Take the arguments of a call; None where no query attends to any."""
        grid = tuple(query.shape[1:3])
        if regions.padded_grid == grid:
            return None
        count = regions.num_padded(grid, routes.device)[routes].sum(2)
        count = count.view(-1, regions.rows, 1, regions.columns, 1)
        count = count.expand(-1, -1, regions.height, -1, regions.width)
        count = count.flatten(3).flatten(1, 2)[:, : grid[0], : grid[1]].flatten()
        (queries_at,) = count.nonzero(as_tuple=True)
        if queries_at.numel() == 0:
            return None
        return cls(
            queries_at,
            count[queries_at, None].to(dtype).log_(),
            *(
                like.new_zeros(like.shape[3:], dtype=dtype) if token is None else token.to(dtype)
                for token, like in ((pad_key, query), (pad_value, value))
            ),
            scale,
        )

    def merge(self, query: Tensor, out: Tensor, lse: Tensor) -> None:
        """Let the queries attend to them too.

        Args:
            query: (N, h * D).
            out: (N, h * E) of the tokens on the map, changed in place.
            lse: (N, h), -inf where a query attends to none of those; changed in place.
        """
        for at, log_count in self._pieces():
            logits = self._logits(self._take(query, at), log_count)
            others = lse[at]
            total = torch.logaddexp(others, logits)
            merged = self._take(out, at) * (others - total).exp_().unsqueeze(-1)
            merged.addcmul_((logits - total).exp_().unsqueeze(-1), self.value)
            out.index_copy_(0, at, merged.flatten(1).to(out.dtype))
            lse.index_copy_(0, at, total)

    def backward(
        self, grad_out: Tensor, query: Tensor, out: Tensor, lse: Tensor, grad_query: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Add to the gradient of the queries, and give those of key and value.

        Args:
            grad_out: (N, h * E), cotangent of `out`.
            query: (N, h * D).
            out: (N, h * E) of all tokens, with these.
            lse: (N, h) as well.
            grad_query: (N, h * D), changed in place.
        """
        # They sum over all queries.
        grad_key, grad_value = (
            torch.zeros_like(token, dtype=torch.float64) for token in (self.key, self.value)
        )
        for at, log_count in self._pieces():
            tokens, cotangent, result = (self._take(t, at) for t in (query, grad_out, out))
            weights = (self._logits(tokens, log_count) - lse[at]).exp_().unsqueeze(-1)
            grad_value += (weights * cotangent).sum(0, dtype=torch.float64)
            grad_logits = (cotangent * (self.value - result)).sum(-1, keepdim=True)
            grad_logits.mul_(weights).mul_(self.scale)
            grad_key += (grad_logits * tokens).sum(0, dtype=torch.float64)
            grad_query.index_add_(0, at, (grad_logits * self.key).flatten(1))
        return grad_key, grad_value

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Go over the queries: their tokens and logarithms."""
        step = max(1, _PIECE // max(self.key.numel(), self.value.numel()))
        return zip(self.queries_at.split(step), self.log_count.split(step), strict=True)

    def _take(self, rows: Tensor, at: Tensor) -> Tensor:
        """Take tokens, (N, h * D): (n, h, D)."""
        return rows.index_select(0, at).unflatten(1, (len(self.key), -1)).to(self.key.dtype)

    def _logits(self, query: Tensor, log_count: Tensor) -> Tensor:
        """Give the logit that stands for all that a query attends to: (n, h)."""
        return (query * self.key).sum(-1).mul_(self.scale).add_(log_count)

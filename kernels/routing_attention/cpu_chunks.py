"""How the CPU path goes over regions: some at a time, with the places of their tokens.

Where regions cover the map exactly they go row by row, and a chunk's queries are a view of the
map. Where they reach beyond it, those at the bottom and at the right have fewer queries, and every
region attends to as many tokens as are on the map of those that it routes to: regions of one size
go together, those that attend to most first.

Shapes: B batch, N tokens of all images, R regions of T tokens, k kept regions, n regions of a
chunk, Q queries and K keys of a region, h heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .regions import Regions

# Channels of all keys and values of a chunk: 2 MiB of float32. Half or twice as many take within 5%
# of the time; far fewer take more calls, far more do not fit the cache.
CHUNK = 1 << 19


class Chunk(NamedTuple):
    """Some regions with equally many queries.

    Attributes:
        count: regions, n.
        num_queries: queries of a region, Q.
        num_keys: most keys of a region, K; 0 where all regions attend to padded tokens alone.
        keys_at: (n * K,) number of the token of every key.
        queries_at: number of the token of every query, (n * Q,), or a box in `query_view`.
        num_real: (n,) keys of each region, those after which are repetitions; None if all have K.
    """

    count: int
    num_queries: int
    num_keys: int
    keys_at: Tensor
    queries_at: Tensor | tuple[slice, slice]
    num_real: Tensor | None

    def keys(self, rows: Tensor, num_heads: int, space: Tensor) -> Tensor:
        """Gather keys, (N, h * D), into `space`, (keys, h * D), and give it as (n, K, h, D)."""
        keys = torch.index_select(rows, 0, self.keys_at, out=space[: len(self.keys_at)])
        return keys.view(self.count, self.num_keys, num_heads, -1)

    def add_keys(self, tile: Tensor, rows: Tensor) -> None:
        """Add (n, K, h, D) to the tokens that the keys are, (N, h * D)."""
        rows.index_add_(0, self.keys_at, tile.reshape(-1, rows.shape[1]))

    def queries(self, view: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
        """Take queries from a `query_view`: (n, Q, h, D)."""
        if isinstance(self.queries_at, tuple):
            queries = view[self.queries_at]
        else:
            queries = view.index_select(0, self.queries_at)
        return queries.to(dtype).reshape(self.count, self.num_queries, num_heads, -1)

    def put(self, tile: Tensor, view: Tensor) -> None:
        """Write what the queries get, (n, Q, h, D) or (n, Q, h), to a `query_view`."""
        if isinstance(self.queries_at, tuple):
            view = view[self.queries_at]
            view.copy_(tile.reshape(view.shape))
        else:
            view.index_copy_(0, self.queries_at, tile.reshape(-1, view.shape[1]).to(view.dtype))

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """Shut out what are no keys of a region: (n, 1, 1, K), 0 or -inf; None for none."""
        if self.num_real is None:
            return None
        is_none = _numbers(self.num_keys) >= self.num_real[:, None]
        mask = is_none.new_zeros(is_none.shape, dtype=dtype).masked_fill_(is_none, float("-inf"))
        return mask[:, None, None]


def query_view(rows: Tensor, regions: Regions, grid: tuple[int, int]) -> Tensor:
    """View (N, C) as chunks take queries from it and put them: its regions, if they cover the map.

    Returns:
        (B * rows, columns, height, width, C), or `rows` as it is.
    """
    if regions.padded_grid != grid:
        return rows
    shape = (-1, regions.height, regions.columns, regions.width)
    return rows.unflatten(0, shape).transpose(1, 2)


def most_keys(routes: Tensor, regions: Regions, channels: int) -> int:
    """Bound the keys of a chunk, those of all its regions together; arguments as of `chunks`."""
    of_region = routes.shape[2] * regions.area
    return min(max(CHUNK // channels, of_region), routes.shape[0] * regions.count * of_region)


def chunks(
    routes: Tensor, regions: Regions, grid: tuple[int, int], channels: int
) -> Iterator[Chunk]:
    """Go over all regions that have queries.

    Args:
        routes: (B, R, k).
        regions: the regions of the map.
        grid: height and width of the map, tokens.
        channels: what is held for every key of a chunk.
    """
    if regions.padded_grid == grid:
        return _whole_chunks(routes, regions, grid, channels)
    return _ragged_chunks(routes, regions, grid, channels)


class _Part(NamedTuple):
    """Regions that have equally many tokens on the map.

    Attributes:
        regions: (R',) their numbers.
        offsets: (Q,) places of their tokens, from the first one of the region on.
    """

    regions: Tensor
    offsets: Tensor


@lru_cache(maxsize=128)
def _cut(regions: Regions, grid: tuple[int, int]) -> tuple[Tensor, tuple[_Part, ...]]:
    """Give the number of every region's first token, (R,), and the parts that have tokens."""

    def offsets(height: int, width: int) -> Tensor:
        return (_numbers(height)[:, None] * grid[1] + _numbers(width)).flatten()

    numbers = _numbers(regions.count).view(regions.rows, regions.columns)
    starts = _numbers(regions.rows)[:, None] * (regions.height * grid[1])
    starts = starts + _numbers(regions.columns) * regions.width
    parts = tuple(
        _Part(numbers[rows, columns].flatten(), offsets(height, width))
        for rows, height in _spans(grid[0], regions.height)
        for columns, width in _spans(grid[1], regions.width)
    )
    return starts.flatten(), parts


def _spans(length: int, size: int) -> list[tuple[slice, int]]:
    """Split the regions of an axis into those of full size and the one that has less, if any."""
    count, rest = divmod(length, size)
    spans = [(slice(0, count), size)] if count else []
    return [*spans, (slice(count, count + 1), rest)] if rest else spans


def _first_tokens(batch: int, grid: tuple[int, int]) -> Tensor:
    """Give the number of every image's first token: (B,)."""
    return _numbers(batch) * (grid[0] * grid[1])


def _numbers(count: int) -> Tensor:
    """Count from 0, on the CPU whatever the default device: (count,)."""
    return torch.arange(count, device="cpu")


def _whole_chunks(
    routes: Tensor, regions: Regions, grid: tuple[int, int], channels: int
) -> Iterator[Chunk]:
    """Go over regions row by row; none has padded tokens."""
    batch, _, topk = routes.shape
    starts, ((_, offsets),) = _cut(regions, grid)
    # Those of all chunks at once: 8 bytes for a key are little beside its channels.
    keys_at = starts[routes] + _first_tokens(batch, grid)[:, None, None]
    keys_at = (keys_at[..., None] + offsets).reshape(batch * regions.rows, regions.columns, -1)
    num_keys = topk * regions.area
    limit = max(1, CHUNK // (channels * num_keys))
    for rows, columns in _boxes(batch * regions.rows, regions.columns, limit):
        box_keys_at = keys_at[rows, columns]
        count = box_keys_at.shape[0] * box_keys_at.shape[1]
        yield Chunk(count, regions.area, num_keys, box_keys_at.flatten(), (rows, columns), None)


def _boxes(rows: int, columns: int, limit: int) -> Iterator[tuple[slice, slice]]:
    """Cut rows into boxes of at most `limit`: whole rows, or even pieces of one."""
    height = max(1, limit // columns)
    width = -(-columns // -(-columns // limit))
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            yield slice(top, min(top + height, rows)), slice(left, min(left + width, columns))


def _ragged_chunks(
    routes: Tensor, regions: Regions, grid: tuple[int, int], channels: int
) -> Iterator[Chunk]:
    """Go over regions by the number of their queries, then by that of their keys."""
    batch, _, topk = routes.shape
    starts, parts = _cut(regions, grid)
    num_real = regions.num_real(grid, routes.device)
    tokens = routes.new_full((regions.count, regions.area), -1)  # those not on the map stay so
    for part in parts:
        tokens[part.regions, : len(part.offsets)] = starts[part.regions, None] + part.offsets
    first_tokens = _first_tokens(batch, grid)
    for part in parts:
        # Regions of all images from here on, (B * R',), those with most keys first.
        part_routes = routes.index_select(1, part.regions).flatten(0, 1)
        num_keys, order = num_real[part_routes].sum(1).sort(descending=True, stable=True)
        first_token = first_tokens.repeat_interleave(len(part.regions))[order]
        queries_at = starts[part.regions].repeat(batch)[order] + first_token
        queries_at = queries_at[:, None] + part.offsets
        routed = tokens[part_routes[order]].flatten(1)
        is_real = routed >= 0
        keys_at = (routed + first_token[:, None])[is_real]
        counts = num_keys.tolist()
        begin = first_key = 0
        while begin < len(counts):
            most = counts[begin]
            end = min(begin + max(1, CHUNK // (channels * max(most, 1))), len(counts))
            if most and not counts[end - 1]:
                end = counts.index(0)
            chunk_num_keys = num_keys[begin:end] if counts[end - 1] < most else None
            last_key = first_key + sum(counts[begin:end])
            chunk_keys_at = keys_at[first_key:last_key]
            if chunk_num_keys is not None:
                # A region's last key stands for those that it lacks.
                place = torch.minimum(_numbers(most), chunk_num_keys[:, None] - 1)
                place += (chunk_num_keys.cumsum(0) - chunk_num_keys)[:, None]
                chunk_keys_at = chunk_keys_at[place.flatten()]
            yield Chunk(
                end - begin,
                len(part.offsets),
                most,
                chunk_keys_at,
                queries_at[begin:end].flatten(),
                chunk_num_keys,
            )
            begin, first_key = end, last_key

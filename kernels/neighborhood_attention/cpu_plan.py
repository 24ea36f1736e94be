"""Which cut of a grid the CPU path takes: the one of the least estimated time.

The estimate is that of the forward pass; the backward pass spends about three times as much on
calls and on tiles alike.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from math import ceil

from .cpu_tiles import BANDS_CHUNK, AxisTiles, Bands, Columns, Tiles, axis_tiles, columns
from .windows import Neighborhood

# Nanoseconds, fitted to tiles of 2x2 to 8x8 queries and head_dim 32 on one core of an AMD EPYC
# (AVX-512) that shared its caches. Only their ratios matter.
CALL_COST = 22_000.0  # the operators of a class of tiles
BLOCK_COST = 1_000.0  # up to 32 queries of one head of a tile
LOGIT_COST = 0.8  # one logit
CHANNEL_COST = 0.068  # one channel of one logit
ROW_STEP = 8  # queries that products in flash attention are rounded up to
TILES_COPY_COST = 0.33  # one channel of a token that `Tiles` copy
BANDS_COPY_COST = 0.094  # one channel of a token that `Bands` copy
# Queries of a tile along an axis that are tried, beside a whole group.
TILE_SIZES = (2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64)


@lru_cache(maxsize=128)
def forward_plan(
    grid: tuple[int, int],
    neighborhood: Neighborhood,
    batch: int,
    num_heads: int,
    head_dim: int,
    has_extra: bool,
) -> tuple[Tiles, ...] | tuple[Bands, ...]:
    """Cut a grid for the forward pass; bands have no place for extra keys."""
    tiles_cost, tiles = _best_tiles(grid, neighborhood, batch * num_heads, head_dim, ROW_STEP)
    if has_extra or max(neighborhood.dilation) > 1:
        return tiles
    bands_cost, rows, row = min(
        (
            (batch * _bands_cost(rows, row, num_heads, head_dim), rows, row)
            for rows, row in product(
                _rows(grid[0], neighborhood, 0), _columns(grid[1], neighborhood)
            )
        ),
        key=lambda choice: choice[0],
    )
    if bands_cost >= tiles_cost:
        return tiles
    return tuple(_bands(y, row, neighborhood, grid[1], num_heads * head_dim) for y in rows)


@lru_cache(maxsize=128)
def backward_plan(
    grid: tuple[int, int], neighborhood: Neighborhood, batch: int, num_heads: int, head_dim: int
) -> tuple[Tiles, ...]:
    """Cut a grid for the backward pass."""
    return _best_tiles(grid, neighborhood, batch * num_heads, head_dim, 1)[1]


def _best_tiles(
    grid: tuple[int, int],
    neighborhood: Neighborhood,
    num_heads: int,
    head_dim: int,
    row_step: int,
) -> tuple[float, tuple[Tiles, ...]]:
    """The least estimated cost of `Tiles`, and those; heads are those of the whole batch."""
    cost, *axes = min(
        (
            (_tiles_cost(y, x, num_heads, head_dim, row_step), y, x)
            for y, x in product(*(_rows(grid[axis], neighborhood, axis) for axis in (0, 1)))
        ),
        key=lambda choice: choice[0],
    )
    return cost, tuple(Tiles(y, x, neighborhood) for y, x in product(*axes))


def _bands(
    y: AxisTiles, x: Columns, neighborhood: Neighborhood, width: int, channels: int
) -> Bands:
    """One class of bands, with as many tile rows at a time as the limit allows."""
    row = 2 * y.num_queries * x.num_keys * len(x.keys) * channels
    step = min(max(1, BANDS_CHUNK // row), y.num_tiles)
    return Bands(y, x, neighborhood, width, step)


def _tile_sizes(size: int, stride: int) -> list[int]:
    """Sizes of tiles to try in a group of `size` members: multiples of the stride, or all."""
    sizes = {ceil(tile / stride) * stride for tile in TILE_SIZES}
    whole = [size] if size <= max(max(TILE_SIZES), stride) else []
    return [*sorted(tile for tile in sizes if tile < size), *whole]


def _rows(length: int, neighborhood: Neighborhood, axis: int) -> list[tuple[AxisTiles, ...]]:
    """The cuts of an axis to try, each with all its classes.

    The groups of dilation have two sizes where the dilation does not divide the length.
    """
    kernel_size, dilation, stride, is_causal = (
        getattr(neighborhood, name)[axis]
        for name in ("kernel_size", "dilation", "stride", "is_causal")
    )
    num_larger = length % dilation
    size = length // dilation
    groups = [(0, num_larger, size + 1), (num_larger, dilation - num_larger, size)]
    return [
        tuple(
            tiles._replace(group=first, num_groups=count)
            for first, count, size in groups
            if count
            for tiles in axis_tiles(size, kernel_size, stride, is_causal, tile)
        )
        for tile in _tile_sizes(-(-length // dilation), stride)
    ]


def _columns(length: int, neighborhood: Neighborhood) -> list[Columns]:
    """The cuts of the second axis to try for `Bands`."""
    settings = neighborhood.kernel_size[1], neighborhood.stride[1], neighborhood.is_causal[1]
    return [columns(length, *settings, tile) for tile in _tile_sizes(length, 1)]


def _tile_cost(queries: int, keys: int, head_dim: int, row_step: int) -> float:
    """Estimated time of one head of a tile, nanoseconds."""
    rows = ceil(queries / row_step) * row_step
    products = rows * keys * CHANNEL_COST * head_dim
    return BLOCK_COST * ceil(queries / 32) + queries * keys * LOGIT_COST + products


def _tiles_cost(
    y: tuple[AxisTiles, ...],
    x: tuple[AxisTiles, ...],
    num_heads: int,
    head_dim: int,
    row_step: int,
) -> float:
    """Estimated time of `Tiles`, nanoseconds."""
    cost = 0.0
    for a, b in product(y, x):
        queries, keys = a.num_queries * b.num_queries, a.num_keys * b.num_keys
        copies = (queries + keys) * 2 * head_dim
        tile = _tile_cost(queries, keys, head_dim, row_step) + copies * TILES_COPY_COST
        num_tiles = a.num_groups * a.num_tiles * b.num_groups * b.num_tiles
        cost += CALL_COST + num_heads * num_tiles * tile
    return cost


def _bands_cost(y: tuple[AxisTiles, ...], x: Columns, num_heads: int, head_dim: int) -> float:
    """Estimated time of `Bands` for one image, nanoseconds."""
    cost = 0.0
    is_copied = len(x.keys) > 1
    for a in y:
        queries, keys = a.num_queries * x.num_queries, a.num_keys * x.num_keys
        tile = _tile_cost(queries, keys, head_dim, ROW_STEP)
        num_rows = a.num_tiles * a.num_queries
        copies = num_rows * x.num_queries + (num_rows + a.num_keys) * x.num_keys
        copies *= 2 * head_dim
        per_head = a.num_tiles * tile + is_copied * copies * BANDS_COPY_COST
        cost += CALL_COST + num_heads * len(x.keys) * per_head
    return cost

"""How the CPU path cuts a grid into tiles of queries, and where their tokens lie.

A group of dilation is cut into tiles of consecutive queries; the keys of a tile are the union of
their windows. Tiles whose windows lie alike, seen from the tile, are one class and share a mask:
along an axis usually the first one, those inside and the last one. Two layouts run a class:

- `Tiles`: any grid; each tile is one of a batch, its keys are copied unless they can be viewed.
- `Bands`: undilated grids; tiles side by side along the second axis are put beside the heads, so
  that only overlaps along that axis are copied, those along the first one are viewed.

Shapes: B batch, (H, W) the grid, h heads, D channels of a head, n tiles, Q = Q_y * Q_x queries and
K = K_y * K_x keys of a tile, M extra keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby, product
from math import ceil, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .windows import Neighborhood, axis_windows

# Elements of the keys and values of the tiles that are gone over at a time.
TILES_CHUNK = 1 << 18
BANDS_CHUNK = 1 << 20
# Places in the table that a class of tiles keeps; masks of large kernels have megabytes of them.
_MOST_KEPT = 1 << 16
# Queries of a tile at a border that larger ones are cut into.
_MOST_AT_BORDER = 16


class AxisTiles(NamedTuple):
    """Tiles along one axis that look alike, counted in members of a group of dilation.

    Attributes:
        group: first of `num_groups` consecutive groups.
        num_groups: groups that are cut alike.
        query: first query of the first tile.
        num_tiles: consecutive tiles.
        num_queries: queries of a tile.
        key: first key of the first tile.
        num_keys: keys of a tile.
        windows: start and end of every query's window, from the first key of its tile.
    """

    group: int
    num_groups: int
    query: int
    num_tiles: int
    num_queries: int
    key: int
    num_keys: int
    windows: tuple[tuple[int, int], ...]

    def offsets(self, kernel_size: int) -> Tensor:
        """Key minus query plus kernel_size - 1, or -1 outside of the window.

        Returns:
            (num_queries, num_keys).
        """
        start, end = torch.tensor(self.windows).unsqueeze(2).unbind(1)
        key = torch.arange(self.num_keys)
        query = torch.arange(self.num_queries)[:, None] + (self.query - self.key)
        return torch.where((key >= start) & (key < end), key - query + (kernel_size - 1), -1)

    @property
    def is_full(self) -> bool:
        """Whether every query sees every key."""
        return all(window == (0, self.num_keys) for window in self.windows)


def _cut(size: int, kernel_size: int, stride: int, tile: int) -> list[int]:
    """Cut a group of `size` members into tiles of about `tile`, a multiple of the stride.

    The first and the last tile take what is left, at least the queries that share the window at
    the border: a tile there has fewer keys than one inside.
    """
    num_inside = (size - kernel_size - 1) // tile
    if num_inside < 1:
        return [min(tile, size - first) for first in range(0, size, tile)]
    first = ceil((size - num_inside * tile) / 2 / stride) * stride
    last = size - first - num_inside * tile
    step = ceil(max(tile, _MOST_AT_BORDER) / stride) * stride
    at_borders = ([min(step, n - done) for done in range(0, n, step)] for n in (first, last))
    return [*next(at_borders), *[tile] * num_inside, *next(at_borders)]


@lru_cache(maxsize=512)
def axis_tiles(
    size: int, kernel_size: int, stride: int, is_causal: bool, tile: int
) -> tuple[AxisTiles, ...]:
    """Cut one group of `size` members into tiles, consecutive ones that look alike together."""
    windows = axis_windows(size, kernel_size, 1, stride, is_causal)
    classes: list[AxisTiles] = []
    position = 0
    for num_queries, run in groupby(_cut(size, kernel_size, stride, tile)):
        query = torch.arange(size)[position:].split(num_queries)
        query = torch.stack(query[: len(list(run))])
        start, end = windows.start[query], windows.end[query]
        key = start.amin(1, keepdim=True)
        looks = torch.cat([query[:, :1] - key, start - key, end - key], dim=1)
        looks, counts = looks.unique_consecutive(dim=0, return_counts=True)
        for (lead, *bounds), count in zip(looks.tolist(), counts.tolist(), strict=True):
            seen = tuple(zip(bounds[:num_queries], bounds[num_queries:], strict=True))
            key, num_keys = position - lead, max(stop for _, stop in seen)
            classes.append(AxisTiles(0, 1, position, count, num_queries, key, num_keys, seen))
            position += count * num_queries
    return tuple(classes)


class _kept_if_small(cached_property):
    """A tensor that is computed once, or each time where it is large."""

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        tensor = super().__get__(instance, owner)
        if instance is not None and tensor.numel() > _MOST_KEPT:
            vars(instance).pop(self.attrname, None)
        return tensor


def table_index(y: Tensor, x: Tensor, neighborhood: Neighborhood) -> Tensor:
    """Places in the flattened table for offsets along both axes, one past its end for -1.

    Args:
        y: (Q_y, K_y).
        x: (..., Q_x, K_x).
        neighborhood: the windows.

    Returns:
        (... * Q * K,).
    """
    sides = [2 * k - 1 for k in neighborhood.kernel_size]
    y, x = y[:, None, :, None], x[..., None, :, None, :]
    return torch.where((y >= 0) & (x >= 0), y * sides[1] + x, prod(sides)).flatten()


@dataclass(frozen=True, eq=False)
class Tiles:
    """One class of tiles of a two-dimensional grid.

    Attributes:
        y: tiles along the first axis.
        x: tiles along the second.
        neighborhood: the windows.
    """

    y: AxisTiles
    x: AxisTiles
    neighborhood: Neighborhood

    @property
    def num_queries(self) -> int:
        """Q."""
        return self.y.num_queries * self.x.num_queries

    @property
    def num_keys(self) -> int:
        """K."""
        return self.y.num_keys * self.x.num_keys

    @property
    def num_masks(self) -> int:
        """Masks side by side."""
        return 1

    @cached_property
    def is_full(self) -> bool:
        """Whether every query sees every key."""
        return self.y.is_full and self.x.is_full

    @_kept_if_small
    def table_index(self) -> Tensor:
        """(Q * K,), of `table_index`."""
        offsets = map(AxisTiles.offsets, (self.y, self.x), self.neighborhood.kernel_size)
        return table_index(*offsets, self.neighborhood)

    def spread(self, table: Tensor) -> Tensor:
        """Spread a (h, table + 1) table over the tile: (1, h, Q, K)."""
        return table.index_select(1, self.table_index).view(1, -1, self.num_queries, self.num_keys)

    def chunks(self, batch: int, tile_elements: int) -> Iterator[Chunk]:
        """All tiles of a batch, some at a time; `tile_elements` is the size of one tile."""
        counts = (batch, self.y.num_groups, self.y.num_tiles, self.x.num_groups, self.x.num_tiles)
        for starts, sizes in _blocks(counts, max(1, TILES_CHUNK // tile_elements)):
            yield Chunk(self, starts, sizes)


class Chunk(NamedTuple):
    """Some tiles of a class: a box in (image, group, tile, group, tile).

    Attributes:
        tiles: the class.
        starts: first of the box.
        sizes: extent of the box; their product is n.
    """

    tiles: Tiles
    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    def view(
        self,
        tensor: Tensor,
        *,
        is_key: bool = False,
        is_head_first: bool = False,
        begin: tuple[int, int] = (0, 0),
        extent: tuple[int, int] | None = None,
    ) -> Tensor:
        """View the tiles in a tensor of the whole map, without copies; they may overlap.

        Args:
            tensor: (B, H, W, h, D).
            is_key: whether the tiles' keys are meant, not their queries.
            is_head_first: whether heads come before the tile's positions.
            begin: first of the tile's positions along each axis.
            extent: positions along each axis, by default all.

        Returns:
            (*sizes, Q_y, Q_x, h, D) or (*sizes, h, Q_y, Q_x, D), or K in place of Q.
        """
        sizes, strides, offset = _layout(self, tensor.stride(), is_key, begin, extent)
        heads, channels = tensor.shape[3:]
        if is_head_first:
            sizes = (*sizes[:5], heads, *sizes[5:], channels)
            strides = (*strides[:5], strides[7], *strides[5:7], strides[8])
        else:
            sizes = (*sizes, heads, channels)
        return tensor.as_strided(sizes, strides, tensor.storage_offset() + offset)

    def queries(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Queries of the tiles, (n, h, Q, D), copied where they cannot be viewed."""
        tile = self.view(tensor).to(dtype)
        return tile.reshape(prod(self.sizes), -1, *tensor.shape[3:]).transpose(1, 2)

    def keys(self, tensor: Tensor, extra: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Keys of the tiles, then the extra ones of their image, (n, h, K + M, D)."""
        tile = self.view(tensor, is_key=True).to(dtype)
        tile = tile.reshape(prod(self.sizes), -1, *tensor.shape[3:])
        if extra is not None:
            tile = torch.cat([tile, self.extra(extra, dtype)], dim=1)
        return tile.transpose(1, 2)

    def extra(self, extra: Tensor, dtype: torch.dtype) -> Tensor:
        """The extra keys of every tile's image: (B, M, h, D) to (n, M, h, D)."""
        images = extra[self.starts[0] : self.starts[0] + self.sizes[0]].to(dtype)
        return images.repeat_interleave(prod(self.sizes[1:]), dim=0)

    def flat_queries(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Queries of the tiles, (n * h, Q, D), for products."""
        tile = self.view(tensor, is_head_first=True).to(dtype)
        return tile.reshape(prod(self.sizes) * tensor.shape[3], -1, tensor.shape[4])

    def flat_keys(self, tensor: Tensor, extra: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Keys of the tiles, then the extra ones of their image, (n * h, K + M, D)."""
        tile = self.view(tensor, is_key=True, is_head_first=True).to(dtype)
        tile = tile.reshape(prod(self.sizes) * tensor.shape[3], -1, tensor.shape[4])
        if extra is not None:
            more = self.extra(extra, dtype).transpose(1, 2).flatten(0, 1)
            tile = torch.cat([tile, more], dim=1)
        return tile

    def add_keys(self, total: Tensor, extra_total: Tensor | None, tile: Tensor) -> None:
        """Add gradients of the tiles' keys, (n * h, K + M, D), to those of the map.

        Windows of neighbouring tiles overlap: cut to the length of the tile's queries, pieces of
        different tiles do not.
        """
        num_keys = self.tiles.num_keys
        by_tile = tile[:, :num_keys].view(
            *self.sizes, total.shape[3], self.tiles.y.num_keys, self.tiles.x.num_keys, -1
        )
        axes = (self.tiles.y, self.sizes[2]), (self.tiles.x, self.sizes[4])
        pieces = (
            [
                (first, min(step, axis.num_keys - first))
                for step in [axis.num_keys if count == 1 else axis.num_queries]
                for first in range(0, axis.num_keys, step)
            ]
            for axis, count in axes
        )
        for (y, height), (x, width) in product(*pieces):
            view = self.view(
                total, is_key=True, is_head_first=True, begin=(y, x), extent=(height, width)
            )
            view.add_(by_tile[..., y : y + height, x : x + width, :])
        if extra_total is not None:
            more = tile[:, num_keys:].view(
                self.sizes[0], -1, total.shape[3], tile.shape[1] - num_keys, tile.shape[2]
            )
            extra_total[self.starts[0] : self.starts[0] + self.sizes[0]] += more.sum(1).transpose(
                1, 2
            )


@lru_cache(maxsize=4096)
def _layout(
    chunk: Chunk,
    strides: tuple[int, ...],
    is_key: bool,
    begin: tuple[int, int],
    extent: tuple[int, int] | None,
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Of `Chunk.view`: sizes up to the tile's positions, all strides, offset of the start."""
    outer, inner, outer_strides, inner_strides = [*chunk.sizes], [], [strides[0]], []
    offset = chunk.starts[0] * strides[0]
    for axis, tiles in enumerate((chunk.tiles.y, chunk.tiles.x)):
        group = strides[1 + axis]
        member = group * chunk.tiles.neighborhood.dilation[axis]
        first, count = (tiles.key, tiles.num_keys) if is_key else (tiles.query, tiles.num_queries)
        first += chunk.starts[2 + 2 * axis] * tiles.num_queries + begin[axis]
        offset += (tiles.group + chunk.starts[1 + 2 * axis]) * group + first * member
        outer_strides += [group, member * tiles.num_queries]
        inner.append(count if extent is None else extent[axis])
        inner_strides.append(member)
    return (*outer, *inner), (*outer_strides, *inner_strides, *strides[3:]), offset


@lru_cache(maxsize=256)
def _blocks(counts: tuple[int, ...], limit: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Cut a box into boxes of at most `limit` elements, row-major: (starts, sizes) of each."""
    if not counts:
        return (((), ()),)
    inner = prod(counts[1:])
    step = min(max(1, limit // max(inner, 1)), max(counts[0], 1))
    return tuple(
        ((start, *starts), (min(step, counts[0] - start), *sizes))
        for start in range(0, counts[0], step)
        for starts, sizes in _blocks(counts[1:], limit)
    )


class Columns(NamedTuple):
    """Tiles along the second axis for `Bands`: all of one size, the last two may overlap.

    Attributes:
        queries: first query of each tile.
        num_queries: queries of a tile.
        keys: first key of each tile.
        num_keys: keys of a tile.
        offsets: (kinds, Q_x, K_x) as of `AxisTiles`, of tiles that look different.
        kinds: (n,) which of those a tile looks like.
    """

    queries: tuple[int, ...]
    num_queries: int
    keys: tuple[int, ...]
    num_keys: int
    offsets: Tensor
    kinds: Tensor


@lru_cache(maxsize=128)
def columns(length: int, kernel_size: int, stride: int, is_causal: bool, tile: int) -> Columns:
    """Cut an axis into tiles of one size."""
    windows = axis_windows(length, kernel_size, 1, stride, is_causal)
    queries = [min(q, length - tile) for q in range(0, length, tile)]
    seen = [(windows.start[q : q + tile].min(), windows.end[q : q + tile].max()) for q in queries]
    num_keys = max(int(end - start) for start, end in seen)
    keys = [min(int(start), length - num_keys) for start, _ in seen]
    query = torch.tensor(queries)[:, None, None] + torch.arange(tile)[:, None]
    key = torch.tensor(keys)[:, None, None] + torch.arange(num_keys)
    is_seen = (key >= windows.start[query]) & (key < windows.end[query])
    offsets = torch.where(is_seen, key - query + (kernel_size - 1), -1)
    offsets, kinds = offsets.unique(dim=0, return_inverse=True)
    return Columns(tuple(queries), tile, tuple(keys), num_keys, offsets, kinds)


@dataclass(frozen=True, eq=False)
class Bands:
    """One class of tile rows of an undilated grid.

    Attributes:
        y: tiles along the first axis.
        x: tiles along the second, n of them.
        neighborhood: the windows.
        width: W.
        step: tile rows that are gone over at a time.
    """

    y: AxisTiles
    x: Columns
    neighborhood: Neighborhood
    width: int
    step: int

    @property
    def num_queries(self) -> int:
        """Q."""
        return self.y.num_queries * self.x.num_queries

    @property
    def num_keys(self) -> int:
        """K."""
        return self.y.num_keys * self.x.num_keys

    @property
    def num_masks(self) -> int:
        """Masks side by side, n."""
        return len(self.x.keys)

    @property
    def is_copied(self) -> bool:
        """Whether tokens are copied; those of whole rows are viewed."""
        return len(self.x.keys) > 1

    @cached_property
    def is_full(self) -> bool:
        """Whether every query sees every key."""
        return self.y.is_full and bool((self.x.offsets >= 0).all())

    @_kept_if_small
    def table_index(self) -> Tensor:
        """(kinds * Q * K,), of `table_index`."""
        y = self.y.offsets(self.neighborhood.kernel_size[0])
        return table_index(y, self.x.offsets, self.neighborhood)

    def spread(self, table: Tensor) -> Tensor:
        """Spread a (h, table + 1) table over a row of tiles: (1, n * h, Q, K)."""
        kinds = table.index_select(1, self.table_index)
        kinds = kinds.view(len(table), -1, self.num_queries * self.num_keys).transpose(0, 1)
        mask = kinds.index_select(0, self.x.kinds)
        return mask.view(1, -1, self.num_queries, self.num_keys)

    def calls(self) -> Iterator[BandCall]:
        """All tile rows, `step` at a time."""
        for first in range(0, self.y.num_tiles, self.step):
            yield BandCall(self, first, min(self.step, self.y.num_tiles - first))

    @cached_property
    def key_tokens(self) -> Tensor:
        """Places of `step` tile rows' keys: (rows * K_x * n,), from the first row of keys on."""
        place = torch.arange(self.x.num_keys)[:, None] + torch.tensor(self.x.keys)
        num_rows = (self.step - 1) * self.y.num_queries + self.y.num_keys
        return (torch.arange(num_rows)[:, None] * self.width + place.flatten()).flatten()

    @cached_property
    def query_tokens(self) -> Tensor:
        """Places of `step` tile rows' queries: (rows * Q_x * n,), from the first row on."""
        place = torch.arange(self.x.num_queries)[:, None] + torch.tensor(self.x.queries)
        row = torch.arange(self.step * self.y.num_queries)[:, None]
        return (row * self.width + place.flatten()).flatten()

    @cached_property
    def output_tokens(self) -> Tensor:
        """Where in `query_tokens` the grid's tokens are: (rows * W,)."""
        places = torch.empty(self.step * self.y.num_queries * self.width, dtype=torch.long)
        places[self.query_tokens] = torch.arange(len(self.query_tokens))
        return places


class BandCall(NamedTuple):
    """Some consecutive tile rows of a class.

    Attributes:
        bands: the class.
        first: first tile row.
        count: tile rows, m.
    """

    bands: Bands
    first: int
    count: int

    def queries(self, rows: Tensor, num_heads: int, space: Tensor) -> Tensor:
        """Take the tiles' queries of an image, (H * W, h * D): (m, n * h, Q, D)."""
        y, x = self.bands.y, self.bands.x
        extents = y.query, y.num_queries, x.num_queries
        return self._take(rows, num_heads, space, extents, self.bands.query_tokens)

    def keys(self, rows: Tensor, num_heads: int, space: Tensor) -> Tensor:
        """Take the tiles' keys of an image, (H * W, h * D): (m, n * h, K, D), overlapping."""
        y, x = self.bands.y, self.bands.x
        extents = y.key, y.num_keys, x.num_keys
        return self._take(rows, num_heads, space, extents, self.bands.key_tokens)

    def _take(
        self,
        rows: Tensor,
        num_heads: int,
        space: Tensor,
        extents: tuple[int, int, int],
        places: Tensor,
    ) -> Tensor:
        """Take tiles of (first row of the first tile, rows, columns), copied into `space`."""
        first, num_rows, num_columns = extents
        step, num_tiles, channels = self.bands.y.num_queries, len(self.bands.x.keys), rows.shape[1]
        tokens = rows[(first + self.first * step) * self.bands.width :]
        if self.bands.is_copied:
            num_tokens = ((self.count - 1) * step + num_rows) * num_columns * num_tiles
            copies = space[: num_tokens * channels].view(num_tokens, channels)
            torch.index_select(tokens, 0, places[:num_tokens], out=copies)
            tokens = copies.view(-1, num_tiles * channels)
        stride, head_dim = tokens.stride(0), channels // num_heads
        return tokens.as_strided(
            (self.count, num_tiles * num_heads, num_rows * num_columns, head_dim),
            (step * num_columns * stride, head_dim, stride, 1),
            tokens.storage_offset(),
        )

    def put(self, tile: Tensor, rows: Tensor) -> None:
        """Put results of the tiles, (m, Q, n * h, ...), into an image, (H * W, h * ...)."""
        bands = self.bands
        first = (bands.y.query + self.first * bands.y.num_queries) * bands.width
        part = rows[first : first + self.count * bands.y.num_queries * bands.width]
        tile = tile.view(-1, rows.shape[1]).to(rows.dtype)
        if bands.is_copied:
            torch.index_select(tile, 0, bands.output_tokens[: part.shape[0]], out=part)
        else:
            part.copy_(tile)

"""Neighborhood attention on the CPU: dense attention per tile of queries, in PyTorch's operators.

The queries of a tile attend to the union of their windows, with a mask that holds the bias and
shuts out what is not in the window. Tiles are cut from the members of each dilation group, so that
a dilated map is a batch of undilated ones. Tiles whose windows lie alike, seen from the tile, are
one class: they share a mask and run as one batch. A border has its own class, the interior of a map
is one class. Where one tile covers a group (small maps, kernel_size x dilation = length) this is
plain attention in each group.

The forward pass is PyTorch's CPU flash attention per class. The backward pass recomputes the
weights of a chunk of tiles at a time from the logarithm of the softmax's denominator. The windows
of neighbouring tiles overlap: their gradients are added one by one in a fixed order. Both hold
copies of a bounded number of tiles, not of the map; both are deterministic.

Shapes: B batch, (H, W) the grid (W = 1 for 1-D), h heads, D channels of a head, n tiles, Q queries
and K keys of a tile, M extra keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import ceil, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .windows import Neighborhood, axis_windows

NAME = "cpu"

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Elements of the tiles that are copied at a time: they stay in the second-level cache.
_CHUNK = 1 << 18
# Costs of the forward pass in nanoseconds, for choosing tiles: fitted to head_dim 32 on one core
# of an AMD EPYC (AVX-512) over tiles of 2x2 to 8x8 queries. Only ratios matter.
_CLASS_COST = 30_000.0  # the calls of operators
_BLOCK_COST = 1_300.0  # up to 32 queries of one head of a tile
_SCORE_COST = 0.6  # one logit
_CHANNEL_COST = 0.045  # one channel of one logit
_COPY_COST = 0.1  # one element of a key, value, query or output
_TILE_SIZES = (2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 32, 48, 64)


class _AxisTiles(NamedTuple):
    """Tiles along one axis that look alike: queries, keys and offsets in members of the group.

    Attributes:
        group: first of `num_groups` consecutive dilation groups.
        num_groups: groups that are cut alike.
        query: first query of the first tile.
        num_tiles: consecutive tiles.
        num_queries: queries of a tile.
        key: first key of the first tile.
        num_keys: keys of a tile.
        offsets: for every query and key of a tile key minus query plus kernel_size - 1, or -1
            where the key is not in the window.
    """

    group: int
    num_groups: int
    query: int
    num_tiles: int
    num_queries: int
    key: int
    num_keys: int
    offsets: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class _Tiles:
    """One class of tiles of a two-dimensional grid.

    Attributes:
        y: tiles along the first axis.
        x: tiles along the second.
        dilation: positions between members of a group along both axes.
        table_index: (Q * K,) place in the flattened table, one past its end where the key is not
            in the window.
        is_full: whether every query sees every key.
    """

    y: _AxisTiles
    x: _AxisTiles
    dilation: tuple[int, int]
    table_index: Tensor
    is_full: bool

    @property
    def num_queries(self) -> int:
        return self.y.num_queries * self.x.num_queries

    @property
    def num_keys(self) -> int:
        return self.y.num_keys * self.x.num_keys

    def chunks(self, batch: int, tile_elements: int) -> Iterator[_Chunk]:
        """All tiles of a batch, some at a time; `tile_elements` is the size of one tile."""
        counts = (batch, self.y.num_groups, self.y.num_tiles, self.x.num_groups, self.x.num_tiles)
        for starts, sizes in _blocks(counts, max(1, _CHUNK // tile_elements)):
            yield _Chunk(self, starts, sizes)


class _Chunk(NamedTuple):
    """Some tiles of a class: a box in (image, group, tile, group, tile).

    Attributes:
        tiles: the class.
        starts: first of the box.
        sizes: extent of the box; their product is n.
    """

    tiles: _Tiles
    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    def view(
        self,
        tensor: Tensor,
        *,
        is_key: bool = False,
        is_head_first: bool = False,
        part: tuple[slice, slice] = (slice(None), slice(None)),
    ) -> Tensor:
        """View the tiles in a tensor of the whole map, without copies; they may overlap.

        Args:
            tensor: (B, H, W, h, D).
            is_key: whether the tiles' keys are meant, not their queries.
            is_head_first: whether heads come before the tile's positions.
            part: range of the tile's positions along each axis.

        Returns:
            (*sizes, Q_y, Q_x, h, D) or (*sizes, h, Q_y, Q_x, D), or K in place of Q.
        """
        batch_stride, *axis_strides, head_stride, channel_stride = tensor.stride()
        offset = tensor.storage_offset() + self.starts[0] * batch_stride
        sizes, strides = list(self.sizes), [batch_stride]
        inner_sizes, inner_strides = [], []
        for axis, tiles in enumerate((self.tiles.y, self.tiles.x)):
            stride = axis_strides[axis]
            member = stride * self.tiles.dilation[axis]
            first = tiles.key if is_key else tiles.query
            begin, end, _ = part[axis].indices(tiles.num_keys if is_key else tiles.num_queries)
            strides += [stride, member * tiles.num_queries]
            offset += (tiles.group + self.starts[1 + 2 * axis]) * stride
            offset += (first + self.starts[2 + 2 * axis] * tiles.num_queries + begin) * member
            inner_sizes.append(end - begin)
            inner_strides.append(member)
        head, channels = tensor.shape[3:]
        if is_head_first:
            sizes += [head, *inner_sizes, channels]
            strides += [head_stride, *inner_strides, channel_stride]
        else:
            sizes += [*inner_sizes, head, channels]
            strides += [*inner_strides, head_stride, channel_stride]
        return tensor.as_strided(sizes, strides, offset)

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
        step_y, step_x = (
            axis.num_keys if count == 1 else axis.num_queries
            for axis, count in ((self.tiles.y, self.sizes[2]), (self.tiles.x, self.sizes[4]))
        )
        for y in range(0, self.tiles.y.num_keys, step_y):
            for x in range(0, self.tiles.x.num_keys, step_x):
                part = slice(y, y + step_y), slice(x, x + step_x)
                view = self.view(total, is_key=True, is_head_first=True, part=part)
                view.add_(by_tile[..., part[0], part[1], :])
        if extra_total is not None:
            more = tile[:, num_keys:].view(
                self.sizes[0], -1, total.shape[3], tile.shape[1] - num_keys, tile.shape[2]
            )
            extra_total[self.starts[0] : self.starts[0] + self.sizes[0]] += more.sum(1).transpose(
                1, 2
            )


@lru_cache(maxsize=1024)
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


def _cut(size: int, kernel_size: int, stride: int, tile: int) -> tuple[int, ...] | None:
    """Where tiles start in a group of `size` members; None where none would lie inside.

    The first and last tile take what is left, at least the queries that share the window at the
    border: a tile there has fewer keys than one inside.
    """
    num_inside = (size - kernel_size - 1) // tile
    if tile % stride or num_inside < 1:
        return None
    first = ceil((size - num_inside * tile) / 2 / stride) * stride
    starts = (0, *range(first, first + num_inside * tile + 1, tile))
    return tuple(start for start in starts if start < size)


@lru_cache(maxsize=1024)
def _axis_tiles(
    size: int, kernel_size: int, stride: int, is_causal: bool, starts: tuple[int, ...]
) -> tuple[_AxisTiles, ...]:
    """Cut one group of `size` members into tiles; consecutive ones that look alike are one."""
    windows = axis_windows(size, kernel_size, 1, stride, is_causal)
    start, end = windows.start.tolist(), windows.end.tolist()
    classes: list[_AxisTiles] = []
    for query, stop in zip(starts, (*starts[1:], size), strict=True):
        key, last = min(start[query:stop]), max(end[query:stop])
        offsets = tuple(
            tuple(
                k - q + kernel_size - 1 if start[q] <= k < end[q] else -1 for k in range(key, last)
            )
            for q in range(query, stop)
        )
        if classes and classes[-1].offsets == offsets:
            classes[-1] = classes[-1]._replace(num_tiles=classes[-1].num_tiles + 1)
        else:
            classes.append(_AxisTiles(0, 1, query, 1, stop - query, key, last - key, offsets))
    return tuple(classes)


def _axis_choices(
    length: int, kernel_size: int, dilation: int, stride: int, is_causal: bool
) -> list[tuple[_AxisTiles, ...]]:
    """All ways to cut an axis that are considered, the first one a tile per group."""
    num_larger = length % dilation
    groups = [
        (0, num_larger, -(-length // dilation)),
        (num_larger, dilation - num_larger, length // dilation),
    ]
    choices = {}
    for tile in (length, *_TILE_SIZES):
        cuts = {size: _cut(size, kernel_size, stride, tile) for _, count, size in groups if count}
        if tile < length and not any(cuts.values()):
            continue
        choices[tuple(cuts.values())] = tuple(
            tiles._replace(group=first, num_groups=count)
            for first, count, size in groups
            if count
            for tiles in _axis_tiles(size, kernel_size, stride, is_causal, cuts[size] or (0,))
        )
    return list(choices.values())


def _cost(
    y: tuple[_AxisTiles, ...], x: tuple[_AxisTiles, ...], num_heads: int, head_dim: int
) -> float:
    """Estimated time of a pair of cuts, nanoseconds; heads are those of the whole batch."""
    cost = 0.0
    for a, b in product(y, x):
        queries, keys = a.num_queries * b.num_queries, a.num_keys * b.num_keys
        tiles = a.num_groups * a.num_tiles * b.num_groups * b.num_tiles * num_heads
        tile = _BLOCK_COST * ceil(queries / 32)
        tile += queries * keys * (_SCORE_COST + _CHANNEL_COST * head_dim)
        tile += (queries + keys) * 2 * head_dim * _COPY_COST
        cost += _CLASS_COST + tiles * tile
    return cost


@lru_cache(maxsize=256)
def _plan(
    grid: tuple[int, int], neighborhood: Neighborhood, num_heads: int, head_dim: int
) -> tuple[_Tiles, ...]:
    """Cut a grid into tiles, at the least estimated cost; heads are those of the whole batch."""
    choices = [
        _axis_choices(*axis)
        for axis in zip(
            grid,
            neighborhood.kernel_size,
            neighborhood.dilation,
            neighborhood.stride,
            neighborhood.is_causal,
            strict=True,
        )
    ]
    best = min(product(*choices), key=lambda pair: _cost(*pair, num_heads, head_dim))
    return tuple(_tiles(y, x, neighborhood) for y, x in product(*best))


def _tiles(y: _AxisTiles, x: _AxisTiles, neighborhood: Neighborhood) -> _Tiles:
    sides = [2 * k - 1 for k in neighborhood.kernel_size]
    offset_y = torch.tensor(y.offsets)[:, None, :, None]
    offset_x = torch.tensor(x.offsets)[None, :, None, :]
    is_seen = (offset_y >= 0) & (offset_x >= 0)
    index = torch.where(is_seen, offset_y * sides[1] + offset_x, prod(sides)).flatten()
    return _Tiles(y, x, neighborhood.dilation, index, bool(is_seen.all()))


class _KnownMasks(NamedTuple):
    """Masks made from a table, and what they hold for."""

    table: Tensor
    plan: tuple[_Tiles, ...]
    dtype: torch.dtype
    num_extra: int
    masks: list[Tensor]


# The latest masks of every table alive. Values are compared, not versions: those of inference
# tensors are not counted, nor are changes through `.data`.
_known_masks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _masks(
    plan: tuple[_Tiles, ...], bias: Tensor | None, dtype: torch.dtype, num_extra: int
) -> list[Tensor | None]:
    """What is added to the logits of every class, (1, h or 1, Q, K + M), None where nothing is."""
    if bias is None:
        zero = torch.zeros(1, 1, dtype=dtype)
        return [
            None if t.is_full else _mask(t, zero.expand(1, int(t.table_index.max())), num_extra)
            for t in plan
        ]
    known = _known_masks.get(bias)
    if (
        known is not None
        and known.plan is plan
        and (known.dtype, known.num_extra) == (dtype, num_extra)
        and torch.equal(known.table, bias)
    ):
        return known.masks
    table = bias.detach().flatten(1).to(dtype)
    masks = [_mask(tiles, table, num_extra) for tiles in plan]
    _known_masks[bias] = _KnownMasks(bias.detach().clone(), plan, dtype, num_extra, masks)
    return masks


def _mask(tiles: _Tiles, table: Tensor, num_extra: int) -> Tensor:
    """Spread a (h or 1, offsets) table over a tile, -inf where a key is not in the window."""
    extended = torch.cat([table, table.new_full((table.shape[0], 1), float("-inf"))], dim=1)
    mask = extended.index_select(1, tiles.table_index)
    mask = mask.view(1, table.shape[0], tiles.num_queries, tiles.num_keys)
    return torch.nn.functional.pad(mask, (0, num_extra)) if num_extra else mask


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    neighborhood: Neighborhood,
) -> str | None:
    """Say why this path cannot take a call; None when it can."""
    if query.device.type != "cpu":
        return f"it runs on CPU tensors, these are on {query.device}"
    if query.dtype not in _DTYPES:
        return f"it has no {query.dtype}"
    if neighborhood.num_axes > 2:
        return "it has 1-D and 2-D grids alone"
    return None


def _as_2d(neighborhood: Neighborhood, *tensors: Tensor | None) -> list[Any]:
    """A 1-D call as a 2-D one whose second axis has length 1."""
    if neighborhood.num_axes == 2:
        return [neighborhood, *tensors]
    flat = Neighborhood(
        (*neighborhood.kernel_size, 1),
        (*neighborhood.dilation, 1),
        (*neighborhood.stride, 1),
        (*neighborhood.is_causal, False),
    )
    return [flat, *(None if t is None else t.unsqueeze(2) for t in tensors)]


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    neighborhood: Neighborhood,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute the output and the log-sum-exp.

    Args:
        query: (B, *grid, h, D), one or two axes, any strides.
        key: like query.
        value: like query.
        bias: (h, 2 K_1 - 1, ...) or None.
        extra_key: (B, M, h, D) or None.
        extra_value: (B, M, h, D) or None.
        neighborhood: the windows.
        scale: factor of the logits.

    Returns:
        (B, *grid, h, D) and (B, *grid, h), the latter in float32, or in float64 for float64.
    """
    shape = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    neighborhood, query, key, value = _as_2d(neighborhood, query, key, value)
    batch, height, width, heads, head_dim = query.shape
    plan = _plan((height, width), neighborhood, max(batch, 1) * heads, head_dim)
    num_extra = 0 if extra_key is None else extra_key.shape[1]
    out = torch.empty(query.shape, dtype=query.dtype)
    lse = torch.empty(*query.shape[:4], 1, dtype=dtype)
    for tiles, mask in zip(plan, _masks(plan, bias, dtype, num_extra), strict=True):
        for chunk in tiles.chunks(batch, 2 * heads * head_dim * (tiles.num_keys + num_extra)):
            tile_out, tile_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                chunk.queries(query, dtype),
                chunk.keys(key, extra_key, dtype),
                chunk.keys(value, extra_value, dtype),
                attn_mask=mask,
                scale=scale,
            )
            out_view = chunk.view(out)
            out_view.copy_(tile_out.transpose(1, 2).view(out_view.shape))
            lse_view = chunk.view(lse)
            lse_view.copy_(tile_lse.transpose(1, 2).reshape(lse_view.shape))
    return out.view(shape), lse.view(shape[:-1])


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    out: Tensor,
    lse: Tensor,
    neighborhood: Neighborhood,
    scale: float,
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of query, key, value, bias, extra_key and extra_value.

    Args:
        grad_out: like query, cotangent of the output.
        grad_lse: (B, *grid, h), cotangent of the log-sum-exp, or None.
        query: what `forward` was given, as the arguments that follow.
        key: as above.
        value: as above.
        bias: as above.
        extra_key: as above.
        extra_value: as above.
        out: what `forward` returned.
        lse: what `forward` returned.
        neighborhood: the windows.
        scale: factor of the logits.

    Returns:
        Gradients in the dtypes of their inputs; None for what was None.
    """
    shape = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    delta = (grad_out.to(dtype) * out).sum(-1)
    if grad_lse is not None:
        delta -= grad_lse
    neighborhood, query, key, value, grad_out, delta, lse = _as_2d(
        neighborhood, query, key, value, grad_out, delta.unsqueeze(-1), lse.unsqueeze(-1)
    )
    batch, height, width, heads, head_dim = query.shape
    plan = _plan((height, width), neighborhood, max(batch, 1) * heads, head_dim)
    num_extra = 0 if extra_key is None else extra_key.shape[1]
    grad_query = torch.empty(query.shape, dtype=query.dtype)
    grad_key, grad_value = (torch.zeros(query.shape, dtype=dtype) for _ in range(2))
    grad_extra_key = grad_extra_value = None
    if extra_key is not None:
        grad_extra_key, grad_extra_value = (
            torch.zeros(extra_key.shape, dtype=dtype) for _ in range(2)
        )
    grad_table = None if bias is None else lse.new_zeros(heads, bias[0].numel() + 1)
    for tiles, mask in zip(plan, _masks(plan, bias, dtype, num_extra), strict=True):
        num_keys = tiles.num_keys + num_extra
        grad_mask = None if bias is None else lse.new_zeros(heads, tiles.num_queries, num_keys)
        elements = heads * max(2 * head_dim * num_keys, tiles.num_queries * num_keys)
        for chunk in tiles.chunks(batch, elements):
            q = chunk.flat_queries(query, dtype) * scale
            k, v = (
                chunk.flat_keys(key, extra_key, dtype),
                chunk.flat_keys(value, extra_value, dtype),
            )
            do = chunk.flat_queries(grad_out, dtype)
            weights = torch.bmm(q, k.transpose(1, 2))
            by_head = weights.view(-1, heads, tiles.num_queries, num_keys)
            if mask is not None:
                by_head.add_(mask)
            weights.sub_(chunk.flat_queries(lse, dtype)).exp_()
            chunk.add_keys(grad_value, grad_extra_value, torch.bmm(weights.transpose(1, 2), do))
            grad_logits = torch.bmm(do, v.transpose(1, 2))
            grad_logits.sub_(chunk.flat_queries(delta, dtype)).mul_(weights)
            if grad_mask is not None:
                grad_mask += grad_logits.view(by_head.shape).sum(0)
            chunk.add_keys(grad_key, grad_extra_key, torch.bmm(grad_logits.transpose(1, 2), q))
            view = chunk.view(grad_query, is_head_first=True)
            view.copy_(torch.bmm(grad_logits, k).mul_(scale).view(view.shape))
        if grad_mask is not None:
            grad_table.scatter_add_(
                1,
                tiles.table_index.expand(heads, -1),
                grad_mask[..., : tiles.num_keys].flatten(1),
            )
    return (
        grad_query.view(shape),
        grad_key.to(key.dtype).view(shape),
        grad_value.to(value.dtype).view(shape),
        None if bias is None else grad_table[:, :-1].to(bias.dtype).reshape(bias.shape),
        None if extra_key is None else grad_extra_key.to(extra_key.dtype),
        None if extra_value is None else grad_extra_value.to(extra_value.dtype),
    )

"""How a map is cut into regions, which every path shares.

Regions are equal rectangles of tokens, numbered row by row from the top left. They cover the map
and may reach beyond it at the bottom and at the right: tokens there are padded ones, and a region
may have no others. Sizes may be symbolic, and tensors in torch.jit.trace; tables are flat, as an
axis that may have length 1 is one for which a compiler makes graphs of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import runtime


@dataclass(frozen=True)
class Regions:
    """A grid of regions.

    Attributes:
        rows: regions from top to bottom.
        columns: regions from left to right.
        height: tokens of a region from top to bottom.
        width: tokens of a region from left to right.
    """

    rows: int
    columns: int
    height: int
    width: int

    @property
    def count(self) -> int:
        """Number of regions."""
        return self.rows * self.columns

    @property
    def area(self) -> int:
        """Tokens of a region, padded ones included."""
        return self.height * self.width

    @property
    def padded_grid(self) -> tuple[int, int]:
        """Height and width of all regions together, tokens."""
        return self.rows * self.height, self.columns * self.width

    def places(self, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Give row and column of every token in order of regions: two of (count * area,), int64."""
        region, token = _divmod(torch.arange(self.count * self.area, device=device), self.area)
        region_row, region_column = _divmod(region, self.columns)
        row, column = _divmod(token, self.width)
        return region_row * self.height + row, region_column * self.width + column

    def numbers(self, grid: Sequence[int], device: torch.device | None = None) -> Tensor:
        """Number the tokens of a map in order of regions: (height * width,), int64, from 0."""
        row, column = _divmod(torch.arange(grid[0] * grid[1], device=device), grid[1])
        region_row, row = _divmod(row, self.height)
        region_column, column = _divmod(column, self.width)
        region = region_row * self.columns + region_column
        return region * self.area + row * self.width + column

    def num_real(self, grid: Sequence[int], device: torch.device | None = None) -> Tensor:
        """Count the tokens of each region that are on a map of (height, width): (count,) int64."""
        row, column = _divmod(torch.arange(self.count, device=device), self.columns)
        rows = (grid[0] - row * self.height).clamp(0).clamp_max(self.height)
        return rows * (grid[1] - column * self.width).clamp(0).clamp_max(self.width)

    def num_padded(self, grid: Sequence[int], device: torch.device | None = None) -> Tensor:
        """Count the tokens of each region that are not on the map: (count,) int64."""
        return self.area - self.num_real(grid, device)


def _divmod(numbers: Tensor, by: int) -> tuple[Tensor, Tensor]:
    """Quotient and remainder; ONNX has no remainder by a symbol."""
    quotient = torch.div(numbers, by, rounding_mode="floor")
    return quotient, numbers - quotient * by


def cut(
    grid: Sequence[int],
    num_regions: tuple[int, int],
    region_size: tuple[int, int] | None = None,
) -> Regions:
    """Cut a map into regions.

    Args:
        grid: height and width of the map, tokens.
        num_regions: regions along each axis; more where these do not cover it.
        region_size: tokens of a region along each axis; by default the fewest with which
            `num_regions` regions cover it.
    """
    if region_size is None:
        # A quotient rounded up; that many regions always cover the axis.
        height, width = (
            (length + count - 1) // count for length, count in zip(grid, num_regions, strict=True)
        )
        return Regions(*num_regions, height, width)
    rows, columns = (
        maximum(count, (length + size - 1) // size)
        for length, count, size in zip(grid, num_regions, region_size, strict=True)
    )
    return Regions(rows, columns, *region_size)


def maximum(a: int, b: int) -> int:
    """Give the larger of two sizes without deciding now, where they are symbols or traced."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return torch.maximum(torch.as_tensor(a), torch.as_tensor(b))
    is_symbol = isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt)
    # Dynamo takes max for sym_max, and fails at the latter (torch 2.6) where it is constant.
    if is_symbol and not torch.compiler.is_dynamo_compiling():
        return torch.sym_max(a, b)
    return max(a, b)


def are_known(*sizes: int) -> bool:
    """Whether sizes are plain numbers, not symbols of a graph that serves all sizes."""
    return not torch.compiler.is_compiling() and all(isinstance(size, int) for size in sizes)


def grid_of(tokens: Tensor) -> tuple[int, int]:
    """Height and width of a map (B, H, W, ...): numbers also in a trace that tools read."""
    return plain_sizes(tokens.shape[1:3])


def plain_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    """Sizes as they are, but for the trace of one size that tools read: there plain numbers."""
    is_read = torch.jit.is_tracing() and not runtime.is_taken_apart()
    return tuple(int(size) if is_read else size for size in sizes)

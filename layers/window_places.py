"""Where positions of a map are among its windows, and back: for pictures of attention.

Legend: H and W height and width of the map, P points of it, N tokens of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .attention_maps import AttentionMaps, Point
from .windows import partition


class WindowPlaces(NamedTuple):
    """Where points of a map are among the windows of `partition`, and what is beside them there.

    Attributes:
        windows: (P,), the window of each point.
        tokens: (P,), the point among the window's tokens.
        places: (P, N), where each token of that window is on the map, row by row; -1 for padding.
        size: H and W.
    """

    windows: torch.Tensor
    tokens: torch.Tensor
    places: torch.Tensor
    size: tuple[int, int]

    @classmethod
    def find(
        cls,
        points: Sequence[Point],
        size: tuple[int, int],
        window_size: tuple[int, int],
        *,
        is_grid: bool = False,
        device: torch.device | None = None,
    ) -> WindowPlaces:
        """Find points in the windows of a map that is padded at the bottom and right.

        Args:
            points: rows and columns of the points.
            size: H and W.
            window_size: rows and columns of tokens in a window.
            is_grid: as in `partition`.
            device: where the result is to be.
        """
        height, width = size
        numbers = torch.arange(1, height * width + 1, device=device).view(1, height, width, 1)
        places = partition(numbers, window_size, is_grid=is_grid)
        places = places[..., 0] - 1  # (windows, N)
        found = [(places == row * width + column).nonzero()[0] for row, column in points]
        windows, tokens = torch.stack(found).unbind(1)
        return cls(windows, tokens, places[windows], size)

    def maps(self, weights: torch.Tensor) -> AttentionMaps:
        """Put the weights of the points' windows on the map: (P, N or more, heads).

        What comes before the N tokens of a window has no place on the map.
        """
        num_tokens = self.places.shape[1]
        weights = weights.transpose(1, 2)  # (P, heads, N or more)
        others, tokens = weights[..., :-num_tokens], weights[..., -num_tokens:]
        on_map = weights.new_zeros(*weights.shape[:2], 1 + self.size[0] * self.size[1])
        places = (self.places + 1)[:, None].expand_as(tokens)
        on_map.scatter_add_(2, places, tokens)  # all of padding to the first
        elsewhere = others.sum(-1) + on_map[..., 0]
        return AttentionMaps(on_map[..., 1:].unflatten(-1, self.size), elsewhere)

"""How weights begin."""

from __future__ import annotations

import timm.layers
import torch


def trunc_normal_(tensor: torch.Tensor, std: float = 0.02) -> None:
    """Fill a tensor with normal numbers of deviation `std` within (-2, 2), as timm does, in place.

    A tensor on the meta device is left alone: it has no numbers, and what would draw them takes
    most of the time in which a model is built there.
    """
    if not tensor.is_meta:
        timm.layers.trunc_normal_(tensor, std=std)

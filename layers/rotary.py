"""Rotary position embedding of maps by one coordinate: the index of a token, row by row.

Su et al., RoFormer, arXiv:2104.09864, on the raster index i * W + j of token (i, j), as in RMT
(Fan et al., arXiv:2309.11523). A phase is of the map's width too: at another width all change.

Legend: B batch, H and W height and width of the map.
"""

from __future__ import annotations

import functools

import torch

from .tracing import Length, is_eager, is_plain_inference

# Values of a result above which it is not kept, 4 MiB of float32.
_MOST_KEPT_VALUES = 2**20

# What published models turn by: float32 numbers between which and exact ones the difference shows
# in float64, and which torch.linspace gives on most processors alone. By channels of a head.
_PUBLISHED_SPEEDS = {
    16: (
        1.0, 0.268269569, 0.0719685555, 0.0193069726, 0.00517947599, 0.00138949521,
        0.000372759328, 9.99999975e-05,
    ),
    32: (
        1.0, 0.541169524, 0.292864442, 0.158489287, 0.0857695788, 0.046415884, 0.0251188558,
        0.0135935601, 0.00735642528, 0.00398107292, 0.0021544355, 0.00116591423, 0.000630957307,
        0.00034145487, 0.000184784978, 9.99999975e-05,
    ),
}  # fmt: skip


def rotation_speeds(head_dim: int) -> tuple[float, ...]:
    """Give the angles by which pairs of channels turn from a token to the next, radians.

    10000 ** (-m / (head_dim / 2 - 1)) for pair m = 0 .. head_dim / 2 - 1, both ends included.

    Args:
        head_dim: channels of a head.

    Raises:
        ValueError: it is odd.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}: an even number is taken, channels turn in pairs")
    if head_dim in _PUBLISHED_SPEEDS:
        return _PUBLISHED_SPEEDS[head_dim]
    last = max(head_dim // 2 - 1, 1)
    return tuple(10000 ** (-m / last) for m in range(head_dim // 2))


def raster_rotation(
    height: Length, width: Length, num_heads: int, head_dim: int, *, like: torch.Tensor
) -> torch.Tensor:
    """Give how far the channels of each token of a map are turned, the same for all heads.

    Args:
        height: H.
        width: W.
        num_heads: heads.
        head_dim: channels of a head, even.
        like: a tensor of the device wanted; the result is of its dtype, in float32 at least.

    Returns:
        (H, W, heads, head_dim / 2, 2), contiguous: the cosine and the sine for each pair of
        channels. Not to be written to.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    shape = height, width, num_heads, head_dim
    if is_plain_inference() and height * width * num_heads * head_dim <= _MOST_KEPT_VALUES:
        return _kept_rotation(*shape, dtype, like.device)
    return _rotation(*shape, dtype, like.device)


def _rotation(
    height: Length,
    width: Length,
    num_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    speeds = torch.tensor(rotation_speeds(head_dim), dtype=torch.float32, device=device)
    rows, columns = (torch.arange(n, dtype=dtype, device=device) for n in (height, width))
    index = rows[:, None] * width + columns
    angles = index[..., None, None] * speeds.to(dtype)
    rotation = torch.stack((angles.cos(), angles.sin()), dim=-1)
    return rotation.expand(-1, -1, num_heads, -1, -1).contiguous()


_kept_rotation = functools.lru_cache(maxsize=8)(_rotation)


def rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Turn the channels of each token's heads in pairs, the even one towards the odd one.

    Args:
        x: (B, H, W, heads, head_dim), contiguous.
        rotation: (H, W, heads, head_dim / 2, 2), as of `raster_rotation`.

    Returns:
        As `x`; computed in the dtype of `rotation`.
    """
    pairs = x.to(rotation.dtype).unflatten(-1, (-1, 2))
    if is_eager():  # compilers and exporters know little of complex numbers
        turned = torch.view_as_complex(pairs) * torch.view_as_complex(rotation)
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)
    first, second = pairs.unbind(-1)
    cosine, sine = rotation.unbind(-1)
    turned = first * cosine - second * sine, second * cosine + first * sine
    return torch.stack(turned, dim=-1).flatten(-2).to(x.dtype)

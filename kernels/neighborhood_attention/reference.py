"""Neighborhood attention in plain PyTorch: the definition that every other path is held to.

It gathers the keys of every window, which takes prod(kernel_size) times the memory of the keys;
any device and dtype, 1-D to 3-D grids. Derivatives are PyTorch's own, forward-mode and higher
ones included.

Shapes: B batch, L_1..L_n the grid, N its positions, h heads, D channels of a head, P keys of a
window, M extra keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .windows import Neighborhood, axis_windows


def neighborhood_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    neighborhood: Neighborhood,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute softmax(scale * q k^T + bias) v over the window of every query.

    Products are made in the inputs' dtype; logits are softmaxed in at least float32.

    Args:
        query: (B, *grid, heads, head_dim); any strides, as all inputs.
        key: like query.
        value: like query.
        bias: (heads, 2 K_1 - 1, ...), added to the logits by the offset of key minus query.
        extra_key: (B, M, heads, head_dim), seen by every query, without bias.
        extra_value: like extra_key.
        neighborhood: the windows.
        scale: factor of the logits.

    Returns:
        The output (B, *grid, heads, head_dim) and the natural logarithm of the softmax's
        denominator (B, *grid, heads), the latter in float32, or in float64 for float64.
    """
    grid = query.shape[1:-2]
    keys_at, offset_at, is_seen = _neighbors(grid, neighborhood, query.device)
    q = (query * scale).flatten(1, -3).transpose(1, 2).unsqueeze(3)  # (B, h, N, 1, D)
    k = _gather(key, keys_at)  # (B, h, N, P, D)
    logits = (q @ k.transpose(-1, -2)).squeeze(3)  # (B, h, N, P)
    if bias is not None:
        logits = logits + bias.flatten(1)[:, offset_at]
    if any(neighborhood.is_causal):
        logits = logits.masked_fill(~is_seen, float("-inf"))
    if extra_key is not None:
        extra_logits = q.squeeze(3) @ extra_key.permute(0, 2, 3, 1)  # (B, h, N, M)
        logits = torch.cat([logits, extra_logits], dim=-1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    weights = logits.softmax(dim=-1).to(value.dtype)
    window_weights = weights[..., : neighborhood.window_area].unsqueeze(3)
    out = (window_weights @ _gather(value, keys_at)).squeeze(3)  # (B, h, N, D)
    if extra_value is not None:
        out = out + weights[..., neighborhood.window_area :] @ extra_value.transpose(1, 2)
    lse = logits.logsumexp(dim=-1).transpose(1, 2)
    return (
        out.transpose(1, 2).unflatten(1, grid).contiguous(),
        lse.unflatten(1, grid).contiguous(),
    )


def _gather(tokens: Tensor, keys_at: Tensor) -> Tensor:
    """Take the tokens of every window: (B, *grid, h, D) and (N, P) to (B, h, N, P, D)."""
    return tokens.flatten(1, -3).transpose(1, 2)[:, :, keys_at]


def _neighbors(
    grid: tuple[int, ...], neighborhood: Neighborhood, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Tabulate the windows, row-major: for each of N queries and P keys of its window,

    the key's place in the flattened grid, the place of their offset in the flattened bias table
    and whether the query may see the key; each (N, P).
    """
    num_axes = neighborhood.num_axes
    keys_at = offset_at = torch.zeros((), dtype=torch.long, device=device)
    is_seen = torch.ones((), dtype=torch.bool, device=device)
    for axis, length in enumerate(grid):
        kernel_size, dilation = neighborhood.kernel_size[axis], neighborhood.dilation[axis]
        windows = axis_windows(
            length,
            kernel_size,
            dilation,
            neighborhood.stride[axis],
            neighborhood.is_causal[axis],
            device=device,
        )
        shape = [1] * (2 * num_axes)  # queries along each axis, then keys along each axis
        shape[axis], shape[num_axes + axis] = -1, kernel_size
        member = windows.start[:, None] + torch.arange(kernel_size, device=device)  # (L, K)
        position = windows.group[:, None] + dilation * member
        offset = member - windows.index[:, None] + (kernel_size - 1)
        keys_at = keys_at * length + position.reshape(shape)
        offset_at = offset_at * (2 * kernel_size - 1) + offset.reshape(shape)
        is_seen = is_seen & (member < windows.end[:, None]).reshape(shape)
    area = neighborhood.window_area
    return keys_at.reshape(-1, area), offset_at.reshape(-1, area), is_seen.reshape(-1, area)

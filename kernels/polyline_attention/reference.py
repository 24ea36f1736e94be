"""Polyline attention in plain PyTorch: the definition that every other path is held to.

It makes the masks, for the full form two of N x N entries a head; any device and dtype.
Derivatives are PyTorch's own, forward-mode and higher ones included.

Shapes: B batch, (H, W) the map, N = HW its tokens, h heads, D channels of a head. Indices: (i, j)
the query's row and column, (k, l) the key's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .decays import Polyline, line_masks, prefix_sums, sum_dtype


def polyline_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_alpha: Tensor,
    log_beta: Tensor,
    geometry: Polyline,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute polyline attention.

    Products are made in the inputs' dtype; prefix sums, logits and softmaxes are in at least
    float32.

    Args:
        query: (B, H, W, heads, head_dim); any strides, as all inputs.
        key: like query.
        value: (B, H, W, heads, value_dim).
        log_alpha: (B, H, W, heads), log decays of steps along rows.
        log_beta: like log_alpha, of steps along columns.
        geometry: form and paths.
        scale: factor of the logits.

    Returns:
        The output (B, H, W, heads, value_dim) and the natural logarithms of the softmaxes'
        denominators (B, H, W, heads, softmaxes): of the row-first and the column-first path in the
        full form, of the row and the column in the axial one; the latter in float32, or in float64
        for float64.
    """
    attend = _attend_fully if geometry.form == "full" else _attend_along_axes
    sums = prefix_sums(log_alpha, log_beta, sum_dtype(query))
    return attend(query * scale, key, value, *sums, geometry.paths)


def _attend_fully(
    query: Tensor, key: Tensor, value: Tensor, along_rows: Tensor, along_columns: Tensor, paths: str
) -> tuple[Tensor, Tensor]:
    height, width = query.shape[1:3]
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (query, key, value))  # (B, h, N, D)
    mask = row_first_mask(along_rows, along_columns)
    logits = (q @ k.transpose(2, 3)).to(mask.dtype)
    masked = [logits + mask]
    if paths == "both":
        masked.append(logits + mask.transpose(2, 3))
    weights = sum(path.softmax(dim=-1) for path in masked) / len(masked)
    lse = torch.stack([path.logsumexp(dim=-1) for path in masked], dim=-1)
    out = weights.to(value.dtype) @ v
    return tuple(x.transpose(1, 2).unflatten(1, (height, width)).contiguous() for x in (out, lse))


def row_first_mask(along_rows: Tensor, along_columns: Tensor) -> Tensor:
    """Give the log mask of the row-first path; its transpose is that of the column-first one.

    Args:
        along_rows: (B, H, W, h), prefix sums of decays along rows.
        along_columns: like along_rows, along columns.

    Returns:
        (B, h, N, N), queries before keys.
    """
    row = line_masks(along_rows.permute(0, 3, 1, 2))  # (B, h, H, W, W): line, token, token
    column = line_masks(along_columns.permute(0, 3, 2, 1))  # (B, h, W, H, H)
    # (B, h, i, j, k, l): along row i from j to l, then along column l from i to k.
    mask = row.unsqueeze(4) + column.permute(0, 1, 3, 4, 2).unsqueeze(3)
    return mask.flatten(4, 5).flatten(2, 3)


def _attend_along_axes(
    query: Tensor, key: Tensor, value: Tensor, along_rows: Tensor, along_columns: Tensor, paths: str
) -> tuple[Tensor, Tensor]:
    # Lines of tokens: rows (B, H, h, W, D), columns (B, h, W, H, D).
    row, row_lse = _weights(*(x.transpose(2, 3) for x in (query, key, along_rows)))
    column, column_lse = _weights(*(_columns(x) for x in (query, key, along_columns)))
    row, column = row.to(value.dtype), column.to(value.dtype)

    def down(tokens: Tensor) -> Tensor:
        return _columns(column @ _columns(tokens))

    def across(tokens: Tensor) -> Tensor:
        return (row @ tokens.transpose(2, 3)).transpose(2, 3)

    out = down(across(value))
    if paths == "both":
        out = (out + across(down(value))) / 2
    lse = torch.stack((row_lse.transpose(2, 3), _columns(column_lse)), dim=-1)
    return out.contiguous(), lse.contiguous()


def _columns(tokens: Tensor) -> Tensor:
    """(B, H, W, h, ...) to lines of tokens (B, h, W, H, ...), and these back."""
    return tokens.transpose(1, 3)


def _weights(query: Tensor, key: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Give the softmaxes of lines, (.., L, L), and the logarithms of their denominators."""
    logits = query @ key.transpose(-1, -2) + line_masks(sums)
    return logits.softmax(dim=-1), logits.logsumexp(dim=-1)

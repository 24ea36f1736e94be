"""Decays along lines: their prefix sums, the masks that these are, and gradients back to decays.

The log mask of tokens i and j of a line is the sum of the log decays of the tokens between them,
the one with the lower index left out: with P_t = a_1 + .. + a_t it is P_max(i, j) - P_min(i, j).
The first decay of a line takes no part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

FORMS = ("full", "axial")
PATHS = ("both", "row_first")

# Axes of a map (B, H, W, heads) along which decays are summed.
ROW, COLUMN = 2, 1


@dataclass(frozen=True)
class Polyline:
    """What describes a call beside tensors.

    Attributes:
        form: "full", one softmax a path over all tokens, or "axial", products of softmaxes over
            rows and over columns.
        paths: "both", the mean of the path that goes along the query's row first and of the one
            that goes along its column first; "row_first", the former alone.
    """

    form: str
    paths: str

    @property
    def num_softmaxes(self) -> int:
        """Softmaxes of a query, each with an entry in lse: one a path, or of its row and column."""
        return 1 if self.form == "full" and self.paths == "row_first" else 2


def sum_dtype(query: Tensor) -> torch.dtype:
    """Give the dtype of prefix sums, masks and softmaxes: at least float32."""
    return torch.promote_types(query.dtype, torch.float32)


def prefix_sums(log_alpha: Tensor, log_beta: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Sum decays along lines: those of `log_alpha` along rows, those of `log_beta` along columns.

    Sums start at 0 with the first token of a line, whose decay is left out.

    Args:
        log_alpha: (B, H, W, heads), any strides.
        log_beta: like log_alpha.
        dtype: that of the sums.

    Returns:
        P and R, both (B, H, W, heads), contiguous.
    """
    along_rows = F.pad(log_alpha[:, :, 1:], (0, 0, 1, 0))
    along_columns = F.pad(log_beta[:, 1:], (0, 0, 0, 0, 1, 0))
    return along_rows.cumsum(ROW, dtype=dtype), along_columns.cumsum(COLUMN, dtype=dtype)


def decay_gradients(
    grad_rows: Tensor, grad_columns: Tensor, log_alpha: Tensor, log_beta: Tensor
) -> tuple[Tensor, Tensor]:
    """Give the gradients of the decays for those of their prefix sums: sums from the end of lines.

    Args:
        grad_rows: (B, H, W, heads), gradient of P.
        grad_columns: that of R.
        log_alpha: what has the dtype of the first result.
        log_beta: that of the second.
    """
    return (
        _suffix_sum(grad_rows, ROW).to(log_alpha.dtype),
        _suffix_sum(grad_columns, COLUMN).to(log_beta.dtype),
    )


def _suffix_sum(grad: Tensor, axis: int) -> Tensor:
    """Sum from each entry of an axis to the end; the first has a decay without effect."""
    total = grad.flip(axis).cumsum(axis).flip(axis)
    total.select(axis, 0).zero_()
    return total


def line_masks(sums: Tensor) -> Tensor:
    """Give the log masks of lines, (..., L) to (..., L, L), from prefix sums of their decays.

    No absolute value: where tokens tie the gradient is that of the sum of decays between them.
    """
    place = torch.arange(sums.shape[-1], device=sums.device)
    difference = sums.unsqueeze(-1) - sums.unsqueeze(-2)
    return torch.where(place[:, None] >= place, difference, -difference)

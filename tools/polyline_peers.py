"""Polyline attention as ``densezoo bench-kernels`` times it: inputs, definition and peers.

Logits are masked by the decays of the steps along a query's row and then a key's column, or along
the query's column and then the key's row (Zhao et al., arXiv 2506.15940). Where both paths are
taken, decays are learned: inputs, of which no mask can be made before the clock starts. Of one path
(Fan et al., arXiv 2309.11523) they are fixed, one for each head, and masks are there before.

Legend: as in `operator_cases`; query (i, j) and key (k, l) by row and column; a line is a row or a
column.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..kernels import polyline_attention
from ..kernels.polyline_attention.dispatch import attend_with_decays
from ..kernels.runtime import use_backend, which_backend
from .operator_cases import AttentionCase, Forward, compile_flex, to_heads_first, to_map
from .ppma_transcription import (
    DecayedAttention,
    MaskedAttention,
    mask_paths,
    mask_rows_and_columns,
)

# Decays of a step lie in this range as models are initialised.
LEAST_DECAY, MOST_DECAY = 1e-3, 1e-1
FIXED_RANGE = 6  # the most that fixed decays of heads differ by in models, in powers of 2
SAMPLED_PAIRS = 2**22  # of query and key, that the definition has in memory at a time
# By form and paths: tensors as large as the masks of all images at the peak of a forward pass, and
# of a forward and a backward one.
MASKS_PEAK = {
    ("full", "both"): (5, 6),
    ("full", "row_first"): (3, 3),
    ("axial", "both"): (3, 4),
    ("axial", "row_first"): (2, 3),
}
SDPA_PEAK = {
    ("full", "both"): (2, 5),
    ("full", "row_first"): (1, 1),
    ("axial", "both"): (2, 7),
    ("axial", "row_first"): (2, 2),
}

# Attends along lines under their log decays: of query, key and value (lines, h, L, D).
AttendLines = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class PolylineCase(AttentionCase):
    """A shape of polyline attention with its inputs, the log decays (B, H, W, h) among them."""

    def make_maps(self) -> tuple[Tensor, ...]:
        """Make log decays along rows and along columns, where they are learned."""
        if self.shape.paths != "both":
            return ()
        generator = torch.Generator().manual_seed(3)
        shape = self.batch, *self.shape.size, self.shape.num_heads
        steps = torch.rand(2, *shape, generator=generator)
        return tuple((-LEAST_DECAY * (MOST_DECAY / LEAST_DECAY) ** steps).unbind())

    @cached_property
    def fixed_decays(self) -> tuple[Tensor, ...]:
        """The log decays along rows and along columns that have no gradient, if there are."""
        if self.shape.paths == "both":
            return ()
        heads = torch.arange(self.shape.num_heads, dtype=torch.float64) / self.shape.num_heads
        decays = torch.log(1 - 2 ** (-2 - FIXED_RANGE * heads))
        dtype = torch.promote_types(self.dtype, torch.float32)
        decays = decays.to(self.device, dtype).expand(self.batch, *self.shape.size, -1)
        return decays, decays

    @property
    def num_softmaxes(self) -> int:
        return 1 if (self.shape.form, self.shape.paths) == ("full", "row_first") else 2

    def count_index_bytes(self) -> int:
        """Count the bytes of the fixed decays: one of a head."""
        return self.shape.num_heads * sum(x.itemsize for x in self.fixed_decays[:1])

    def attend_exactly(self, queries: Tensor, *inputs: Tensor) -> Tensor:
        """Attend to all keys under the masks, as they are defined, of each query's own paths."""
        query, key, value, *decays = (x[0] for x in inputs)
        log_alpha, log_beta = decays or (x[0].double() for x in self.fixed_decays)
        sums = log_alpha.cumsum(1), log_beta.cumsum(0)
        at_a_time = max(1, SAMPLED_PAIRS // (self.shape.num_tokens * self.shape.num_heads))
        return torch.cat(
            [
                checkpoint(
                    self._attend_sampled, part, query, key, value, *sums, use_reentrant=False
                )
                for part in queries.split(at_a_time)
            ]
        )

    def _attend_sampled(
        self,
        queries: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        row_sums: Tensor,
        column_sums: Tensor,
    ) -> Tensor:
        """Attend with some queries (S,): maps (H, W, h, D), sums of decays (H, W, h)."""
        i, j = queries // self.shape.size[1], queries % self.shape.size[1]
        s, scale = torch.arange(len(queries), device=queries.device), self.shape.head_dim**-0.5
        row_sums, column_sums = (x.permute(2, 0, 1)[:, None] for x in (row_sums, column_sums))
        # (h, S, k, l): along row k from column j to l, along column l from row i to k.
        rows = -(row_sums[:, 0, :, j].transpose(1, 2)[..., None] - row_sums).abs()
        columns = -(column_sums[:, 0, i][:, :, None] - column_sums).abs()
        if self.shape.form == "full":
            logits = torch.einsum("shd,klhd->hskl", scale * query[i, j], key)
            weights = [(logits + rows[:, s, i][:, :, None] + columns).flatten(2).softmax(-1)]
            if self.shape.paths == "both":
                own_column = columns.transpose(2, 3)[:, s, j]
                weights.append((logits + own_column[..., None] + rows).flatten(2).softmax(-1))
            weights = [x.unflatten(2, self.shape.size) for x in weights]
        else:
            rows = rows + torch.einsum("kshd,klhd->hskl", scale * query[:, j], key)
            columns = columns + torch.einsum("slhd,klhd->hskl", scale * query[i], key)
            rows, columns = rows.softmax(3), columns.softmax(2)
            weights = [columns.transpose(2, 3)[:, s, j][..., None] * rows]
            if self.shape.paths == "both":
                weights.append(rows[:, s, i][:, :, None] * columns)
        return torch.einsum("hskl,klhd->shd", sum(weights) / len(weights), value)


def make_ours(case: PolylineCase, is_training: bool) -> Forward:
    """Our operator on the backend of the case, without a check of the decays, as in our layer."""
    shape = case.shape

    def forward(query: Tensor, key: Tensor, value: Tensor, *decays: Tensor) -> Tensor:
        decays = decays or case.fixed_decays
        return attend_with_decays(query, key, value, *decays, form=shape.form, paths=shape.paths)

    return forward if case.backend is None else use_backend(case.backend)(forward)


def describe_ours(case: PolylineCase) -> str:
    """Name the backend that our operator takes."""
    return which_backend(
        polyline_attention,
        *case.inputs,
        *case.fixed_decays,
        form=case.shape.form,
        paths=case.shape.paths,
        backend=case.backend,
    ).backend


def count_pairs(case: PolylineCase) -> int:
    """Count the pairs of query and key, of all images and heads, that have logits."""
    shape = case.shape
    keys = shape.num_tokens if shape.form == "full" else sum(shape.size)
    return case.batch * shape.num_heads * shape.num_tokens * keys


def _check_memory(
    case: PolylineCase, peaks: dict[tuple[str, str], tuple[int, int]], is_training: bool
) -> None:
    """Decline where masks and what is as large are too much."""
    num_tensors = peaks[case.shape.form, case.shape.paths][is_training]
    itemsize = torch.promote_types(case.dtype, torch.float32).itemsize
    case.check_memory(num_tensors * itemsize * count_pairs(case), "masks of all pairs")


def make_masks(case: PolylineCase, is_training: bool) -> Forward:
    """Masks built, then softmaxes: what the official code does."""
    shape = case.shape
    _check_memory(case, MASKS_PEAK, is_training)
    scale = shape.head_dim**-0.5
    if shape.paths == "both":
        attend = DecayedAttention(shape.form, shape.paths)
        return lambda query, key, value, *decays: attend(query, scale * key, value, *decays)
    masks = mask_rows_and_columns(*(x[:1] for x in case.fixed_decays))
    masks = (mask_paths(*masks),) if shape.form == "full" else masks
    attend = MaskedAttention(shape.form, shape.paths)
    return lambda query, key, value: attend(query, scale * key, value, *masks)


def sum_lines(log_alpha: Tensor, log_beta: Tensor) -> tuple[Tensor, Tensor]:
    """Sum log decays (B, H, W, h) along rows and along columns: two of (B, h, H, W)."""
    row_sums, column_sums = log_alpha.cumsum(2), log_beta.cumsum(1)
    return row_sums.permute(0, 3, 1, 2), column_sums.permute(0, 3, 1, 2)


def measure_lines(sums: Tensor) -> Tensor:
    """Give the masks (..., L, L) of lines from the sums of their log decays (..., L)."""
    return -(sums[..., None] - sums[..., None, :]).abs()


def make_sdpa(case: PolylineCase, is_training: bool) -> Forward:
    """PyTorch's attention under masks: of all pairs for each path, or of lines in turn."""
    _check_memory(case, SDPA_PEAK, is_training)
    if case.shape.form == "axial":
        return _attend_axially(case, _attend_lines_masked)

    def make_masks(*decays: Tensor) -> list[Tensor]:
        row_sums, column_sums = sum_lines(*decays)
        rows = measure_lines(row_sums)  # (B, h, i, j, l)
        columns = measure_lines(column_sums.transpose(2, 3)).movedim(2, 4)  # (B, h, i, k, l)
        mask = rows[:, :, :, :, None] + columns[:, :, :, None]
        mask = mask.flatten(4).flatten(2, 3).to(case.dtype)
        return [mask, mask.transpose(2, 3)] if case.shape.paths == "both" else [mask]

    ready = make_masks(*(x[:1] for x in case.fixed_decays)) if case.fixed_decays else None

    def forward(query: Tensor, key: Tensor, value: Tensor, *decays: Tensor) -> Tensor:
        q, k, v = (to_heads_first(x) for x in (query, key, value))
        outs = [
            F.scaled_dot_product_attention(q, k, v, mask)
            for mask in (make_masks(*decays) if ready is None else ready)
        ]
        return to_map(sum(outs) / len(outs), case.shape.size)

    return forward


def _attend_lines_masked(query: Tensor, key: Tensor, value: Tensor, sums: Tensor) -> Tensor:
    mask = measure_lines(sums).to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, mask)


def _attend_axially(case: PolylineCase, attend: AttendLines) -> Forward:
    """Attend along lines in turn."""
    height, width = case.shape.size

    def along_rows(query: Tensor, key: Tensor, value: Tensor, sums: Tensor) -> Tensor:
        q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (query, key, value))  # (BH, h, W, D)
        out = attend(q, k, v, sums.transpose(1, 2).flatten(0, 1))
        return out.transpose(1, 2).unflatten(0, (-1, height))

    def along_columns(query: Tensor, key: Tensor, value: Tensor, sums: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2).flatten(0, 1).transpose(1, 2) for x in (query, key, value))
        out = attend(q, k, v, sums.permute(0, 3, 1, 2).flatten(0, 1))  # (BW, h, H, D)
        return out.transpose(1, 2).unflatten(0, (-1, width)).transpose(1, 2)

    def forward(query: Tensor, key: Tensor, value: Tensor, *decays: Tensor) -> Tensor:
        row_sums, column_sums = sum_lines(*(decays or case.fixed_decays))
        out = along_rows(query, key, value, row_sums)
        out = along_columns(query, key, out, column_sums)
        if case.shape.paths == "both":
            other = along_columns(query, key, value, column_sums)
            out = (out + along_rows(query, key, other, row_sums)) / 2
        return out

    return forward


def make_score_mods(
    row_sums: Tensor, column_sums: Tensor, paths: str
) -> list[Callable[..., Tensor]]:
    """Make FlexAttention's changes of scores, one for each path, from sums (B, h, H, W)."""
    width = row_sums.shape[3]
    row_sums, column_sums = row_sums.flatten(2), column_sums.flatten(2)

    def row_first(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        corner = query // width * width + key % width  # (i, l)
        p, r = row_sums, column_sums
        score = score - (p[batch, head, query] - p[batch, head, corner]).abs()
        return score - (r[batch, head, corner] - r[batch, head, key]).abs()

    def column_first(
        score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor
    ) -> Tensor:
        corner = key // width * width + query % width  # (k, j)
        p, r = row_sums, column_sums
        score = score - (r[batch, head, query] - r[batch, head, corner]).abs()
        return score - (p[batch, head, corner] - p[batch, head, key]).abs()

    return [row_first, column_first] if paths == "both" else [row_first]


def make_line_score_mod(sums: Tensor) -> Callable[..., Tensor]:
    """Make FlexAttention's change of scores along lines, from sums (lines, h, L)."""

    def score_mod(score: Tensor, line: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score - (sums[line, head, query] - sums[line, head, key]).abs()

    return score_mod


def make_flex(case: PolylineCase, is_training: bool) -> Forward:
    """FlexAttention, compiled for the shape, whose scores are changed by the sums of decays."""
    case.check_flex(is_training)
    shape = case.shape
    compiled = compile_flex(case, count_pairs(case))
    if shape.form == "axial":
        return _attend_axially(
            case, lambda q, k, v, sums: compiled(q, k, v, score_mod=make_line_score_mod(sums))
        )

    def forward(query: Tensor, key: Tensor, value: Tensor, *decays: Tensor) -> Tensor:
        q, k, v = (to_heads_first(x) for x in (query, key, value))
        score_mods = make_score_mods(*sum_lines(*(decays or case.fixed_decays)), shape.paths)
        outs = [compiled(q, k, v, score_mod=score_mod) for score_mod in score_mods]
        return to_map(sum(outs) / len(outs), shape.size)

    return forward

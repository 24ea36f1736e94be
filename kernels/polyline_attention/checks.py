"""Checks of calls of polyline attention: each a ValueError that names the argument."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..checks import shape
from .decays import FORMS, PATHS, Polyline, sum_dtype

TENSOR_NAMES = ("query", "key", "value", "log_alpha", "log_beta")
Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def checked_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_alpha: Tensor,
    log_beta: Tensor,
    form: str,
    paths: str,
    scale: float | None,
) -> tuple[Tensors, Polyline, float]:
    """Check the arguments of a call; give its tensors (cast, under autocast), form and scale."""
    tensors = (query, key, value, log_alpha, log_beta)
    checks.check_tensors(dict(zip(TENSOR_NAMES, tensors, strict=True)))
    for name, word, words in (("form", form, FORMS), ("paths", paths, PATHS)):
        if not isinstance(word, str) or word not in words:
            one_of = " or ".join(repr(word) for word in words)
            raise ValueError(f"{name} is {checks.brief(word)}: {one_of} is taken")
    checks.check_maps(query, key)
    if not torch.jit.is_tracing():  # there sizes are tensors
        checks.check_values(value, query)
        _check_grids(query, log_alpha=log_alpha, log_beta=log_beta)
    scale = checks.checked_scale(scale, query.shape[-1])
    query, key, value = checks.cast_under_autocast((query, key, value))
    checks.check_alike(dict(query=query, key=key, value=value))
    for name, decays in (("log_alpha", log_alpha), ("log_beta", log_beta)):
        _check_decays(name, decays, query)
    return (query, key, value, log_alpha, log_beta), Polyline(form, paths), scale


def _check_grids(query: Tensor, **decays: Tensor) -> None:
    for name, tensor in decays.items():
        if tensor.shape != query.shape[:-1]:
            raise ValueError(
                f"{name} has shape {shape(tensor)}: (B, H, W, heads) is taken, here "
                f"{shape(query)[:-1]}"
            )


def _check_decays(name: str, decays: Tensor, query: Tensor) -> None:
    if decays.dtype not in (query.dtype, torch.float32):
        raise ValueError(
            f"{name} has dtype {decays.dtype}: torch.float32 or the dtype of query, {query.dtype}, "
            "is taken"
        )
    checks.check_device(name, decays, "query", query)
    if decays.numel() == 0 or not checks.can_be_read(decays):
        return
    lowest, highest = (float(end) for end in decays.detach().aminmax())  # NaN where there is one
    # Of what is below, sums along a line may be infinite, and the difference of two of them NaN.
    least = torch.finfo(sum_dtype(query)).min / max(query.shape[1:3])
    if not least <= lowest <= highest <= 0:
        wrong = highest if highest > 0 else lowest
        raise ValueError(
            f"{name} holds {wrong}: logarithms of decays, finite numbers of at most 0 whose sums "
            "along lines are finite, are taken"
        )

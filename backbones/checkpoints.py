"""Checkpoints: unwrap a file's nesting and prefixes, map its keys, report what came of it."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

_logger = logging.getLogger(__name__)

KeyRules = Sequence[tuple[str, str]]

# Where files keep the weights, best first: averaged ones are what results are published with.
# Not mmengine's "ema_state_dict": its EMAHook puts the average into "state_dict" and the weights
# that it is an average of into that one.
_NESTS = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher", "net")
_WRAPPERS = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.", "body.")


@dataclass
class LoadReport:
    """What became of a checkpoint's entries, as keys of the model.

    Attributes:
        dialect: name of the key rules that applied; "densezoo" for the model's own keys.
        loaded: entries that the model has, with the shape it has.
        missing: entries of the model that the checkpoint lacks.
        unexpected: entries of the checkpoint that the model lacks.
        reshaped: entries whose shape was changed, or that timm will change (image channels,
            another number of classes), a line each.
    """

    dialect: str = "densezoo"
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} entries loaded ({self.dialect} keys)"]
        for title in ("missing", "unexpected", "reshaped"):
            entries = getattr(self, title)
            shown = ", ".join(entries[:8]) + (", ..." if len(entries) > 8 else "")
            lines.append(f"{len(entries)} {title}" + (f": {shown}" if entries else ""))
        return "; ".join(lines)


def unwrap_checkpoint(checkpoint: Mapping) -> dict[str, torch.Tensor]:
    """Find the state dict within a loaded checkpoint file, whatever its nesting and prefixes.

    Args:
        checkpoint: what `torch.load` returned, or a state dict.

    Returns:
        The tensors by name, without wrapper prefixes such as ``module.`` or ``backbone.``;
        with ``backbone.`` entries present, those alone (a detector's neck and heads go).

    Raises:
        ValueError: no tensor by name was found.
    """
    state = checkpoint
    while isinstance(state, Mapping) and not any(torch.is_tensor(v) for v in state.values()):
        nest = next((k for k in _NESTS if isinstance(state.get(k), Mapping) and state[k]), None)
        if nest is None:
            nested = [k for k, v in state.items() if isinstance(v, Mapping)]
            if len(nested) != 1:
                break
            nest = nested[0]
        state = state[nest]
    if not isinstance(state, Mapping):
        raise ValueError(f"the checkpoint holds a {type(state).__name__}, not weights by name")
    tensors = {str(k): v for k, v in state.items() if torch.is_tensor(v)}
    if not tensors:
        raise ValueError(
            f"no weights found in the checkpoint, whose keys are {sorted(map(str, checkpoint))[:8]}"
        )
    return strip_prefixes(tensors)


def strip_prefixes(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Drop wrapper prefixes from keys; where one wraps a part alone, that part is kept alone."""
    while True:
        counts = {p: sum(k.startswith(p) for k in state) for p in _WRAPPERS}
        prefix = max(counts, key=counts.get)
        # A trunk under a prefix outweighs heads beside it.
        if not counts[prefix] or (prefix != "backbone." and 2 * counts[prefix] < len(state)):
            return state
        state = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}


def map_keys(state: Mapping[str, torch.Tensor], rules: KeyRules) -> dict[str, torch.Tensor]:
    """Rename entries by (pattern, replacement) pairs, each applied to every key in turn.

    Raises:
        ValueError: two entries would get one name.
    """
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]
    mapped: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        for pattern, replacement in compiled:
            key = pattern.sub(replacement, key)
        if key in mapped:
            raise ValueError(f"two entries of the checkpoint map to {key}")
        mapped[key] = value
    return mapped


def convert_checkpoint(
    checkpoint: Mapping, model: nn.Module, dialects: Mapping[str, KeyRules]
) -> tuple[dict[str, torch.Tensor], LoadReport]:
    """Turn a checkpoint in any of a family's dialects into entries of `model`.

    Args:
        checkpoint: a loaded file or a state dict, nested and prefixed as it may be.
        model: the backbone that it is for (`adapt_checkpoint` of it is called).
        dialects: key rules by dialect name.

    Returns:
        All entries under the model's naming, unexpected ones included, and the report.

    Raises:
        ValueError: nothing of it belongs to the model's stem or stages, or an entry's shape is
            that of another model.
    """
    state = unwrap_checkpoint(checkpoint)
    own = model.state_dict()
    trunk = {k for k in own if k.startswith(("stem.", "stages."))}
    best: tuple[int, str, dict[str, torch.Tensor], list[str]] | None = None
    for dialect, rules in {"densezoo": (), **dialects}.items():
        mapped = map_keys(state, rules)
        notes = model.adapt_checkpoint(mapped)
        score = len(trunk & mapped.keys())
        if best is None or score > best[0]:
            best = score, dialect, mapped, notes
    score, dialect, mapped, notes = best
    if not score:
        raise ValueError(
            f"no entry of the checkpoint belongs to {type(model).__name__}: it has keys such as "
            f"{sorted(state)[:3]}. It is a checkpoint of another model"
        )
    report = LoadReport(dialect, reshaped=notes)
    for key, value in own.items():
        if key not in mapped:
            # A counter that files before PyTorch 0.4.1 lack; nothing depends on it here.
            if not key.endswith("num_batches_tracked"):
                report.missing.append(key)
        elif mapped[key].shape == value.shape:
            report.loaded.append(key)
        elif is_adaptable(model, key, mapped[key], value):
            report.reshaped.append(f"{key} {tuple(mapped[key].shape)} to {tuple(value.shape)}")
        else:
            raise ValueError(
                f"{key} has shape {tuple(mapped[key].shape)} in the checkpoint and "
                f"{tuple(value.shape)} in the model: it is a checkpoint of another variant"
            )
    report.unexpected += [k for k in mapped if k not in own]
    return mapped, report


def is_adaptable(model: nn.Module, key: str, given: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether timm fits the entry: first convolution to in_chans, classifier to num_classes."""
    if key.startswith("head."):
        return given.shape[1:] == wanted.shape[1:]
    return (
        key.startswith("stem.")
        and given.ndim == 4
        and given.shape[0] == wanted.shape[0]
        and given.shape[2:] == wanted.shape[2:]
    )


def log_report(report: LoadReport, source: str) -> None:
    """Log a report: as a warning when something is missing, left over or reshaped."""
    clean = not (report.missing or report.unexpected or report.reshaped)
    _logger.log(logging.INFO if clean else logging.WARNING, "%s: %s", source, report)

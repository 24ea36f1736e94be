"""Checkpoints: unwrap a file's nesting and prefixes, map its keys, report what came of it."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import nn

_logger = logging.getLogger(__name__)

KeyRules = Sequence[tuple[str, str]]

# Where files keep the weights, best first: averaged ones are what results are published with.
# Not mmengine's "ema_state_dict": its EMAHook puts the average into "state_dict" and the weights
# that it is an average of into that one.
_NESTS = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher", "net")
_WRAPPERS = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.", "body.", "graph_module.")
# The model's own keys, and as timm's wrappers flatten them.
_OWN_RULES = ((r"^stages_(\d+)\.", r"stages.\1."),)


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


def _history_method(owner: type, name: str) -> Callable:
    """Stand in for getattr, which checkpoints of mmengine call on the class of histories alone."""
    from mmengine.logging import HistoryBuffer

    if owner is not HistoryBuffer or name.startswith("_"):
        raise pickle.UnpicklingError(f"it asks for {name} of {owner}")
    return getattr(HistoryBuffer, name)


def read_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint file, executing nothing that it might contain.

    Args:
        path: a ``.safetensors`` file, or one of `torch.save`: tensors, numbers, an
            `argparse.Namespace`, and the histories that mmengine's Runner logs.

    Returns:
        The checkpoint; its weights stay on disk until they are used.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint, or holds other objects.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {str(path)!r} does not exist")
    multiarray = np._core.multiarray if hasattr(np, "_core") else np.core.multiarray
    allowed = [
        argparse.Namespace,
        np.dtype,
        np.ndarray,
        multiarray._reconstruct,
        multiarray.scalar,
        *(type(np.dtype(name)) for name in ("float32", "float64", "int64", "uint32", "bool")),
    ]
    if importlib.util.find_spec("mmengine") is not None:
        from mmengine.logging import HistoryBuffer

        allowed += [HistoryBuffer, (_history_method, "builtins.getattr")]
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals(allowed):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (
        RuntimeError,
        pickle.UnpicklingError,
        EOFError,
        UnicodeDecodeError,
        safetensors.SafetensorError,
    ) as error:
        raise ValueError(
            f"{str(path)!r} is not a checkpoint that can be read safely (is it truncated, or does "
            "it hold more than weights, numbers and logs?)"
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{str(path)!r} holds a {type(checkpoint).__name__}, not a checkpoint")
    return checkpoint


def unwrap_nesting(checkpoint: Mapping) -> dict[str, torch.Tensor]:
    """Find the tensors by name within a loaded checkpoint, names as they are.

    Args:
        checkpoint: what `read_checkpoint` returned, or a state dict.

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
    return tensors


def strip_prefixes(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Drop wrapper prefixes from keys.

    With ``backbone.`` entries present those alone are kept (a detector's neck and heads go), and
    the output norms of a dense backbone beside its model.
    """
    state = dict(state)
    while True:
        counts = {p: sum(k.startswith(p) for k in state) for p in _WRAPPERS}
        prefix = max(counts, key=counts.get)
        # A trunk under a prefix outweighs heads beside it.
        if not counts[prefix] or (prefix != "backbone." and 2 * counts[prefix] < len(state)):
            return state
        state = {
            k.removeprefix(prefix): v
            for k, v in state.items()
            if k.startswith((prefix, "out_norms."))
        }


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
    checkpoint: Mapping,
    model: nn.Module,
    dialects: Mapping[str, KeyRules],
    *,
    first_conv: str,
    in_chans: int = 3,
) -> tuple[dict[str, torch.Tensor], LoadReport]:
    """Turn a checkpoint in any of a family's dialects into entries of `model`.

    Args:
        checkpoint: a loaded file or a state dict, nested and prefixed as it may be.
        model: the backbone that it is for (`adapt_checkpoint` of it is called).
        dialects: key rules by dialect name.
        first_conv: name of the convolution that takes the image, which timm fits to other
            channels than the `in_chans` of the file.
        in_chans: channels that the file is for.

    Returns:
        All entries under the model's naming, unexpected ones included, and the report.

    Raises:
        ValueError: less than half of the model's stem and stages is in it, an entry's shape is
            that of another model, or its norms are folded and the model's are not.
    """
    state = strip_prefixes(unwrap_nesting(checkpoint))
    own = model.state_dict()
    trunk = {k for k in own if k.startswith(("stem.", "stages."))}
    best: tuple[int, str, dict[str, torch.Tensor], list[str]] | None = None
    for dialect, rules in {"densezoo": _OWN_RULES, **dialects}.items():
        mapped = map_keys(state, rules)
        notes = model.adapt_checkpoint(mapped)
        score = len(trunk & mapped.keys())
        if best is None or score > best[0]:
            best = score, dialect, mapped, notes
    score, dialect, mapped, notes = best
    folded = [
        k
        for k in mapped
        if k.endswith(".bias") and k not in own and k.removesuffix("bias") + "weight" in own
    ]
    if folded:
        raise ValueError(
            f"the checkpoint has {folded[0]}, which a model has after fuse() alone: load it into "
            "model.fuse(), or take the checkpoint from before"
        )
    if 2 * score < len(trunk):
        found = f"{score} of its {len(trunk)} entries" if score else "no entry"
        raise ValueError(
            f"{found} of {type(model).__name__} in the checkpoint, which has keys such as "
            f"{sorted(state)[:3]}: it is a checkpoint of another model, or a part of one"
        )
    report = LoadReport(dialect, reshaped=notes)
    for key, value in own.items():
        if key not in mapped:
            # A counter that files before PyTorch 0.4.1 lack; nothing depends on it here.
            if not key.endswith("num_batches_tracked"):
                report.missing.append(key)
        elif mapped[key].shape == value.shape:
            report.loaded.append(key)
        elif key == f"{first_conv}.weight" and mapped[key].shape[1] != in_chans:
            raise ValueError(
                f"the checkpoint is for images of {mapped[key].shape[1]} channels, the model for "
                f"{value.shape[1]}: pass in_chans={mapped[key].shape[1]}"
            )
        elif is_adaptable(key, mapped[key], value, first_conv):
            report.reshaped.append(f"{key} {tuple(mapped[key].shape)} to {tuple(value.shape)}")
        else:
            raise ValueError(
                f"{key} has shape {tuple(mapped[key].shape)} in the checkpoint and "
                f"{tuple(value.shape)} in the model: it is a checkpoint of another variant"
            )
    report.unexpected += [k for k in mapped if k not in own]
    return mapped, report


def is_adaptable(key: str, given: torch.Tensor, wanted: torch.Tensor, first_conv: str) -> bool:
    """Whether timm fits the entry: first convolution to in_chans, classifier to num_classes."""
    if key.startswith("head."):
        return given.shape[1:] == wanted.shape[1:]
    return (
        key == f"{first_conv}.weight"
        and given.shape[0] == wanted.shape[0]
        and given.shape[2:] == wanted.shape[2:]
    )


def log_report(report: LoadReport, source: str) -> None:
    """Log a report: as a warning when something is missing, left over or reshaped."""
    clean = not (report.missing or report.unexpected or report.reshaped)
    _logger.log(logging.INFO if clean else logging.WARNING, "%s: %s", source, report)

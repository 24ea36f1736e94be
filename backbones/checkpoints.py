"""Checkpoints: unwrap a file's nesting and prefixes, map its keys, report what came of it."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import safetensors.torch
import torch
from timm.models._hub import download_cached_file
from torch import nn

_logger = logging.getLogger(__name__)

KeyRules = Sequence[tuple[str, str]]

# Where files keep the weights, best first: averaged ones are what results are published with.
# Not mmengine's "ema_state_dict": its EMAHook puts the average into "state_dict" and the weights
# that it is an average of into that one.
_NESTS = ("state_dict_ema", "model_ema", "state_dict", "model", "models", "teacher", "net")
_WRAPPERS = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.", "body.", "graph_module.")
# timm's feature extractors flatten names so, ours and its own.
_FLATTENED_RULES = ((r"^stages_(\d+)\.", r"stages.\1."),)


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


# Statistics of mmengine's histories, which a checkpoint of its Runner names.
_HISTORY_METHODS = ("mean", "min", "max", "current")


def _history_method(owner: type, name: str) -> Callable:
    """Stand in for getattr, which checkpoints of mmengine call on the class of histories alone.

    The real one would hand a malicious file any attribute of any object, and so any function.
    """
    from mmengine.logging import HistoryBuffer

    if owner is not HistoryBuffer or name not in _HISTORY_METHODS:
        raise pickle.UnpicklingError(f"Unsupported global: GLOBAL {name} of {owner}")
    return getattr(HistoryBuffer, name)


class _NumberDtype:
    """Stand in for numpy.dtype, whose state could make NumPy take a file's bytes for pointers."""

    def __init__(self, code: str, *_: object) -> None:
        self.number = np.dtype(str(code))
        if self.number.kind not in "biufcSU":
            raise pickle.UnpicklingError(f"Unsupported global: GLOBAL numpy.dtype of {code}")

    def __setstate__(self, state: tuple) -> None:
        _, byteorder, subarray, names, fields, *_ = state
        if (subarray, names, fields) != (None, None, None):
            raise pickle.UnpicklingError("Unsupported global: GLOBAL numpy.dtype with fields")
        self.number = self.number.newbyteorder(byteorder)


class _ArrayClass:
    """Stand in for numpy.ndarray where a file names it for `_new_array`."""


class _NumberArray(np.ndarray):
    """An array of numbers as it is unpickled; pickled again, it is a plain one."""

    def __new__(cls) -> _NumberArray:
        return super().__new__(cls, (0,), "b")

    def __setstate__(self, state: tuple) -> None:
        version, shape, dtype, is_fortran, data = state
        if not isinstance(dtype, _NumberDtype):
            raise pickle.UnpicklingError("Unsupported global: GLOBAL numpy.ndarray of objects")
        super().__setstate__((version, shape, dtype.number, is_fortran, data))

    def __reduce_ex__(self, protocol: int) -> tuple:
        return self.view(np.ndarray).__reduce_ex__(protocol)


def _new_array(*_: object) -> _NumberArray:
    """Stand in for what NumPy starts an unpickled array with."""
    return _NumberArray()


def _new_scalar(dtype: _NumberDtype, data: bytes) -> np.generic:
    """Stand in for what NumPy makes a scalar of."""
    return np.frombuffer(data, dtype.number, count=1)[0]


def _allowed_globals() -> list:
    """What a checkpoint may hold beside what PyTorch itself takes for weights."""
    allowed = [
        argparse.Namespace,
        slice,
        _NumberArray,
        (_NumberDtype, "numpy.dtype"),
        (_ArrayClass, "numpy.ndarray"),
    ]
    for core in ("numpy.core", "numpy._core"):  # before and from NumPy 2
        allowed.append((_new_array, f"{core}.multiarray._reconstruct"))
        allowed.append((_new_scalar, f"{core}.multiarray.scalar"))
    if importlib.util.find_spec("mmengine") is not None:
        from mmengine.config import ConfigDict
        from mmengine.logging import HistoryBuffer

        allowed += [ConfigDict, HistoryBuffer, (_history_method, "builtins.getattr")]
    return allowed


@contextmanager
def _nothing_else_allowed() -> Iterator[None]:
    """Let PyTorch's unpickler take what `_allowed_globals` lists, whatever was allowed before.

    mmengine allows getattr while it loads, with which a file reaches any function.
    """
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(_allowed_globals())
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _reason(error: Exception) -> str:
    """Say in a few words why a file was refused."""
    asked = re.search(r"GLOBAL (\S+(?: of .*)?)", str(error))
    if asked:
        return f"it asks for {asked[1]}, which is no part of weights, numbers and logs"
    if isinstance(error, pickle.UnpicklingError) and "reduce" in str(error):
        return "it calls what is no part of weights, numbers and logs"
    said = re.split(r"\n|\. ", str(error))[0] if isinstance(error, RuntimeError) else ""
    return "it is truncated, damaged or of another format" + (f" ({said})" if said else "")


# How files begin that are taken for checkpoints, and what to do about them.
_FOREIGN_BEGINNINGS = (
    (rb"version https://git-lfs", "it is a pointer of Git LFS: run git lfs pull"),
    (rb"(?i)\s*<(!doctype|html)", "it is a web page: download the file itself"),
    (rb"\x89HDF", "it is an HDF5 file, as Keras writes them"),
    (rb"\s*\{", "it is JSON, such as an index of several files: name one with weights"),
)


def _foreign_kind(path: Path) -> str | None:
    """Say what a file is that was refused, where its beginning tells."""
    with open(path, "rb") as file:
        beginning = file.read(64)
    if not beginning:
        return "it is empty: download or copy it again"
    is_named_safetensors = path.suffix == ".safetensors"
    if is_named_safetensors and beginning.startswith(b"PK"):
        return "it looks like a file of torch.save: give it the suffix .pth"
    if not is_named_safetensors and beginning[8:9] == b"{":
        return "it looks like safetensors: give it the suffix .safetensors"
    return next(
        (what for pattern, what in _FOREIGN_BEGINNINGS if re.match(pattern, beginning)), None
    )


def read_checkpoint(
    path: str | Path,
    *,
    map_location: str | torch.device | Callable | dict | None = "cpu",
    mmap: bool = True,
) -> dict:
    """Read a checkpoint file, executing nothing that it might contain.

    Args:
        path: a ``.safetensors`` file, or one of `torch.save`: tensors, numbers, an
            `argparse.Namespace`, and the histories and configs that mmengine's Runner saves.
        map_location: where the tensors go, as of `torch.load`.
        mmap: leave the weights on disk until they are used, in a file that must stay as it is as
            long as they are.

    Returns:
        The checkpoint.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        ValueError: it is no checkpoint, or holds other objects.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise IsADirectoryError(f"checkpoint {str(path)!r} is a folder; name a file")
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {str(path)!r} does not exist")
    return load_safely(path, str(path), map_location=map_location, mmap=mmap)


def load_safely(
    file: Path | BinaryIO,
    name: str,
    *,
    map_location: str | torch.device | Callable | dict | None = None,
    mmap: bool = False,
) -> dict:
    """Read a checkpoint as `read_checkpoint` does, from a file or a stream called `name`.

    Raises:
        ValueError: it is no checkpoint, or holds other objects.
    """
    is_path = isinstance(file, Path)
    try:
        if is_path and file.suffix == ".safetensors":
            on_device = isinstance(map_location, (str, torch.device))
            return safetensors.torch.load_file(file, str(map_location) if on_device else "cpu")
        with _nothing_else_allowed():
            checkpoint = torch.load(
                file,
                map_location=map_location,
                weights_only=True,
                # Only the format of today, a zip file, can stay on disk.
                mmap=mmap and is_path and zipfile.is_zipfile(file),
            )
    except (
        RuntimeError,
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        IndexError,
        KeyError,
        TypeError,
        ValueError,
        AssertionError,
        struct.error,
        safetensors.SafetensorError,
    ) as error:  # what PyTorch's unpickler raises for bytes that mean nothing to it
        reason = (_foreign_kind(file) if is_path else None) or _reason(error)
        raise ValueError(
            f"{name!r} is not a checkpoint that can be read safely: {reason}"
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{name!r} holds a {type(checkpoint).__name__}, not a checkpoint")
    return checkpoint


def download_checkpoint(
    url: str, *, cache_dir: str | Path | None = None, progress: bool = True
) -> Path:
    """Download a file into timm's cache, where it is not there yet, and return its path.

    Raises:
        OSError: it can't be downloaded, or not be written.
    """
    try:
        path = download_cached_file(url, check_hash=False, progress=progress, cache_dir=cache_dir)
    except (OSError, ValueError) as error:
        raise OSError(
            f"{url} can't be downloaded ({error}): check the address and the connection, or "
            "download it by other means and name the file"
        ) from error
    return Path(path)


def choose_nest(checkpoint: Mapping, first: Sequence[str] = ()) -> tuple[str | None, list[str]]:
    """Choose the entry of a loaded checkpoint that weights are taken from.

    Args:
        checkpoint: what `read_checkpoint` returned.
        first: as of `unwrap_nesting`.

    Returns:
        The entry, None if there is none of the known ones; and those that were passed over for it.
    """
    nests = dict.fromkeys((*first, *_NESTS))
    filled = [k for k in nests if isinstance(checkpoint.get(k), Mapping) and checkpoint[k]]
    return next(iter(filled), None), filled[1:]


def unwrap_nesting(checkpoint: Mapping, first: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """Find the tensors by name within a loaded checkpoint, names as they are.

    Args:
        checkpoint: what `read_checkpoint` returned, or a state dict.
        first: entries to look in before those where files mostly keep the weights
            (`HierarchicalBackbone.checkpoint_nests`).

    Raises:
        ValueError: no tensor by name was found, or one holds NaN.
    """
    state = checkpoint
    while isinstance(state, Mapping) and not any(torch.is_tensor(v) for v in state.values()):
        nest, others = choose_nest(state, first)
        if others:
            _logger.info("weights are those of %r; the file has %s too", nest, ", ".join(others))
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
    check_numbers(tensors)
    return tensors


def check_numbers(state: Mapping[str, torch.Tensor]) -> None:
    """Raise a ValueError if an entry of a state dict holds NaN, as a failed training leaves it."""
    bad = [
        key
        for key, value in state.items()
        # Smaller types are of quantised models, and have no NaN or no test for it.
        if value.is_floating_point() and value.itemsize > 1 and not value.is_meta
        if value.isnan().any()
    ]
    if bad:
        raise ValueError(
            f"{len(bad)} of {len(state)} entries of the checkpoint hold NaN, such as {bad[0]}; "
            "give one from before its training failed"
        )


def strip_prefixes(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Drop wrapper prefixes from keys.

    With ``backbone.`` entries present those alone are kept (a detector's neck and heads go), and
    the output norms of a dense backbone beside its model.
    """
    state = dict(state)
    while True:
        counts = {p: sum(k.startswith(p) for k in state) for p in _WRAPPERS}
        if any(k.startswith("embeddings.") for k in state):
            counts["encoder."] = 0  # half a model of transformers, the stem beside it
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
        ValueError: less than half of the model's stem and stages is in it or nothing of its stem,
            an entry's shape is that of another model, or its norms are folded and the model's are
            not.
    """
    state = strip_prefixes(unwrap_nesting(checkpoint, model.checkpoint_nests))
    plain = map_keys(state, _FLATTENED_RULES)
    own = model.state_dict()
    trunk = {k for k in own if k.startswith(("stem.", "stages."))}
    best: tuple[int, str, dict[str, torch.Tensor], list[str]] | None = None
    for dialect, rules in {"densezoo": (), **dialects}.items():
        mapped = map_keys(plain, rules)
        notes = model.adapt_checkpoint(mapped)
        score = len(trunk & mapped.keys())
        if best is None or score > best[0]:
            best = score, dialect, mapped, notes
        if score == len(trunk):
            break  # none fits better, and another may take it for what the model refuses
    score, dialect, mapped, notes = best
    folded = [
        k
        for k in mapped
        if k.endswith(".bias") and k not in own
        for weight in [k.removesuffix("bias") + "weight"]
        if weight in own and weight in mapped and mapped[weight].shape == own[weight].shape
    ]
    trunk_given = {k for k in mapped if k.startswith(("stem.", "stages."))}
    strange = trunk_given - own.keys() - set(folded)
    is_own_stem = not any(k.startswith("stem.") for k in strange)
    if folded and is_own_stem and 2 * len(strange) < len(trunk_given):  # else of another model
        raise ValueError(
            f"the checkpoint has {folded[0]}, which a model has after fuse() alone: load it into "
            "model.fuse(), or take the checkpoint from before"
        )
    # Families may name blocks alike, and no two their stems.
    has_stem = any(k.startswith("stem.") for k in trunk & mapped.keys())
    if 2 * score < len(trunk) or not has_stem:
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

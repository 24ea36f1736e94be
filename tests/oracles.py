"""What tests compare with: reference cases of the official models.

A case file (tests/data/parity/*.json) lists every entry of an official checkpoint (name, shape,
kind) and what the official model answers in float64 when its checkpoint holds the weights of
`make_checkpoint` and its input is `make_input`.

- kind "param" and "buffer" are in the checkpoint, "counter" (BatchNorm's num_batches_tracked) is
  in it as zero, "derived" is computed by the model and not in it;
- `nest` is the top-level key (dotted, may be empty) of the published file's state dict;
- `mode` "classification" has logits and stage maps, "dense" stage maps alone;
- `weights.rescale` multiplies entries by the ending of their name.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import densezoo

DATA = Path(__file__).parent / "data" / "parity"
SAMPLES = 64


def load_cases(folder=DATA):
    """All cases as {id: (case file, case)}."""
    cases = {}
    for path in sorted(Path(folder).glob("*.json")):
        case_file = json.loads(path.read_text())
        for case in case_file["cases"]:
            size = "x".join(map(str, case["input"][2:]))
            cases[f"{path.stem}-{case['mode']}-{size}-{case['seed']}"] = (case_file, case)
    return cases


def make_state_dict(keys, seed=0):
    """{name: float32 tensor}; each entry depends on its name, shape and `seed` only."""
    state = {}
    for name, shape, kind in keys:
        if kind == "derived":
            continue
        if kind == "counter":
            state[name] = torch.zeros(shape, dtype=torch.long)
            continue
        rng = np.random.RandomState(zlib.crc32(f"{seed}:{name}".encode()))
        noise = rng.standard_normal(tuple(shape))
        if name.endswith("running_var"):
            value = 1 + 0.2 * np.abs(noise)
        elif name.endswith("running_mean"):
            value = 0.1 * noise
        elif len(shape) >= 2:
            value = noise * max(1 / np.sqrt(np.prod(shape[1:])), 0.02)
        elif name.endswith("weight") or "gamma" in name or "scale" in name:
            value = 1 + 0.1 * noise
        else:
            value = 0.1 * noise
        state[name] = torch.from_numpy(np.ascontiguousarray(value)).float().reshape(tuple(shape))
    return state


def make_checkpoint(case_file, case):
    """The published file of a case: its state dict under the file's nesting."""
    state = make_state_dict(case_file["keys"], case["seed"])
    changes = case.get("weights", {})
    for name in state:
        for ending, factor in changes.get("rescale", {}).items():
            if name.endswith(ending):
                state[name] = state[name] * factor
        if name.endswith(tuple(changes.get("negative_abs", ())) or "\0"):
            state[name] = -state[name].abs()
    for key in reversed([k for k in case_file["nest"].split(".") if k]):
        state = {key: state}
    return state


def make_input(shape, seed=0):
    """A (B, 3, H, W) float32 image batch: smooth structure plus noise."""
    b, c, h, w = shape
    rng = np.random.RandomState(zlib.crc32(f"input:{seed}:{list(shape)}".encode()))
    y, x = np.meshgrid(np.linspace(0, 1, h), np.linspace(0, 1, w), indexing="ij")
    out = np.empty(tuple(shape))
    for i in range(b):
        for j in range(c):
            fy, fx, phase = rng.uniform(1, 6), rng.uniform(1, 6), rng.uniform(0, 6.28)
            wave = np.sin(6.28 * (fy * y + fx * x) + phase)
            out[i, j] = wave + 0.5 * rng.standard_normal((h, w))
    return torch.from_numpy(out).float()


def error(summary, tensor):
    """Largest difference between a tensor and its summary, in the reference's std."""
    a = tensor.detach().double().cpu().numpy()
    assert list(a.shape) == list(summary["shape"])
    if not np.isfinite(a).all():
        return float("inf")
    index = np.random.RandomState(a.size % (2**32)).randint(0, a.size, SAMPLES)
    worst = np.abs(a.reshape(-1)[index] - np.array(summary["values"])).max()
    moments = max(abs(a.mean() - summary["mean"]), abs(a.std() - summary["std"]))
    return float(max(worst, moments) / (summary["std"] + 1e-12))


def relative_error(actual, expected):
    """Largest difference of two tensors in the standard deviation of the second."""
    assert actual.shape == expected.shape
    return float((actual.double() - expected.double()).abs().max() / expected.double().std())


def variants_of_families():
    """Every name of the zoo; the smallest variant of a family unmarked, the others slow."""
    families = {}
    for name in densezoo.list_backbones():
        model = timm.create_model(name, device="meta")
        size = sum(p.numel() for p in model.parameters())
        families.setdefault(type(model).__name__, []).append((size, name))
    return [
        pytest.param(name, marks=() if i == 0 else pytest.mark.slow, id=name)
        for family in families.values()
        for i, (_, name) in enumerate(sorted(family))
    ]

"""What tests compare with: reference cases of the official models, and measures.

A case file (tests/data/parity/*.json) lists every entry of an official checkpoint (name, shape,
kind) and what the official model answers in float64 when its checkpoint holds the weights of
`make_checkpoint` and its input is `make_input`.

- kind "param" and "buffer" are in the checkpoint, "counter" (BatchNorm's num_batches_tracked) is
  in it as zero, "derived" is computed by the model and not in it;
- `nest` is the top-level key (dotted, may be empty) of the published file's state dict;
- `mode` "classification" has logits and stage maps, "dense" stage maps alone;
- `weights` changes entries by the ending of their name: `rescale` multiplies, `negative_abs` takes
  minus the magnitude.
"""

import functools
import inspect
import io
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from mmengine.registry import MODELS
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import densezoo
from densezoo.backbones.base import FEATURE_CLASSES
from densezoo.backbones.registry import BACKBONES

DATA = Path(__file__).parent / "data" / "parity"
SAMPLES = 64
# Models of more parameters are tested by their shapes, on the meta device: in full they would
# take hours together, and run no code that a family's smaller ones do not.
MOST_PARAMETERS = 130_000_000
# The forms a model comes in: with its head, as each of timm's extractors, for mmdet and mmseg.
FORMS = ["classifier", *FEATURE_CLASSES, "dense"]


def load_cases(folder=DATA):
    """All cases as {id: (case file, case)}."""
    cases = {}
    for path in sorted(Path(folder).glob("*.json")):
        case_file = json.loads(path.read_text())
        for case in case_file["cases"]:
            size = "x".join(map(str, case["input"][2:]))
            name = f"{path.stem}-{case['mode']}-{size}-{case['seed']}"
            # Further ones of a size differ in arguments, weights or number of images.
            further = sum(known == name or known.startswith(f"{name}-") for known in cases)
            name += f"-{further + 1}" if further else ""
            cases[name] = (case_file, case)
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
    difference = actual.detach().double() - expected.detach().double()
    return float(difference.abs().max() / expected.detach().double().std())


def rms_error(actual, expected):
    """Root mean square of a difference, in the standard deviation of what is expected."""
    difference = actual.double() - expected.double()
    return float(difference.square().mean().sqrt() / expected.double().std())


def gradient_error(actual, expected):
    """Largest difference of two lists of gradients, each in its own largest magnitude.

    Gradients that are zero but for rounding, such as those of a bias before BatchNorm, are
    measured in the largest magnitude of all.
    """
    largest = max(float(e.abs().max()) for e in expected)
    errors = []
    for a, e in zip(actual, expected, strict=True):
        own = float(e.abs().max())
        errors.append(float((a - e).abs().max()) / (own if own > 1e-5 * largest else largest))
    return max(errors)


def image(*size, batch=1, chans=3, seed=0):
    """A (batch, chans, *size) image batch of noise."""
    return torch.randn(batch, chans, *size, generator=torch.Generator().manual_seed(seed))


def as_list(outputs):
    """Outputs of any model as a list: one tensor, several, or several by name."""
    if torch.is_tensor(outputs):
        return [outputs]
    return list(outputs.values()) if isinstance(outputs, dict) else list(outputs)


class PeakMemory(TorchDispatchMode):
    """Largest number of bytes that tensors made within the context held at a time.

    After every operator, forward and backward, it sums the storages that operators have made
    and that are alive, each once however many views it has. What an operator uses and frees
    within itself is not seen. Unlike resident size it is the same in every run.

    Attributes:
        peak: that number, bytes.
    """

    def __init__(self):
        super().__init__()
        self.peak = 0
        self._storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._note((args, kwargs), is_new=False)
        outputs = func(*args, **(kwargs or {}))
        # A weak reference keeps the address of a dead storage from being used again.
        self._storages = {k: v for k, v in self._storages.items() if not v[0].expired()}
        self._note(outputs, is_new=True)
        self.peak = max(self.peak, self.live())
        return outputs

    def _note(self, tree, is_new):
        for tensor in tree_leaves(tree):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                size = storage.nbytes() if is_new else 0  # parameters and images were there
                self._storages.setdefault(storage._cdata, (StorageWeakRef(storage), size))

    def live(self):
        """Bytes alive now."""
        return sum(size for reference, size in self._storages.values() if not reference.expired())


def dense(name, **kwargs):
    """A `DenseBackbone`, built as mmdet and mmseg build it."""
    return MODELS.build(dict(type="DenseBackbone", model_name=name, **kwargs))


def build(name, form, **kwargs):
    """A model in one of its forms."""
    if form == "dense":
        return dense(name, model_kwargs=kwargs)
    if form == "classifier":
        return timm.create_model(name, **kwargs)
    return timm.create_model(name, features_only=True, feature_cls=form, **kwargs)


def load_trunk(model, state):
    """Load the entries of a whole model's state dict, under the names of any of its forms."""
    own = {}
    for key in model.state_dict():
        name = key
        for prefix in ("model.", "model.", "body.", "graph_module."):
            name = name.removeprefix(prefix)
        own[key] = state[name.replace("stages_", "stages.", 1)]
    model.load_state_dict(own)
    return model


def round_as(published, value):
    """Round a value to the decimals that a published figure is written with."""
    return round(value, len(str(published).partition(".")[2]))


def norms(model):
    """Every BatchNorm within, synchronised ones too."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm)]


def loss_of(outputs):
    """A scalar that every value of every output takes part in."""
    return sum(m.square().mean() for m in as_list(outputs))


def without_gradient(model):
    """Names of parameters without a finite gradient, or matrices and kernels with a zero one."""
    return [
        n
        for n, p in model.named_parameters()
        if p.grad is None or not p.grad.isfinite().all() or (p.ndim > 1 and not p.grad.any())
    ]


def frozen_and_free(backbone, frozen_stages):
    """What `frozen_stages` freezes of a dense backbone of the zoo, and the rest."""
    inner = backbone.model.model
    split = max(frozen_stages, 0)
    stem = [inner.stem]
    if frozen_stages < 0:
        return [], stem + list(inner.stages)
    return stem + list(inner.stages[:split]), list(inner.stages[split:])


def gradients(model, outputs):
    """Gradients of `loss_of` in the order of the parameters."""
    model.zero_grad()
    loss_of(outputs).backward()
    return [p.grad for p in model.parameters()]


def saved_and_loaded(model):
    """A whole model through torch.save and torch.load."""
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@functools.cache
def official_checkpoint(name):
    """A file for `name` as its authors publish it, and arguments of a model that it is for.

    Where no case has one, one of our own of two blocks a stage.
    """
    for case_file, case in load_cases().values():
        if case_file["model_name"] == name and not case["model_kwargs"]:
            return make_checkpoint(case_file, case), equal_arguments(name)
    torch.manual_seed(0)
    return timm.create_model(name, **shallow(name)).state_dict(), shallow(name)


@functools.cache
def _families():
    """{module: its variants as (parameters, name, class), ascending}; four stages alone.

    Those of as many parameters, to a percent or so, are in the order of their names.
    """
    families = {}
    for name in densezoo.list_backbones():
        model = timm.create_model(name, device="meta")
        if len(model.feature_info) < 4:  # of one map, which have tests of their own
            continue
        size = sum(p.numel() for p in model.parameters())
        variants = families.setdefault(type(model).__module__, [])
        variants.append((size, name, type(model).__name__))
    return {
        family: sorted(variants, key=lambda variant: (round(variant[0], -5), variant[1]))
        for family, variants in families.items()
    }


def _first_of(variants, every_design):
    """Names tested by default: a family's smallest, or the smallest of each of its classes."""
    first = {}
    for _, name, design in variants:
        first.setdefault(design if every_design else None, name)
    return set(first.values())


def variants_of_families(most_parameters=MOST_PARAMETERS, every_design=False):
    """Names of at most so many parameters; a family's smallest unmarked, the others slow.

    With `every_design` the smallest of each class of a family is unmarked.
    """
    return [
        pytest.param(
            name,
            marks=() if name in _first_of(variants, every_design) else pytest.mark.slow,
            id=name,
        )
        for variants in _families().values()
        for size, name, _ in variants
        if size <= most_parameters
    ]


def equal_arguments(name):
    """What makes a classifier and a feature extractor one model: the classifier's own values.

    Of what the class sets for dense work (`dense_arguments`), which is nothing for most.
    """
    registered = BACKBONES[name]
    parameters = inspect.signature(registered.cls).parameters
    return {
        key: registered.arguments.get(key, parameters[key].default)
        for key in registered.cls.dense_arguments
    }


def shallow(name):
    """Arguments that leave a variant its widths, heads and windows, and two blocks a stage at most.

    Two are of every kind that a family alternates (dilated or not, of the window or of the map),
    and what one block hands to the next is among them.
    """
    depths = BACKBONES[name].arguments["depths"]
    return dict(depths=tuple(min(depth, 2) for depth in depths), **equal_arguments(name))


def fewest_blocks(name):
    """As `shallow`, with as few blocks as have every class of modules, one a stage at least."""

    def classes(depths):
        model = timm.create_model(name, depths=depths, device="meta")
        return {type(module) for module in model.modules()}

    every = classes((2, 2, 2, 2))
    choices = [(1, 1, 1, 1), (2, 1, 1, 1), (2, 2, 2, 2)]
    return {**shallow(name), "depths": next(d for d in choices if classes(d) == every)}


def variants_by_shape(most_parameters=MOST_PARAMETERS):
    """Every name; the smallest of a class, and what `variants_of_families` leaves out, unmarked."""
    return [
        pytest.param(
            name,
            marks=()
            if name in _first_of(variants, every_design=True) or size > most_parameters
            else pytest.mark.slow,
            id=name,
        )
        for variants in _families().values()
        for size, name, _ in variants
    ]


def smallest_of_families():
    """{family: name of its smallest variant}."""
    return {family: variants[0][1] for family, variants in _families().items()}


def in_transformers_layout(official, depths, prefix="nat."):
    """An official state dict of NAT or DiNAT under the names of Hugging Face's library.

    Written from the attributes of that library's modules (transformers 4.46).

    Args:
        official: the state dict.
        depths: blocks per stage.
        prefix: "nat." and "dinat." of classifiers, "" of backbones, which have no head.
    """
    state = {}

    def put(name, entry, given=prefix):
        for kind in ("weight", "bias"):
            if f"{entry}.{kind}" in official:
                state[f"{given}{name}.{kind}"] = official[f"{entry}.{kind}"]

    put("embeddings.patch_embeddings.projection.0", "patch_embed.proj.0")
    put("embeddings.patch_embeddings.projection.1", "patch_embed.proj.1")
    put("embeddings.norm", "patch_embed.norm")
    put("layernorm", "norm")
    put("classifier", "head", given="")
    for stage, depth in enumerate(depths):
        level, entry = f"encoder.levels.{stage}", f"levels.{stage}"
        put(f"{level}.downsample.reduction", f"{entry}.downsample.reduction")
        put(f"{level}.downsample.norm", f"{entry}.downsample.norm")
        for i in range(depth):
            layer, block = f"{level}.layers.{i}", f"{entry}.blocks.{i}"
            put(f"{layer}.layernorm_before", f"{block}.norm1")
            put(f"{layer}.attention.output.dense", f"{block}.attn.proj")
            put(f"{layer}.layernorm_after", f"{block}.norm2")
            put(f"{layer}.intermediate.dense", f"{block}.mlp.fc1")
            put(f"{layer}.output.dense", f"{block}.mlp.fc2")
            attention = f"{prefix}{layer}.attention.self"
            state[f"{attention}.rpb"] = official[f"{block}.attn.rpb"]
            for kind in ("weight", "bias"):
                joined = official[f"{block}.attn.qkv.{kind}"]
                for j, part in enumerate(("query", "key", "value")):
                    state[f"{attention}.{part}.{kind}"] = joined.chunk(3)[j].clone()
            if f"{block}.gamma1" in official:
                gammas = official[f"{block}.gamma1"], official[f"{block}.gamma2"]
                state[f"{prefix}{layer}.layer_scale_parameters"] = torch.stack(gammas)
    return state


def isotropic_keys(depth, dim, heads, table, is_full=False):
    """Entries of an official isotropic model's checkpoint, as a case file lists them."""
    keys = [("patch_embed.proj.weight", (dim, 3, 16, 16)), ("patch_embed.proj.bias", (dim,))]
    shapes = {
        "norm1.weight": (dim,),
        "norm1.bias": (dim,),
        "attn.rpb": (heads, table, table),
        "attn.qkv.weight": (3 * dim, dim),
        "attn.qkv.bias": (3 * dim,),
        "attn.proj.weight": (dim, dim),
        "attn.proj.bias": (dim,),
        "norm2.weight": (dim,),
        "norm2.bias": (dim,),
        "mlp.fc1.weight": (4 * dim, dim),
        "mlp.fc1.bias": (4 * dim,),
        "mlp.fc2.weight": (dim, 4 * dim),
        "mlp.fc2.bias": (dim,),
    }
    for i in range(depth):
        keys += [(f"layers.{i}.{name}", shape) for name, shape in shapes.items()]
        if is_full:
            keys.append((f"layers.{i}.attn.relative_position_index", (196, 196)))
    for norm in ("patch_embed.norm", "norm"):
        keys += [(f"{norm}.weight", (dim,)), (f"{norm}.bias", (dim,))]
    keys += [("head.weight", (1000, dim)), ("head.bias", (1000,))]
    return [(name, shape, "param") for name, shape in keys]

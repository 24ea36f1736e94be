"""Registration of the zoo's models: the only code that touches timm's and mmengine's registries."""

from __future__ import annotations

import difflib
import logging
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    is_model,
    is_model_pretrained,
    list_models,
    list_pretrained,
    load_state_dict_from_hf,
    model_entrypoint,
    register_model,
)
from timm.models._features import FeatureDictNet, FeatureHookNet
from timm.models._pretrained import PretrainedCfg
from timm.models._registry import get_pretrained_cfg
from torch import nn

from ..layers.arguments import check_flag
from .aliases import ALIASES
from .base import FEATURE_CLASSES, HierarchicalBackbone, absolute_indices
from .checkpoints import (
    KeyRules,
    convert_checkpoint,
    download_checkpoint,
    log_report,
    read_checkpoint,
    strip_prefixes,
    unwrap_nesting,
)

_logger = logging.getLogger(__name__)

_SEED = 0x64656E73657A6F6F

Part = TypeVar("Part", bound=Callable)


@dataclass(frozen=True)
class Published:
    """Results that the authors published for a variant; None where there is none.

    Attributes:
        params: parameters, in millions.
        gmacs: 10^9 multiply-accumulates at the input size of the weights.
        top1: ImageNet-1k top-1 accuracies, percent, one a published file.
        retinanet: COCO box AP of RetinaNet, 1x schedule.
        mask_rcnn: COCO box and mask AP of Mask R-CNN, 1x schedule.
        semantic_fpn: ADE20K mIoU of Semantic FPN.
    """

    params: float | None = None
    gmacs: float | None = None
    top1: tuple[float, ...] = ()
    retinanet: float | None = None
    mask_rcnn: tuple[float, float] | None = None
    semantic_fpn: float | None = None


@dataclass(frozen=True)
class Weights:
    """A variant's published weights and how images are prepared for them.

    Attributes:
        page: web page that lists the files.
        files: where the page keeps them; none where the authors published no weights.
        url: direct link, where there is one that a program can download.
        hf_hub_id: repository of the file on the Hugging Face hub, which timm reads.
        sha256: SHA-256 of the file, where known.
        license: licence of the weights, an SPDX name in lower case.
        input_size: channels, height and width, pixels.
        fixed_input_size: whether images of that size alone are taken.
        crop_mode: "center", or "squash" for a resize of both sides to the input size.
        first_conv: name of the convolution that takes the image.
        classifier: names of the linear classifiers.
        arguments: of the constructor, for the model that the file is of, where they differ from
            the variant's: its window size, say. A caller's own go before them.
    """

    page: str
    files: tuple[str, ...] = ()
    url: str | None = None
    hf_hub_id: str | None = None
    sha256: str | None = None
    license: str = ""
    paper_name: str = ""
    paper_ids: str = ""
    input_size: tuple[int, int, int] = (3, 224, 224)
    fixed_input_size: bool = False
    crop_pct: float = 0.875
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    num_classes: int = 1000
    first_conv: str = "stem.conv1"
    classifier: str | tuple[str, ...] = "head.fc"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    published: Published = Published()

    def pretrained_cfg(self, stride: int) -> PretrainedCfg:
        """Give the same as timm's pretrained_cfg; `stride` is that of the last map, pixels."""
        notes = [f"file: {file}" for file in self.files]
        notes += [f"sha256: {self.sha256}"] if self.sha256 else []
        return PretrainedCfg(
            url=self.url,
            hf_hub_id=self.hf_hub_id,
            source=self.page,
            input_size=self.input_size,
            fixed_input_size=self.fixed_input_size,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            num_classes=self.num_classes,
            pool_size=tuple(-(-size // stride) for size in self.input_size[1:]),
            first_conv=self.first_conv,
            classifier=self.classifier,
            license=self.license,
            origin_url=self.page,
            paper_name=self.paper_name,
            paper_ids=self.paper_ids,
            notes=tuple(notes),
        )


@dataclass(frozen=True)
class Registered:
    """A model of the zoo: its class, constructor arguments, weights and key rules.

    Attributes:
        tags: published weights by tag, the default ones first; the tag is "" where there are no
            others.
    """

    name: str
    cls: type[HierarchicalBackbone]
    arguments: Mapping[str, Any]
    tags: Mapping[str, Weights]
    key_rules: Mapping[str, KeyRules]

    @property
    def weights(self) -> Weights:
        """The weights that the name without a tag stands for."""
        return next(iter(self.tags.values()))


BACKBONES: dict[str, Registered] = {}


class WeightsError(RuntimeError, ValueError):
    """Weights that cannot be had; a RuntimeError as timm raises for it, and a ValueError."""


def list_backbones() -> list[str]:
    """List the names of the zoo's models, as `timm.create_model` takes them."""
    return sorted(BACKBONES)


def find_backbone(name: str) -> Registered | None:
    """Find a model of the zoo by its name or an alias, with a tag or without; None if it is not."""
    base = name.split(".")[0]
    if _is_foreign(base):
        return None
    return BACKBONES.get(ALIASES.get(base, base))


def find_weights(name: str) -> Weights | None:
    """Find the weights that a name or an alias, with a tag or without, stands for; None if none."""
    registered, tag = find_backbone(name), name.partition(".")[2]
    if registered is None:
        return None
    return registered.tags.get(tag) if tag else registered.weights


def check_model_name(name: str) -> None:
    """Raise a ValueError that suggests near names unless timm knows the model `name`."""
    if not isinstance(name, str):
        raise ValueError(
            f"model_name is {name!r}: the name of a model of densezoo or timm is taken"
        )
    if ":" in name:
        return  # of a hub
    base, _, tag = name.partition(".")
    if is_model(base):
        registered = find_backbone(base)
        if tag and not (is_model_pretrained(name) or find_weights(name)):
            tags = [known.partition(".")[2] for known in list_pretrained(f"{base}.*")]
            tags = [known for known in registered.tags if known] if registered else tags
            known = f", and there are {', '.join(tags)}" if tags else ""
            raise ValueError(f"unknown weights tag in {name!r}: {base!r} alone is enough{known}")
        return
    near = difflib.get_close_matches(base, list_backbones(), n=3, cutoff=0.5)
    near += difflib.get_close_matches(base, list_models(), n=3, cutoff=0.7)
    hint = f"did you mean {', '.join(dict.fromkeys(near))}?" if near else "see `densezoo list`"
    raise ValueError(f"unknown model {name!r}: {hint}")


def register_backbones(
    module_name: str,
    cls: type[HierarchicalBackbone],
    variants: Mapping[str, Mapping[str, Any]],
    weights: Mapping[str, Weights | Mapping[str, Weights]],
    key_rules: Mapping[str, KeyRules],
) -> None:
    """Register a family's variants in timm, and the official names that `ALIASES` has for them.

    Weights of several tags are timm's "name.tag", the first one's also the name's alone.

    A name that timm, or another package, has already is left to it. Registering once more, as a
    module that is loaded anew does, replaces what the module registered before.

    Args:
        module_name: `__name__` of the family's module, which gets an entry point a variant.
        cls: the backbone class.
        variants: constructor arguments by name.
        weights: published weights by name; of several files of one variant by tag within, the
            default ones first.
        key_rules: (pattern, replacement) pairs by checkpoint dialect.
    """
    module = sys.modules[module_name]
    names = {name: name for name in variants}
    names |= {alias: name for alias, name in ALIASES.items() if name in variants}
    tags = {n: w if isinstance(w, Mapping) else {"": w} for n, w in weights.items()}
    configs = {
        # The star makes a tag timm's default one.
        f"{alias}.{tag}{'' if i else '*'}" if tag else alias: w.pretrained_cfg(cls.strides[-1])
        for alias, name in names.items()
        for i, (tag, w) in enumerate(tags[name].items())
    }
    # Beside those of the module's other classes.
    known = getattr(module, "default_cfgs", {})
    module.default_cfgs = {**known, **generate_default_cfgs(configs)}
    for name, arguments in variants.items():
        if _is_foreign(name):
            _logger.info("timm has a model %s of its own, which is left in place", name)
            BACKBONES.pop(name, None)
            continue
        BACKBONES[name] = Registered(name, cls, arguments, tags[name], key_rules)
        for alias in (a for a, target in names.items() if target == name):
            if not _is_foreign(alias):
                entry = _make_entry_point(BACKBONES[name], alias, module_name)
                setattr(module, alias, entry)
                _register_in_timm(entry)


def _is_foreign(name: str) -> bool:
    """Whether timm has a model `name` that was not registered here."""
    return is_model(name) and not hasattr(model_entrypoint(name), "is_of_densezoo")


def _register_in_timm(entry: Callable[..., nn.Module]) -> None:
    """Register an entry point, or put it in the place of an earlier one of the zoo."""
    with warnings.catch_warnings():
        # Only a name of ours can be overwritten here.
        warnings.filterwarnings("ignore", f"Overwriting {entry.__name__} in registry")
        register_model(entry)


def _make_entry_point(
    registered: Registered, name: str, module_name: str
) -> Callable[..., nn.Module]:
    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _build(registered, pretrained, **kwargs)

    entry.__name__ = entry.__qualname__ = name
    entry.__module__ = module_name
    entry.__doc__ = f"{registered.cls.__name__} {dict(registered.arguments)}."
    entry.is_of_densezoo = True
    return entry


def _build(registered: Registered, pretrained: bool, **kwargs: Any) -> nn.Module:
    """Build a model as timm does, in a `feature_cls` of ours with features_only=True."""
    if not isinstance(pretrained, bool):
        raise ValueError(
            f"pretrained is {pretrained!r}: True or False is taken; a file goes into "
            "pretrained_cfg_overlay=dict(file=...) beside pretrained=True"
        )
    check_flag("features_only", kwargs.get("features_only", False))
    weights = _find_tagged(registered, kwargs.get("pretrained_cfg"))
    registered = replace(registered, arguments={**registered.arguments, **weights.arguments})
    if pretrained:
        _read_weights(registered, weights, kwargs)
    feature_cfg, order = {}, None
    if kwargs.get("features_only", False):
        kwargs = {**registered.cls.dense_arguments, **kwargs}
        num_stages = len({**registered.arguments, **kwargs}["depths"])
        order = absolute_indices(kwargs.pop("out_indices", None), num_stages)
        feature_cls = kwargs.pop("feature_cls", "getter")
        name = feature_cls.lower() if isinstance(feature_cls, str) else None
        if isinstance(feature_cls, type):  # timm's own classes stand for ours
            name = next((n for n, c in FEATURE_CLASSES.items() if feature_cls in c.__mro__), None)
        if name not in FEATURE_CLASSES:
            raise ValueError(
                f"feature_cls is {feature_cls!r}: one of {list(FEATURE_CLASSES)} is taken"
            )
        feature_cls = FEATURE_CLASSES[name]
        feature_cfg = dict(out_indices=tuple(sorted(order)), feature_cls=feature_cls)
        if issubclass(feature_cls, (FeatureDictNet, FeatureHookNet)):
            feature_cfg["flatten_sequential"] = True
    model = build_model_with_cfg(
        _Constructor(registered),
        registered.name,
        pretrained,
        feature_cfg=feature_cfg,
        pretrained_filter_fn=_Filter(registered),
        pretrained_strict=False,
        **kwargs,
    )
    if order is None:
        model.pretrained_cfg["classifier"] = model.classifier_names()
    else:
        in_chans = {**registered.arguments, **kwargs}.get("in_chans", 3)
        model.prepare(order, in_chans)
    return model


@dataclass(frozen=True)
class _Constructor:
    """Build the model on a device in a dtype, which no family needs to handle."""

    registered: Registered

    def __call__(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> HierarchicalBackbone:
        arguments = {**self.registered.arguments, **kwargs}
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype is {dtype!r}: a floating-point torch.dtype is taken")
        if device is not None:
            try:
                torch.empty(0, device=device)
            except (RuntimeError, AssertionError, TypeError) as error:
                reason = str(error).splitlines()[0]
                raise ValueError(f"device is {device!r}, which can't be used: {reason}") from error
        if device is None:
            model = self.registered.cls(**arguments)
        else:
            with torch.device(device):
                model = self.registered.cls(**arguments)
        return model.to(dtype=dtype) if dtype is not None else model


@dataclass(frozen=True)
class _Filter:
    """timm's checkpoint filter: key mapping, with a report of what was loaded."""

    registered: Registered

    def __call__(
        self, state_dict: Mapping[str, Any], model: HierarchicalBackbone
    ) -> dict[str, torch.Tensor]:
        cfg = model.pretrained_cfg
        cfg.pop("state_dict", None)  # the model would keep, copy and pickle what it was read from
        try:
            mapped, report = convert_checkpoint(
                state_dict,
                model,
                self.registered.key_rules,
                first_conv=self.registered.weights.first_conv,
                in_chans=cfg["input_size"][0],
            )
        except ValueError as error:
            raise WeightsError(f"{self.registered.name}: {error}") from None
        log_report(report, self.registered.name)
        own = model.state_dict()
        head = [k for k in mapped if k in own and k.startswith("head.")]
        if head and all(mapped[k].shape == own[k].shape for k in head):
            # timm drops a classifier whose number of classes is not the registered one.
            cfg["num_classes"] = model.num_classes
        return {
            k: v
            for k, v in mapped.items()
            if k in own and (v.shape == own[k].shape or k not in head)
        }


def _find_tagged(registered: Registered, cfg: str | Mapping | PretrainedCfg | None) -> Weights:
    """Find the weights that a tag means, or the tag within a configuration of timm."""
    if isinstance(cfg, str) and cfg not in registered.tags:
        known = ", ".join(tag for tag in registered.tags if tag)
        there_are = f", and there are {known}" if known else ""
        raise ValueError(
            f"unknown weights tag {cfg!r} of {registered.name}: the name alone is enough{there_are}"
        )
    tag = cfg.get("tag") if isinstance(cfg, Mapping) else getattr(cfg, "tag", cfg)
    return registered.tags.get(tag, registered.weights)


def _read_weights(registered: Registered, weights: Weights, kwargs: dict[str, Any]) -> None:
    """Read a file or URL of weights with the zoo's reader, for timm to take the result.

    timm's own reading executes nothing either, but refuses more (an `argparse.Namespace` from a
    URL, mmengine's histories) and says less. Folders, and files of a hub that a caller names, are
    left to timm.
    """
    cfg = kwargs.get("pretrained_cfg")
    if not isinstance(cfg, (dict, PretrainedCfg)):
        name = f"{registered.name}.{cfg}" if cfg else registered.name
        cfg = get_pretrained_cfg(name) or PretrainedCfg()
    cfg = cfg if isinstance(cfg, PretrainedCfg) else PretrainedCfg(**cfg)
    overlay = kwargs.get("pretrained_cfg_overlay") or {}
    cfg = replace(cfg, **overlay)
    if not (cfg.has_weights or cfg.state_dict or weights.files):
        raise WeightsError(
            f"no weights of {registered.name} are published: train it, or name a file of your own "
            "by pretrained=True, pretrained_cfg_overlay=dict(file='FILE')"
        )
    if not (cfg.has_weights or cfg.state_dict):
        raise WeightsError(
            f"the weights of {registered.name} have no direct link. Download one of "
            f"{', '.join(weights.files)} (listed at {weights.page}), then "
            f"pass pretrained=True, pretrained_cfg_overlay=dict(file='DOWNLOADED_FILE')"
        )
    if cfg.state_dict or cfg.source in ("hf-hub", "local-dir"):
        return
    path, cache_dir = cfg.file, kwargs.get("cache_dir")
    if not path and cfg.url and not cfg.hf_hub_id:
        path = download_checkpoint(cfg.url, cache_dir=cache_dir)
    if path:
        state = unwrap_nesting(read_checkpoint(path), registered.cls.checkpoint_nests)
    elif cfg.hf_hub_filename:
        return
    else:
        state = _read_hub(registered.name, cfg.hf_hub_id, cache_dir)
    kwargs["pretrained_cfg_overlay"] = {**overlay, "state_dict": state}


def _read_hub(name: str, hub_id: str, cache_dir: str | Path | None) -> dict[str, torch.Tensor]:
    """Read the weights of the model `name` from the Hugging Face hub, or from its cache.

    Raises:
        OSError: they can't be downloaded.
    """
    try:
        return load_state_dict_from_hf(hub_id, cache_dir=cache_dir)
    except OSError as error:
        reason = str(error).strip().split("\n")[0]
        raise OSError(
            f"the weights of {name}, huggingface.co/{hub_id}, can't be downloaded ({reason}): "
            "download model.safetensors from there by other means, then pass "
            "pretrained=True, pretrained_cfg_overlay=dict(file='DOWNLOADED_FILE')"
        ) from error


def create_with_weights(
    model_name: str, checkpoint: Mapping[str, Any], arguments: Mapping[str, Any]
) -> nn.Module:
    """Build a model of the zoo or of timm with the weights of a loaded checkpoint.

    Args:
        model_name: as `timm.create_model` takes it.
        checkpoint: what `read_checkpoint` returned, in any layout that the model's own loading
            knows, or the model's own state dict.
        arguments: further arguments of `timm.create_model`.

    Raises:
        ValueError: the checkpoint is of another model.
    """
    if find_backbone(model_name):
        overlay = dict(state_dict=dict(checkpoint))
        return timm.create_model(
            model_name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments
        )
    state = strip_prefixes(unwrap_nesting(checkpoint))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        fresh = timm.create_model(model_name, **arguments)
        own = fresh.state_dict()
        prefix = next((p for p in ("model.", "body.") if all(k.startswith(p) for k in own)), "")
        heads = fresh.pretrained_cfg.get("classifier") or ()
        heads = (heads,) if isinstance(heads, str) else tuple(heads)
        known = {prefix + k: v for k, v in state.items() if prefix + k in own}
        fitting = {k: v for k, v in known.items() if v.shape == own[k].shape}
        # Where another shape than the classifier's differs, timm may know how to fit it.
        if 2 * len(fitting) >= len(own) and all(
            k.startswith(heads) for k in known.keys() - fitting
        ):
            fresh.load_state_dict(fitting, strict=False)
            return fresh
        # timm loads nothing without a word where no name fits. With one seed, that no file was
        # made with, the two models differ in what the file held.
        torch.manual_seed(_SEED)
        overlay = dict(state_dict=state, url="", hf_hub_id=None)
        try:
            model = timm.create_model(
                model_name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments
            )
        except (RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise WeightsError(f"the checkpoint is not one of {model_name}: {reason}") from error
    pairs = zip(fresh.parameters(), model.parameters(), strict=True)
    changed = [not torch.equal(one, two) for one, two in pairs if one.ndim > 1]
    if 2 * sum(changed) < len(changed):
        raise WeightsError(
            f"the checkpoint is not one of {model_name}: {sum(changed)} of {len(changed)} of its "
            "matrices and kernels are in it"
        )
    return model


def register_in_mmengine(registry: Any, name: str | None = None) -> Callable[[Part], Part]:
    """Make a decorator that registers a class or a function in a registry of mmengine.

    Args:
        registry: one of mmengine's root registries.
        name: the name in configs; that of the class when None.

    Raises:
        KeyError: another package has registered the name. What densezoo itself registered, in a
            module that is loaded anew, is replaced.
    """

    def register(part: Part) -> Part:
        known = registry.module_dict.get(name or part.__name__)
        is_ours = known is not None and known.__module__.startswith("densezoo.")
        registry.register_module(name=name, module=part, force=is_ours)
        return part

    return register

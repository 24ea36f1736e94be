"""Registration of the zoo's models: the only code that touches timm's and mmengine's registries."""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    is_model,
    list_models,
    register_model,
)
from timm.models._pretrained import PretrainedCfg
from timm.models._registry import get_pretrained_cfg
from torch import nn

from .base import FEATURE_CLASSES, HierarchicalBackbone, absolute_indices
from .checkpoints import KeyRules, convert_checkpoint, log_report

_logger = logging.getLogger(__name__)


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
        files: where the page keeps them.
        url: direct link, where there is one that a program can download.
        sha256: SHA-256 of the file, where known.
        license: licence of the weights, an SPDX name in lower case.
        input_size: channels, height and width, pixels.
        first_conv: name of the convolution that takes the image.
        classifier: names of the linear classifiers.
    """

    page: str
    files: tuple[str, ...] = ()
    url: str | None = None
    sha256: str | None = None
    license: str = ""
    paper_name: str = ""
    paper_ids: str = ""
    input_size: tuple[int, int, int] = (3, 224, 224)
    crop_pct: float = 0.875
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    num_classes: int = 1000
    first_conv: str = "stem.conv1"
    classifier: str | tuple[str, ...] = "head.fc"
    published: Published = Published()

    def pretrained_cfg(self, stride: int = 32) -> PretrainedCfg:
        """Give the same as timm's pretrained_cfg."""
        notes = [f"file: {file}" for file in self.files]
        notes += [f"sha256: {self.sha256}"] if self.sha256 else []
        return PretrainedCfg(
            url=self.url,
            source=self.page,
            input_size=self.input_size,
            crop_pct=self.crop_pct,
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
    """A model of the zoo: its class, constructor arguments, weights and key rules."""

    name: str
    cls: type[HierarchicalBackbone]
    arguments: Mapping[str, Any]
    weights: Weights
    key_rules: Mapping[str, KeyRules]


BACKBONES: dict[str, Registered] = {}


class WeightsError(RuntimeError, ValueError):
    """Weights that cannot be had; a RuntimeError as timm raises for it, and a ValueError."""


def list_backbones() -> list[str]:
    """List the names of the zoo's models, as `timm.create_model` takes them."""
    return sorted(BACKBONES)


def check_model_name(name: str) -> None:
    """Raise a ValueError that suggests near names unless timm knows the model `name`."""
    base = name.split(".")[0]
    if ":" in name or is_model(base):
        return
    near = difflib.get_close_matches(base, list_backbones(), n=3, cutoff=0.5)
    near += difflib.get_close_matches(base, list_models(), n=3, cutoff=0.7)
    hint = f"did you mean {', '.join(dict.fromkeys(near))}?" if near else "see `densezoo list`"
    raise ValueError(f"unknown model {name!r}: {hint}")


def register_backbones(
    module_name: str,
    cls: type[HierarchicalBackbone],
    variants: Mapping[str, Mapping[str, Any]],
    weights: Mapping[str, Weights],
    key_rules: Mapping[str, KeyRules],
) -> None:
    """Register a family's variants in timm. A name that timm has already is left to timm.

    Args:
        module_name: `__name__` of the family's module, which gets an entry point a variant.
        cls: the backbone class.
        variants: constructor arguments by name.
        weights: published weights by name.
        key_rules: (pattern, replacement) pairs by checkpoint dialect.
    """
    module = sys.modules[module_name]
    module.default_cfgs = generate_default_cfgs(
        {name: weights[name].pretrained_cfg() for name in variants}
    )
    for name, arguments in variants.items():
        if is_model(name):
            _logger.info("timm has a model %s of its own, which is left in place", name)
            continue
        BACKBONES[name] = Registered(name, cls, arguments, weights[name], key_rules)
        entry = _make_entry_point(BACKBONES[name], module_name)
        setattr(module, name, entry)
        register_model(entry)


def _make_entry_point(registered: Registered, module_name: str) -> Callable[..., nn.Module]:
    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _build(registered, pretrained, **kwargs)

    entry.__name__ = entry.__qualname__ = registered.name
    entry.__module__ = module_name
    entry.__doc__ = f"{registered.cls.__name__} {dict(registered.arguments)}."
    return entry


def _build(registered: Registered, pretrained: bool, **kwargs: Any) -> nn.Module:
    """Build a model as timm does, in a `feature_cls` of ours with features_only=True."""
    if pretrained:
        _check_weights_source(registered, kwargs)
    feature_cfg, order = {}, None
    if kwargs.get("features_only", False):
        num_stages = len(registered.arguments.get("depths", (0,) * 4))
        order = absolute_indices(kwargs.pop("out_indices", None), num_stages)
        name = kwargs.pop("feature_cls", "getter")
        if isinstance(name, str) and name not in FEATURE_CLASSES:
            raise ValueError(f"feature_cls is {name!r}: one of {list(FEATURE_CLASSES)} is taken")
        feature_cfg = dict(
            out_indices=tuple(sorted(order)),
            feature_cls=FEATURE_CLASSES[name] if isinstance(name, str) else name,
            flatten_sequential=True,
        )
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
    elif hasattr(model, "reorder"):
        model.reorder(order)
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
        try:
            mapped, report = convert_checkpoint(state_dict, model, self.registered.key_rules)
        except ValueError as error:
            raise WeightsError(f"{self.registered.name}: {error}") from None
        log_report(report, self.registered.name)
        own = model.state_dict()
        return {
            k: v
            for k, v in mapped.items()
            if k in own and (v.shape == own[k].shape or not k.startswith("head."))
        }


def _check_weights_source(registered: Registered, kwargs: Mapping[str, Any]) -> None:
    cfg = kwargs.get("pretrained_cfg")
    if not isinstance(cfg, (dict, PretrainedCfg)):
        name = f"{registered.name}.{cfg}" if cfg else registered.name
        cfg = get_pretrained_cfg(name) or PretrainedCfg()
    cfg = cfg if isinstance(cfg, PretrainedCfg) else PretrainedCfg(**cfg)
    cfg = replace(cfg, **(kwargs.get("pretrained_cfg_overlay") or {}))
    if not (cfg.has_weights or cfg.state_dict):
        raise WeightsError(
            f"the weights of {registered.name} have no direct link. Download one of "
            f"{', '.join(registered.weights.files)} (listed at {registered.weights.page}), then "
            f"pass pretrained=True, pretrained_cfg_overlay=dict(file='DOWNLOADED_FILE')"
        )


def register_in_mmengine(registry: Any, classes: Sequence[type]) -> None:
    """Register classes in one of mmengine's root registries, once, by their names."""
    for cls in classes:
        if registry.get(cls.__name__) is None:
            registry.register_module(module=cls)

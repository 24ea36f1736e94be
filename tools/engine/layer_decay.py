"""Layer-wise learning-rate decay for classifiers, detectors and segmenters, on timm's groups."""

from __future__ import annotations

import difflib
from fnmatch import fnmatch

import timm
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIMIZERS
from timm.models import group_parameters
from torch import nn
from torch.optim import Optimizer

from ...backbones.registry import register_in_mmengine
from ...layers.arguments import check_flag, check_number

_OWN_KEYS = ("layer_decay", "min_scale", "weight_decay_exclude_1d")
_KEYS_OF_MMENGINE = (
    "custom_keys",
    "bias_lr_mult",
    "bias_decay_mult",
    "norm_decay_mult",
    "flat_decay_mult",
    "dwconv_decay_mult",
    "dcn_offset_lr_mult",
    "bypass_duplicate",
)


def _dotted(name: str) -> str:
    """Spell a parameter's name so that timm's flattened ``stages_0`` equals ``stages.0``."""
    return name.replace("_", ".")


def whole_classifier(backbone: nn.Module) -> nn.Module:
    """Return the timm classifier whose layers a backbone has: itself, or a ``DenseBackbone``'s."""
    if hasattr(backbone, "group_matcher"):
        return backbone
    return timm.create_model(backbone.model_name, **backbone.model_kwargs)


def layer_scales(
    backbone: nn.Module, classifier: nn.Module, layer_decay: float
) -> dict[str, float]:
    """Compute the factor of the learning rate of each parameter of a backbone.

    The layers are those of the whole classifier of timm, in which the head is the last one with
    factor 1 and each layer before it has `layer_decay` times the factor of the next; so a dense
    backbone's parameter has the factor that it has in the classifier, and a parameter that the
    classifier lacks (norms of the outputs) has factor 1.

    Args:
        backbone: a timm model, or a ``DenseBackbone``.
        classifier: what :func:`whole_classifier` returns for it.
        layer_decay: between 0 and 1.

    Returns:
        Parameter name, as in ``backbone.named_parameters()`` -> factor.
    """
    layers = group_parameters(classifier, classifier.group_matcher(coarse=False), reverse=True)
    last = max(layers.values())
    factors = {_dotted(name): layer_decay ** (last - layer) for name, layer in layers.items()}

    scales = {}
    for name, _ in backbone.named_parameters():
        parts = _dotted(name).split(".")
        # A dense backbone holds the model under an attribute or two.
        tails = (".".join(parts[start:]) for start in range(len(parts)))
        scales[name] = next((factors[tail] for tail in tails if tail in factors), 1.0)
    return scales


@register_in_mmengine(OPTIM_WRAPPER_CONSTRUCTORS)
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Build an optimizer whose learning rate falls from the head towards the stem.

    Works for any model with an attribute `backbone`: ``ImageClassifier``, whose groups then equal
    ``timm.optim.param_groups_layer_decay``, and mmdet's and mmseg's models with ``DenseBackbone``,
    where necks and heads have factor 1. Parameters of equal settings share one group.

    `paramwise_cfg` takes, beside everything that mmengine's default constructor takes
    (`custom_keys` with `lr_mult` and `decay_mult`, `norm_decay_mult`, `bias_lr_mult`, ...):

    - `layer_decay`: factor between one layer and the next, 1.0 for none. The factor of the layer
      multiplies the learning rate that mmengine's rules give.
    - `min_scale`: lower bound of the factor, default 0.
    - `weight_decay_exclude_1d`: no weight decay on parameters of one dimension or none, and on
      those that the backbone's ``no_weight_decay()`` names; default True, as in timm. A rule of
      mmengine that sets a parameter's weight decay goes before this one.

    Raises:
        ValueError: if `layer_decay` is not in (0, 1], a key is unknown (mmengine's own constructor
            passes over it), or the model has no backbone.
    """

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer wrapper of `model`, which may be wrapped for distributed training."""
        # mmengine calls add_params only for a paramwise_cfg that is not empty.
        self.paramwise_cfg = {"layer_decay": 1.0, **self.paramwise_cfg}
        known = (*_OWN_KEYS, *_KEYS_OF_MMENGINE)
        for key in self.paramwise_cfg:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=2) or known
                raise ValueError(
                    f"paramwise_cfg.{key} is not known; did you mean {', '.join(near)}?"
                )
        self.layer_decay = self.paramwise_cfg["layer_decay"]
        if type(self.layer_decay) not in (int, float) or not 0 < self.layer_decay <= 1:
            raise ValueError(
                f"paramwise_cfg.layer_decay={self.layer_decay!r} is not a number in (0, 1]"
            )
        check_number("paramwise_cfg.min_scale", self.paramwise_cfg.get("min_scale", 0.0), 0, 1)
        check_flag(
            "paramwise_cfg.weight_decay_exclude_1d",
            self.paramwise_cfg.get("weight_decay_exclude_1d", True),
        )
        return super().__call__(model)

    def add_params(
        self, params: list[dict], module: nn.Module, prefix: str = "", is_dcn_module=None
    ) -> None:
        """Add the groups of `module`, the whole model when `prefix` is empty, to `params`."""
        if prefix:
            super().add_params(params, module, prefix, is_dcn_module)
            return
        if not hasattr(module, "backbone"):
            raise ValueError(f"{type(module).__name__} has no backbone to decay the layers of")
        backbone = module.backbone
        classifier = whole_classifier(backbone)
        parameters = dict(backbone.named_parameters())
        floor = self.paramwise_cfg.get("min_scale", 0.0)
        scales = {
            id(parameters[name]): max(floor, scale)
            for name, scale in layer_scales(backbone, classifier, self.layer_decay).items()
        }
        undecayed = set()
        if self.paramwise_cfg.get("weight_decay_exclude_1d", True):
            undecayed = {id(parameter) for parameter in module.parameters() if parameter.ndim <= 1}
            no_weight_decay = getattr(classifier, "no_weight_decay", tuple)()
            for name, parameter in backbone.named_parameters():
                dotted = f".{_dotted(name)}"
                if any(fnmatch(dotted, f"*.{_dotted(pattern)}") for pattern in no_weight_decay):
                    undecayed.add(id(parameter))

        single: list[dict] = []
        super().add_params(single, module, prefix, is_dcn_module)
        groups: dict[tuple, dict] = {}
        for group in single:
            parameter = group["params"][0]
            scale = scales.get(id(parameter), 1.0)
            group["lr"] = group.get("lr", self.base_lr) * scale
            group["lr_scale"] = scale
            if self.base_wd is not None:
                default = 0.0 if id(parameter) in undecayed else self.base_wd
                group.setdefault("weight_decay", default)
            settings = tuple(
                sorted((key, value) for key, value in group.items() if key != "params")
            )
            groups.setdefault(settings, {**group, "params": []})["params"].append(parameter)
        params.extend(groups.values())


@register_in_mmengine(OPTIMIZERS, "TimmOptimizer")
def timm_optimizer(params: list[dict], opt: str, lr: float, **options) -> Optimizer:
    """Build any optimizer of timm by its name, for example ``dict(type="TimmOptimizer",
    opt="lamb", lr=5e-3, weight_decay=0.05)``; `timm.optim.list_optimizers` lists the names.

    Raises:
        ValueError: if timm has no optimizer of that name.
    """
    from timm.optim import create_optimizer_v2, list_optimizers

    if not isinstance(opt, str) or opt.lower() not in list_optimizers():
        raise ValueError(f"opt={opt!r} is not an optimizer of timm: {', '.join(list_optimizers())}")
    return create_optimizer_v2(params, opt=opt, lr=lr, **options)

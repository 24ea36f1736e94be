"""The model whose insides are shown: built from a name or a config, and what its images become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.layers import to_2tuple
from torch import nn

from ..backbones.base import HierarchicalBackbone
from ..backbones.checkpoints import read_checkpoint
from ..backbones.registry import check_model_name, create_with_weights, find_backbone
from .count_macs import first_line
from .model_arguments import read_model_arguments
from .read_images import UnusableImage

_SEED = 0  # of random weights
_MAX_PIXELS = 2**26  # of a resized image


@dataclass
class Subject:
    """A model, ready to be looked at.

    Attributes:
        name: model or config, as the user gave it.
        title: the name, with the arguments or options that the user gave.
        model: (1, 3, H, W) to the maps of its stages, in evaluation mode, its weights frozen.
        backbone: the model of densezoo; None where it is timm's own.
        strides: of the stages' maps, pixels.
        weights: what the weights are, in a few words.
        size: height and width that the weights are made for, pixels.
        is_fixed: whether images of that size alone are taken.
        mean: of images of values 0 to 1, by channel (red, green, blue).
        std: the same.
        device: where the model is.
    """

    name: str
    title: str
    model: nn.Module
    backbone: HierarchicalBackbone | None
    strides: Sequence[int]
    weights: str
    size: tuple[int, int]
    is_fixed: bool
    mean: Sequence[float]
    std: Sequence[float]
    device: str

    @property
    def stages(self) -> Sequence[nn.Module]:
        """The stages of densezoo's model."""
        return self.backbone.stages

    def maps(self, batch: torch.Tensor) -> list[torch.Tensor]:
        """Compute the map of each stage, (1, C, H / stride, W / stride)."""
        if self.backbone is not None:
            return self.backbone.forward_intermediates(batch, intermediates_only=True)
        return self.model(batch)

    def check_size(self, size: Sequence[int] | None) -> None:
        """Raise a ValueError where images of another size than `size` alone are taken."""
        if size is not None and self.is_fixed and (size[0], size[-1]) != self.size:
            height, width = self.size
            raise ValueError(
                f"{self.name} takes images of {height}x{width} pixels alone: leave --size out, or "
                f"give --model-kwargs img_size=({size[0]},{size[-1]}) too"
            )

    def resized(self, width: int, height: int, size: Sequence[int] | None) -> tuple[int, int]:
        """Say to which height and width an image goes.

        Args:
            width, height: of the image, pixels.
            size: its height and width then, or its shorter side (the other one in proportion), or
                None for the shorter side of the images that the weights are made for. A model
                that takes one size alone gets that, whatever the proportions.

        Raises:
            UnusableImage: the image is too narrow for that.
        """
        if self.is_fixed:
            return self.size
        if size is not None and len(size) == 2:
            return tuple(size)
        short = min(self.size) if size is None else size[0]
        if short**2 * max(width, height) / min(width, height) > _MAX_PIXELS:
            raise UnusableImage(
                f"{width}x{height} pixels are too narrow to be enlarged to a shorter side of "
                f"{short} pixels; cut the image, or give --size H W"
            )
        scale = short / min(width, height)
        return max(1, round(height * scale)), max(1, round(width * scale))

    def batch(self, image: Image.Image) -> torch.Tensor:
        """Make an RGB image of the right size the model's input, (1, 3, H, W)."""
        values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        values = values.view(1, image.height, image.width, 3).permute(0, 3, 1, 2) / 255
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return ((values - mean) / std).contiguous().to(self.device)


def build_subject(
    name: str,
    *,
    weights: str | None = None,
    model_kwargs: Sequence[str] = (),
    cfg_options: Sequence[str] = (),
    device: str = "cpu",
) -> Subject:
    """Build the model of a name or a config, and load its weights.

    Args:
        name: a model of densezoo, or of timm that gives its stages' maps, or a config's path or
            name; of a config, the backbone.
        weights: a checkpoint in a layout that the model's loading knows; None for random weights.
        model_kwargs: ``KEY=VALUE`` arguments of the model, for a name.
        cfg_options: ``KEY=VALUE`` options of a config.
        device: where the model goes.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ImportError: a config needs mmengine, which is missing.
        ValueError: there is no such model, it can't be built so, or the weights are another's.
    """
    model_name, arguments, statistics = _resolve(name, model_kwargs, cfg_options)
    registered = find_backbone(model_name)
    if registered is None:
        arguments = dict(arguments, features_only=True)
    if weights is None:
        checkpoint = None
        described = f"random weights (seed {_SEED})"
    else:
        checkpoint, described = read_checkpoint(weights), f"weights {Path(weights).name}"
    torch.manual_seed(_SEED)
    try:
        if checkpoint is None:
            model = timm.create_model(model_name, **arguments)
        else:
            model = create_with_weights(model_name, checkpoint, arguments)
    except (RuntimeError, TypeError, AssertionError, AttributeError, KeyError) as error:
        if isinstance(error, (ValueError, OSError)):
            raise
        words = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        built_with = f" with {words}" if words else ""
        raise ValueError(f"{model_name} can't be built{built_with}: {first_line(error)}") from error
    config = model.pretrained_cfg
    backbone = None
    if registered is not None:
        backbone = next(m for m in model.modules() if isinstance(m, HierarchicalBackbone))
    return Subject(
        name=name,
        title=" ".join([name, *model_kwargs, *cfg_options]),
        model=model.to(device).eval().requires_grad_(False),
        backbone=backbone,
        strides=backbone.strides if backbone else model.feature_info.reduction(),
        weights=described,
        size=to_2tuple(arguments.get("img_size", config["input_size"][1:])),
        is_fixed=bool(config.get("fixed_input_size")),
        **(statistics or dict(mean=config["mean"], std=config["std"])),
        device=device,
    )


def _resolve(
    name: str, model_kwargs: Sequence[str], cfg_options: Sequence[str]
) -> tuple[str, dict[str, Any], dict[str, Any] | None]:
    """Find what timm is to build: a model's name, its arguments, the images' mean and std."""
    if not timm.is_model(name.split(".")[0]) and _is_config(name):
        if model_kwargs:
            raise ValueError(
                "--model-kwargs goes with the name of a model; change a config with --cfg-options"
            )
        return _read_config(name, cfg_options)
    check_model_name(name)
    if cfg_options:
        raise ValueError(
            f"--cfg-options changes a config, and {name} is a model: use --model-kwargs"
        )
    return name, read_model_arguments(model_kwargs), None


def _is_config(name: str) -> bool:
    """Whether a word that names no model is a config's path, or the name of one."""
    path = Path(name)
    if path.suffix in (".py", ".json", ".yaml", ".yml") or path.exists():
        return True
    try:
        from .engine.config_files import shipped_configs
    except ImportError:
        return False
    return name in shipped_configs()


def _read_config(
    config: str, cfg_options: Sequence[str]
) -> tuple[str, dict[str, Any], dict[str, Any] | None]:
    """Find the backbone of a config, as `_resolve` gives it."""
    try:
        from .engine.config_files import load_config
    except ImportError as error:
        raise ImportError("a config needs mmengine: pip install 'densezoo[openmmlab]'") from error
    model = load_config(config, cfg_options).get("model", {})
    backbone = model if "model_name" in model else model.get("backbone", {})
    if not isinstance(backbone, Mapping) or "model_name" not in backbone:
        raise ValueError(
            f"the backbone of {config} has no model_name: models of densezoo and timm are shown"
        )
    check_model_name(backbone["model_name"])
    arguments = dict(backbone.get("model_kwargs") or {})
    if backbone is not model:
        arguments["features_only"] = True
    preprocessor = model.get("data_preprocessor") or {}
    statistics = None
    if "mean" in preprocessor:
        statistics = {key: [v / 255 for v in preprocessor[key]] for key in ("mean", "std")}
    return backbone["model_name"], arguments, statistics

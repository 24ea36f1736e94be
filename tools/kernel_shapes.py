"""The shapes that operators meet in the published models: what ``densezoo bench-kernels`` times.

They are read off the registered models themselves, built without memory for their weights.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import timm
import torch
from torch import nn

from ..backbones import list_backbones
from ..layers.mlp import Mlp
from ..layers.neighborhood_attention import NeighborhoodAttention
from .count_macs import input_size

# Image sizes of the dense recipes, and their values of the models' argument `dilations`, which is
# for models that dilate.
DETECTION = ((800, 1333), "coco")
SEGMENTATION = ((512, 512), "ade20k")
SEGMENTATION_OF_LARGE = ((640, 640), "ade20k_640")
MASK2FORMER = ((640, 640), "mask2former")
ANOTHER_SIZE = (512, 672)  # neither square nor what the weights are made for


@dataclass(frozen=True, order=True)
class NeighborhoodShape:
    """Neighborhood attention in a layer of a model.

    Attributes:
        size: height and width of the map, positions, after padding to the windows.
        num_heads: heads.
        head_dim: channels of a head.
        kernel_size: keys of a window along each axis.
        dilation: positions from a key of a window to the next.
    """

    size: tuple[int, int]
    num_heads: int
    head_dim: int
    kernel_size: int
    dilation: int

    @property
    def name(self) -> str:
        height, width = self.size
        heads = f"h{self.num_heads}x{self.head_dim}"
        return f"{height}x{width}-{heads}-k{self.kernel_size}-d{self.dilation}"

    @property
    def num_tokens(self) -> int:
        return self.size[0] * self.size[1]

    def count_macs(self, batch: int) -> int:
        """Count the multiply-accumulates of a forward pass: logits and values."""
        channels = self.num_heads * self.head_dim
        return 2 * batch * self.num_tokens * self.kernel_size**2 * channels


@dataclass(frozen=True)
class Run:
    """A model as its published results were made, at an image size.

    Attributes:
        model: registered name.
        size: height and width of the image, pixels.
        dilations: the preset in place of the model's own.
        kernel_size: in place of the model's own.
    """

    model: str
    size: tuple[int, int]
    dilations: str | None = None
    kernel_size: int | None = None

    @property
    def name(self) -> str:
        preset = f":{self.dilations}" if self.dilations else ""
        return f"{self.model}@{self.size[0]}x{self.size[1]}{preset}"


def list_neighborhood_runs() -> list[Run]:
    """List what the published results of NAT, DiNAT and DiNAT_s were made with.

    Every classifier at the size of its weights and, if that is 224x224, at one more; detection,
    segmentation and Mask2Former with their dilations.
    """
    runs = []
    for name in list_backbones():
        if not re.match("nat_|dinat_", name):
            continue
        size = input_size(name)[1:]
        runs.append(Run(name, size))
        if size != (224, 224) or "isotropic" in name:
            continue
        runs.append(Run(name, ANOTHER_SIZE))
        segmentation = SEGMENTATION_OF_LARGE if name.endswith("_large") else SEGMENTATION
        for dense_size, preset in (DETECTION, segmentation):
            runs.append(Run(name, dense_size, preset if name.startswith("dinat_") else None))
    return [*runs, Run("dinat_large", *MASK2FORMER, kernel_size=11)]


def list_neighborhood_shapes(
    runs: Sequence[Run],
) -> dict[NeighborhoodShape, tuple[str, ...]]:
    """List every distinct shape of neighborhood attention, with the names of runs that meet it.

    Shapes come in order of the runs, and of the layers within.
    """
    users: dict[NeighborhoodShape, list[str]] = {}
    for run in runs:
        for shape in dict.fromkeys(_read_shapes(run)):
            users.setdefault(shape, []).append(run.name)
    return {shape: tuple(names) for shape, names in users.items()}


@functools.cache
def _build(model: str, dilations: str | None, kernel_size: int | None) -> nn.Module:
    """Build a model without memory for its weights, whose layers pass on sizes of maps alone."""
    changes = dict(dilations=dilations, kernel_size=kernel_size)
    with torch.device("meta"):
        built = timm.create_model(model, **{k: v for k, v in changes.items() if v is not None})
    for layer in built.modules():
        if isinstance(layer, (NeighborhoodAttention, Mlp, nn.LayerNorm)):
            layer.forward = lambda x: x
    return built.eval()


def _read_shapes(run: Run) -> list[NeighborhoodShape]:
    """List the shapes of a model's attention layers, in order of execution."""
    shapes = []

    def read(layer: NeighborhoodAttention, inputs: tuple[torch.Tensor, ...]) -> None:
        _, height, width, channels = inputs[0].shape
        least = layer.kernel_size * layer.dilation  # to which the layer pads
        shapes.append(
            NeighborhoodShape(
                (max(height, least), max(width, least)),
                layer.num_heads,
                channels // layer.num_heads,
                layer.kernel_size,
                layer.dilation,
            )
        )

    model = _build(run.model, run.dilations, run.kernel_size)
    layers = [layer for layer in model.modules() if isinstance(layer, NeighborhoodAttention)]
    hooks = [layer.register_forward_pre_hook(read) for layer in layers]
    with torch.inference_mode():
        model(torch.empty(1, 3, *run.size, device="meta"))
    for hook in hooks:
        hook.remove()
    return shapes

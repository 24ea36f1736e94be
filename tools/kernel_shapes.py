"""The shapes that operators meet in the published models: what ``densezoo bench-kernels`` times.

They are read off the registered models themselves, built without memory for their weights.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import timm
import torch
from torch import nn

from ..backbones import list_backbones
from ..backbones.ppma import DepthwiseMlp
from ..layers.depthwise import ResidualDepthwise
from ..layers.mlp import Mlp
from ..layers.neighborhood_attention import NeighborhoodAttention
from ..layers.polyline_attention import PolylineAttention
from ..layers.routing_attention import RoutingAttention
from .count_macs import input_size

Shape = TypeVar("Shape")

# Image sizes of the dense recipes, and their values of the models' argument `dilations`, which is
# for models that dilate.
DETECTION = ((800, 1333), "coco")
SEGMENTATION = ((512, 512), "ade20k")
SEGMENTATION_OF_LARGE = ((640, 640), "ade20k_640")
MASK2FORMER = ((640, 640), "mask2former")
ANOTHER_SIZE = (512, 672)  # neither square nor what the weights are made for
# Image sizes of BiFormer beside that of its weights, with regions along an axis of its maps: those
# of COCO, twice, and ADE20K.
ROUTED_SIZES = ((ANOTHER_SIZE, 16), ((512, 512), 8), ((800, 1216), 16))
# Image sizes of PPMA and RMT beside that of their weights: those of COCO, ADE20K and Cityscapes are
# the last three.
POLYLINE_SIZES = (ANOTHER_SIZE, (800, 1216), (512, 512), (1024, 1024))
# Sides of square images from the size of the weights to that of Cityscapes: over these, times are
# fitted to numbers of tokens.
SQUARES = (224, 320, 448, 576, 704, 832, 1024)


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


@dataclass(frozen=True, order=True)
class RoutingShape:
    """Routing attention in a layer of a model.

    Attributes:
        size: height and width of the map, tokens.
        num_heads: heads.
        head_dim: channels of a head.
        num_regions: regions along each axis.
        region_size: tokens of a region along each axis.
        topk: regions that a region attends to.
    """

    size: tuple[int, int]
    num_heads: int
    head_dim: int
    num_regions: tuple[int, int]
    region_size: tuple[int, int]
    topk: int

    @property
    def name(self) -> str:
        height, width = self.size
        rows, columns = self.num_regions
        regions = f"s{rows}" if rows == columns else f"s{rows}x{columns}"
        return f"{height}x{width}-h{self.num_heads}x{self.head_dim}-{regions}-k{self.topk}"

    @property
    def num_tokens(self) -> int:
        return self.size[0] * self.size[1]

    @property
    def region_area(self) -> int:
        """Tokens of a region, padded ones included."""
        return self.region_size[0] * self.region_size[1]

    @property
    def padded_size(self) -> tuple[int, int]:
        """Height and width of all regions together, tokens."""
        rows, columns = self.num_regions
        return rows * self.region_size[0], columns * self.region_size[1]

    def count_macs(self, batch: int) -> int:
        """Count the multiply-accumulates of a forward pass: logits and values, padded keys too."""
        channels = self.num_heads * self.head_dim
        return 2 * batch * self.num_tokens * self.topk * self.region_area * channels


@dataclass(frozen=True, order=True)
class PolylineShape:
    """Polyline attention in a layer of a model.

    Attributes:
        size: height and width of the map, tokens.
        num_heads: heads.
        head_dim: channels of a head.
        form: "full" or "axial".
        paths: "both", whose decays are learned (PPMA), or "row_first", whose are fixed (RMT).
    """

    size: tuple[int, int]
    num_heads: int
    head_dim: int
    form: str
    paths: str

    @property
    def name(self) -> str:
        height, width = self.size
        paths = 2 if self.paths == "both" else 1
        return f"{height}x{width}-h{self.num_heads}x{self.head_dim}-{self.form}-p{paths}"

    @property
    def num_tokens(self) -> int:
        return self.size[0] * self.size[1]

    def count_macs(self, batch: int) -> int:
        """Count the multiply-accumulates of a forward pass: logits and values."""
        channels = self.num_heads * self.head_dim
        if self.form == "full":
            return 2 * batch * self.num_tokens**2 * channels
        num_products = 3 if self.paths == "both" else 2
        return num_products * batch * self.num_tokens * sum(self.size) * channels


@dataclass(frozen=True)
class Run:
    """A model as its published results were made, at an image size.

    Attributes:
        model: registered name.
        size: height and width of the image, pixels.
        arguments: names and values of arguments in place of the model's own.
        note: what tells the run from others of the size, for its name.
    """

    model: str
    size: tuple[int, int]
    arguments: tuple[tuple[str, Any], ...] = ()
    note: str = ""

    @property
    def name(self) -> str:
        note = f":{self.note}" if self.note else ""
        return f"{self.model}@{self.size[0]}x{self.size[1]}{note}"


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
            is_dilated = name.startswith("dinat_")
            runs.append(_dilate(name, dense_size, preset) if is_dilated else Run(name, dense_size))
    return [*runs, _dilate("dinat_large", *MASK2FORMER, kernel_size=11)]


def _dilate(model: str, size: tuple[int, int], preset: str, **arguments: int) -> Run:
    """Give the run of a model with a preset of dilations."""
    return Run(model, size, (("dilations", preset), *arguments.items()), preset)


def list_routing_runs() -> list[Run]:
    """List what the published results of BiFormer were made with, and one size more.

    Every classifier at the size of its weights, and with the numbers of regions of detection and
    segmentation.
    """
    runs = []
    for name in list_backbones():
        if name.startswith("biformer_"):
            runs.append(Run(name, input_size(name)[1:]))
            for size, num_regions in ROUTED_SIZES:
                runs.append(Run(name, size, (("num_regions", num_regions),), f"s{num_regions}"))
    return runs


def list_polyline_runs() -> list[Run]:
    """List what the published results of PPMA and RMT were made with, and some sizes more.

    Every model at the size of its weights and at those of the dense recipes; the smallest ones at
    square images of growing sides.
    """
    runs = []
    for name in list_backbones():
        if not name.startswith(("ppma_", "rmt_")):
            continue
        runs += [Run(name, size) for size in (input_size(name)[1:], *POLYLINE_SIZES)]
        if name.endswith("_tiny"):
            runs += [Run(name, (side, side), note="square") for side in SQUARES]
    return runs


def list_neighborhood_shapes(
    runs: Sequence[Run],
) -> dict[NeighborhoodShape, tuple[str, ...]]:
    """List every distinct shape of neighborhood attention, with the names of runs that meet it.

    Shapes come in order of the runs, and of the layers within.
    """

    def read(layer: NeighborhoodAttention, size: tuple[int, int], dim: int) -> NeighborhoodShape:
        least = layer.kernel_size * layer.dilation  # to which the layer pads
        return NeighborhoodShape(
            (max(size[0], least), max(size[1], least)),
            layer.num_heads,
            dim // layer.num_heads,
            layer.kernel_size,
            layer.dilation,
        )

    return _list_shapes(runs, NeighborhoodAttention, read)


def list_routing_shapes(runs: Sequence[Run]) -> dict[RoutingShape, tuple[str, ...]]:
    """List every distinct shape of routing attention, with the names of runs that meet it.

    Shapes come in order of the runs, and of the layers within.
    """

    def read(layer: RoutingAttention, size: tuple[int, int], dim: int) -> RoutingShape:
        sides, counts = [], []
        for length in size:
            if layer.is_ragged:
                sides.append(max(1, length // layer.num_regions))
                counts.append(-(-length // sides[-1]))
            else:
                sides.append(-(-length // layer.num_regions))
                counts.append(layer.num_regions)
        return RoutingShape(
            size,
            layer.num_heads,
            dim // layer.num_heads,
            tuple(counts),
            tuple(sides),
            min(layer.topk, counts[0] * counts[1]),
        )

    return _list_shapes(runs, RoutingAttention, read)


def list_polyline_shapes(runs: Sequence[Run]) -> dict[PolylineShape, tuple[str, ...]]:
    """List every distinct shape of polyline attention, with the names of runs that meet it.

    Shapes come in order of the runs, and of the layers within.
    """

    def read(layer: PolylineAttention, size: tuple[int, int], dim: int) -> PolylineShape:
        return PolylineShape(size, layer.num_heads, dim // layer.num_heads, layer.form, layer.paths)

    return _list_shapes(runs, PolylineAttention, read)


def _list_shapes(
    runs: Sequence[Run],
    layer_class: type[nn.Module],
    read: Callable[[Any, tuple[int, int], int], Shape],
) -> dict[Shape, tuple[str, ...]]:
    """List the shapes that layers of a class meet in models, with the runs that have them.

    Args:
        runs: the models.
        layer_class: of the layers, which take maps (B, H, W, C).
        read: gives the shape of a layer on a map of a size (height, width) and channels.
    """
    users: dict[Shape, list[str]] = {}
    for run in runs:
        shapes = [
            read(layer, tuple(size), dim) for layer, (_, *size, dim) in _list_maps(run, layer_class)
        ]
        for shape in dict.fromkeys(shapes):
            users.setdefault(shape, []).append(run.name)
    return {shape: tuple(names) for shape, names in users.items()}


def _list_maps(run: Run, layer_class: type[nn.Module]) -> list[tuple[nn.Module, torch.Size]]:
    """List a model's layers of a class in order of execution, with the shapes of their maps."""
    maps = []

    def note(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        maps.append((layer, inputs[0].shape))

    model = _build(run.model, run.arguments, layer_class)
    layers = [layer for layer in model.modules() if isinstance(layer, layer_class)]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    with torch.inference_mode():
        model(torch.empty(1, 3, *run.size, device="meta"))
    for hook in hooks:
        hook.remove()
    return maps


@functools.cache
def _build(
    model: str, arguments: tuple[tuple[str, Any], ...], layer_class: type[nn.Module]
) -> nn.Module:
    """Build a model without memory for its weights, whose layers pass on sizes of maps alone."""
    with torch.device("meta"):
        built = timm.create_model(model, **dict(arguments))
    skipped = layer_class, Mlp, DepthwiseMlp, ResidualDepthwise, nn.LayerNorm
    for layer in built.modules():
        if isinstance(layer, skipped):
            layer.forward = lambda x, *others: x
    return built.eval()

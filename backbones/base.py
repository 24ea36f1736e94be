"""What every backbone of the zoo has in common: the model and its timm-facing contract, once.

Legend: B batch, C channels, H and W height and width of the image, s the stride of a stage.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d
from timm.models import checkpoint, register_notrace_function, register_notrace_module
from timm.models._features import (
    FeatureDictNet,
    FeatureGetterNet,
    FeatureHookNet,
    FeatureInfo,
    FeatureListNet,
)
from timm.models._features_fx import FeatureGraphNet
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers.arguments import check_flag, check_number, check_whole_number, is_whole_number
from ..layers.conv import prefers_channels_last
from ..layers.weight_init import trunc_normal_

_POOL_TYPES = ("avg", "max", "avgmax", "catavgmax")


@register_notrace_function
def check_image(x: torch.Tensor, in_chans: int) -> None:
    """Raise a ValueError unless `x` is a (B, in_chans, H, W) floating-point batch, H, W >= 1."""
    if torch.jit.is_tracing():
        return  # sizes are traced values then, and a branch on them would be burnt in
    if not isinstance(x, torch.Tensor):
        raise ValueError(
            f"the image batch is a {type(x).__name__}: a tensor (B, {in_chans}, H, W) is taken"
        )
    if x.ndim != 4 or x.shape[1] != in_chans or 0 in x.shape[2:]:
        raise ValueError(
            f"the image batch has shape {tuple(x.shape)}: (B, {in_chans}, H, W) with H and W of "
            "at least 1 is taken (in_chans= of create_model changes the channels)"
        )
    if not x.is_floating_point():
        raise ValueError(f"the image batch has dtype {x.dtype}: a floating-point one is taken")
    if x.layout != torch.strided:
        raise ValueError(f"the image batch has layout {x.layout}: a dense one is taken")


@contextlib.contextmanager
def _mismatch_named(x: torch.Tensor, module: nn.Module) -> Iterator[None]:
    """Turn what PyTorch raises for an image of another device or dtype into a ValueError.

    Not foreseen, since sharded and cast weights have theirs in the forward pass alone.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        weight = next(module.parameters(), None)
        kind, names = x.device.type, ("device", "dtype")
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            names = ("device",)
        for name in names:
            own, wanted = getattr(x, name), getattr(weight, name, None)
            if wanted is not None and own != wanted:
                raise ValueError(
                    f"the image batch has {name} {own} and the model {wanted}: bring one to the "
                    "other's with .to(), or for another dtype run under torch.autocast"
                ) from error
        raise


@register_notrace_function
def check_map(x: torch.Tensor, channels: int) -> None:
    """Raise a ValueError unless `x` is a map (B, channels, H, W)."""
    if torch.jit.is_tracing():
        return
    if not isinstance(x, torch.Tensor) or x.ndim != 4 or x.shape[1] != channels:
        found = tuple(x.shape) if isinstance(x, torch.Tensor) else f"a {type(x).__name__}"
        raise ValueError(
            f"forward_head got {found}: the map (B, {channels}, H, W) that forward_features "
            "returns is taken"
        )


def check_arguments(
    depths: Sequence[int],
    dims: Sequence[int],
    in_chans: int,
    drop_path_rate: float,
    num_stages: int = 4,
) -> None:
    """Raise a ValueError that names the first of a constructor's arguments that is no good."""
    wanted = "four whole numbers" if num_stages == 4 else f"a list of {num_stages} whole numbers"
    for name, value in (("depths", depths), ("dims", dims)):
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        if (
            not is_list
            or len(value) != num_stages
            or not all(is_whole_number(n) and n > 0 for n in value)
        ):
            raise ValueError(f"{name} is {value!r}: {wanted} of at least 1 are taken")
    check_whole_number("in_chans", in_chans, 1)
    check_number("drop_path_rate", drop_path_rate, 0, 1)


@contextlib.contextmanager
def _frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Keep BatchNorm's running statistics as they are while `module` is computed again."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    saved = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        # A momentum of 0 leaves the statistics alone; the counter would still count.
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, count in saved:
            norm.momentum, norm.num_batches_tracked = momentum, count


@register_notrace_module
class Stage(nn.Module):
    """One resolution level: a resolution change, then blocks. NCHW in and out.

    Args:
        downsample: changes the resolution and the channels (an identity in the first stage).
        blocks: modules that keep the shape (B, C, H / s, W / s).
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def __init_subclass__(cls) -> None:
        register_notrace_module(cls)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run_blocks(self.downsample(x))

    def run_blocks(self, x: torch.Tensor, *shared: torch.Tensor) -> torch.Tensor:
        """Apply the blocks, each recomputed in the backward pass where that is enabled.

        Args:
            x: the map that the first block takes.
            shared: further arguments, the same for every block.
        """
        if not (self.grad_checkpointing and torch.is_grad_enabled()):
            for block in self.blocks:
                x = block(x, *shared)
            return x
        for block in self.blocks:
            # Compilers replay no side effects, and take no context of ours.
            context = (
                {}
                if torch.compiler.is_compiling()
                else {
                    "context_fn": lambda block=block: (
                        contextlib.nullcontext(),
                        _frozen_statistics(block),
                    )
                }
            )
            x = checkpoint(block, x, *shared, **context)
        return x


class ChannelsLastStage(Stage):
    """Stage whose blocks work on NHWC; converts once on entry and once on exit. NCHW in and out.

    Both conversions are views: the map keeps channels-last memory from stage to stage.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.downsample(x).permute(0, 2, 3, 1)
        return self.run_blocks(x).permute(0, 3, 1, 2)


class ClassifierHead(nn.Module):
    """Global pooling, dropout and a linear classifier: (B, C, H, W) -> (B, num_classes).

    Args:
        in_features: channels C.
        num_classes: classes; 0 leaves the pooled features (B, C).
        pool_type: "avg", "max", "avgmax", "catavgmax" or, with num_classes=0, "" for none.
        drop_rate: dropout rate before the classifier.

    Attributes:
        num_features: channels of the pooled features; 2C for "catavgmax", else C.
    """

    def __init__(
        self, in_features: int, num_classes: int, pool_type: str = "avg", drop_rate: float = 0.0
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.global_pool = nn.Identity()
        self.drop = nn.Dropout(drop_rate)
        self.fc = nn.Identity()
        self.reset(num_classes, pool_type)

    def make_classifier(self, num_classes: int) -> nn.Module:
        """Make the classifier of (B, num_features) features, `num_classes` > 0."""
        return nn.Linear(self.num_features, num_classes)

    def reset(
        self, num_classes: int, pool_type: str | None = None, like: torch.Tensor | None = None
    ) -> None:
        """Replace the classifier, and the pooling unless `pool_type` is None.

        Args:
            num_classes: classes; 0 leaves the pooled features.
            pool_type: as the constructor takes it; None keeps the pooling ("avg" where there was
                none and classes are asked for).
            like: a tensor of the device and dtype wanted.

        Raises:
            ValueError: `num_classes` is negative, or above 0 without pooling; an unknown pooling.
        """
        check_whole_number("num_classes", num_classes, 0)
        if pool_type not in (None, "", *_POOL_TYPES):
            raise ValueError(
                f'global_pool is {pool_type!r}: one of {_POOL_TYPES}, or "" for none, is taken'
            )
        if num_classes and pool_type is None and not self.global_pool.pool_type:
            pool_type = "avg"  # a classifier needs a pooling, and the caller names none
        if num_classes and pool_type == "":
            raise ValueError(
                f'num_classes={num_classes} needs a global_pool: "" is taken with num_classes=0'
            )
        if pool_type is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type))
        self.num_features = self.in_features * self.global_pool.feat_mult()
        self.fc = self.make_classifier(num_classes) if num_classes else nn.Identity()
        init_linear(self.fc)
        if like is not None:
            self.fc.to(like)
        self.train(self.training)

    def forward(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.drop(self.global_pool(x))
        return x if pre_logits else self.fc(x)


def init_linear(module: nn.Module) -> None:
    """Initialise linear layers within `module`: truncated normal of std 0.02, zero bias."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            trunc_normal_(child.weight)
            if child.bias is not None:
                nn.init.zeros_(child.bias)


def fuse_children(module: nn.Module) -> None:
    """Call `fuse()` of every descendant of `module` that has one, in place."""
    for child in [m for m in module.modules() if m is not module]:
        if hasattr(child, "fuse"):
            child.fuse()


class HierarchicalBackbone(nn.Module):
    """Stem, stages, norm and head of a hierarchical backbone, with timm's model contract.

    Stage maps are NCHW of exactly ceil(H / s) x ceil(W / s), s = `strides`, contiguous unless
    the image is channels last. A subclass builds the parts in its constructor and hands them over.

    Compiled with ``torch.compile(dynamic=True)``, one graph serves all images that are larger than
    the last stride both ways, in batches of two and more; PyTorch compiles anew where a map has
    one row or column, or a batch one image. A trace of `torch.jit` is valid at the size of its
    example.

    Args:
        stem: (B, in_chans, H, W) -> map of the first stage's resolution.
        stages: modules from map to map; what a stage returns is what users get.
        norm: norm of the last map, NCHW.
        head: classifier head from the normed map.
        in_chans: channels of the image.
    """

    # Stride of each stage's map, pixels.
    strides: tuple[int, ...] = (4, 8, 16, 32)

    # Norm of the official dense backbone's outputs ("batch_norm", "layer_norm"), None without.
    dense_norm: str | None = None
    dense_norm_eps: float = 1e-5

    # Entries of the official files with the weights of the published results, where those are not
    # the averaged ones that most families publish ("model", say, beside "model_ema").
    checkpoint_nests: tuple[str, ...] = ()

    # Constructor arguments of the official dense backbone that differ from the classifier's;
    # ``features_only=True`` builds with them unless the caller gives others.
    dense_arguments: Mapping[str, Any] = {}

    # What cannot be exported and why: "onnx", "torch_export" or "dynamic" (height and width left
    # open) -> the reason, one line. The docstring of a family that lists one says the same.
    unsupported_exports: Mapping[str, str] = {}

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[nn.Module],
        norm: nn.Module,
        head: ClassifierHead,
        *,
        dims: Sequence[int],
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        for part in (stem, norm):
            register_notrace_module(type(part))
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.norm = norm
        self.head = head
        self.in_chans = in_chans
        self.num_features = dims[-1]
        self.head_hidden_size = head.num_features
        self.num_classes = getattr(head.fc, "out_features", 0)
        self.feature_info = [
            dict(num_chs=dim, reduction=stride, module=f"stages.{i}")
            for i, (dim, stride) in enumerate(zip(dims, self.strides, strict=True))
        ]
        init_linear(self)

    def adapt_checkpoint(self, state_dict: dict[str, torch.Tensor]) -> list[str]:
        """Change a checkpoint, its keys already ours, in place to fit this instance.

        For what key rules cannot say: tensors joined, split, or resized to other windows.

        Returns:
            One line per change that a user should know of.
        """
        return []

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters, beside one-dimensional ones, that no decay should touch."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups for layer-wise learning rates: stem, blocks (coarse: stages), head."""
        return dict(
            stem=r"^stem",
            blocks=[(r"^stages\.(\d+)", None), (r"^norm", (99999,))]
            if coarse
            else [
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^stages\.(\d+)", (0,)),
                (r"^norm", (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass rather than keep their activations."""
        check_flag("enable", enable)
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier; an identity after `reset_classifier(0)`."""
        return self.head.fc

    def classifier_names(self) -> str | tuple[str, ...] | None:
        """Names of the linear classifiers, as timm's pretrained_cfg has them."""
        names = [f"head.{n}" for n, m in self.head.named_modules() if isinstance(m, nn.Linear)]
        return (names[0] if len(names) == 1 else tuple(names)) if names else None

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one.

        Args:
            num_classes: classes; 0 leaves pooled features.
            global_pool: pooling from now on; None for the one before ("avg" where there was none
                and num_classes > 0); "" (with num_classes=0) for none.

        Raises:
            ValueError: as `ClassifierHead.reset`.
        """
        self.head.reset(num_classes, global_pool, like=next(self.stem.parameters()))
        self.num_classes = num_classes
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Compute stage maps, and the final normed map unless `intermediates_only`.

        Args:
            x: image batch (B, in_chans, H, W).
            indices: stages by index, negative from the end, in the order wanted; an int n for
                the last n; None for all.
            norm: apply the final norm to the last stage's map (no other one fits it).
            stop_early: skip the stages after the last one asked for; the final map is then
                that of the last stage computed.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: return the list alone.

        Returns:
            The maps in the order of `indices`; with the final map (B, C, H / 32, W / 32) before
            them unless `intermediates_only`.

        Raises:
            ValueError: an index out of range, an unknown `output_fmt`, or an image batch of
                another shape.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f'output_fmt is {output_fmt!r}: "NCHW" and "NHWC" are taken')
        flags = dict(norm=norm, stop_early=stop_early, intermediates_only=intermediates_only)
        for name, value in flags.items():
            check_flag(name, value)
        check_image(x, self.in_chans)
        take = absolute_indices(indices, len(self.stages))
        image = x
        x = self._run_stem(x)
        maps = []
        last = max(take) if stop_early or intermediates_only else len(self.stages) - 1
        for i, stage in enumerate(self.stages):
            if i > last:
                break
            x = stage(x)
            maps.append(x)  # all: torch 2.6's compiler cannot tell which are in `take`
        if last == len(self.feature_info) - 1 and (norm or not intermediates_only):
            x = self.norm(x)
            if norm:
                maps[last] = x
        features = [in_format_of(image, maps[i]) for i in take]
        x = in_format_of(image, x)
        if output_fmt == "NHWC":
            features = [feature.permute(0, 2, 3, 1) for feature in features]
        return features if intermediates_only else (x, features)

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] | None = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop, in place, what the stage maps of `indices` do not need.

        Args:
            indices: as `forward_intermediates` takes them.
            prune_norm: drop the final norm (it goes with the last stage in any case).
            prune_head: drop the classifier (it goes where what it takes is dropped).

        Returns:
            The indices from 0, in the order given.
        """
        take = absolute_indices(indices, len(self.stages))
        last = max(take)
        if prune_norm or last < len(self.stages) - 1:
            self.norm = nn.Identity()
            channels = self.feature_info[last]["num_chs"]
            # The head takes what the norm gives, which may have channels of its own.
            prune_head |= last < len(self.stages) - 1 or channels != self.num_features
            self.num_features = channels
        self.stages = self.stages[: last + 1]
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def _run_stem(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return self.stem(to_fast_format(x))
        with _mismatch_named(x, self.stem):
            return self.stem(to_fast_format(x))

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the final normed map: (B, in_chans, H, W) -> (B, C, H / 32, W / 32)."""
        check_image(x, self.in_chans)
        return in_format_of(x, self.norm(self.stages(self._run_stem(x))))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Compute logits (B, num_classes), or pooled features (B, C), from the normed map.

        Raises:
            ValueError: `x` is not what `forward_features` returns.
        """
        check_map(x, self.num_features)
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))

    def fuse(self) -> HierarchicalBackbone:
        """Fold BatchNorm into neighbouring convolutions, in place, and return the model.

        For inference: outputs equal those of evaluation mode before. From then on checkpoints
        of fused models load, and those of unfused ones do not.
        """
        fuse_children(self)
        return self


@register_notrace_function
def to_fast_format(x: torch.Tensor) -> torch.Tensor:
    """Give the image the memory format that inference on it is fastest with."""
    if prefers_channels_last(x):
        return x.contiguous(memory_format=torch.channels_last)
    return x


@register_notrace_function
def in_format_of(image: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Make the map `x` contiguous unless the image is channels last and nothing else."""
    if image.is_contiguous():
        return x.contiguous()
    # functorch's transforms (vmap) cannot tell the memory format.
    is_plain = torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None
    if is_plain and image.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def absolute_indices(indices: int | Sequence[int] | None, num_stages: int) -> list[int]:
    """Resolve stage indices to ones from 0, in the order given.

    Args:
        indices: indices, negative from the end; an int n for the last n; None for all.
        num_stages: stages that there are.

    Raises:
        ValueError: none, one out of range, or one twice.
    """
    wanted = indices
    if indices is None:
        indices = range(num_stages)
    elif isinstance(indices, int) and not isinstance(indices, bool):
        indices = range(num_stages - indices, num_stages) if 0 < indices <= num_stages else ()
    elif not isinstance(indices, (Sequence, range)) or isinstance(indices, str):
        raise ValueError(f"out_indices is {wanted!r}: whole numbers, or one, are taken")
    for index in indices:
        check_whole_number("an entry of out_indices", index)
    absolute = [i + num_stages if i < 0 else i for i in indices]
    if not absolute or any(not 0 <= i < num_stages for i in absolute):
        raise ValueError(
            f"out_indices is {wanted}: stages 0 to {num_stages - 1} (or -{num_stages} to -1), or "
            f"the number of last stages, 1 to {num_stages}, are taken"
        )
    if len(set(absolute)) < len(absolute):
        raise ValueError(f"out_indices is {wanted}: each stage is taken once")
    return absolute


class _Features:
    """What `features_only=True` returns, beside timm's part of it.

    Maps come in the order of `out_indices`, also where timm gives them in the network's order.
    """

    def prepare(self, order: Sequence[int], in_chans: int) -> None:
        """Take images of `in_chans` channels; return maps in `order`, ascending in timm's part."""
        self.in_chans = in_chans
        self.feature_info = FeatureInfo(self.feature_info.info, tuple(order))
        self._positions = tuple(sorted(order).index(i) for i in order)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor] | dict[str, torch.Tensor]:
        check_image(x, self.in_chans)
        if torch.compiler.is_compiling():
            maps = super().forward(x)
        else:
            with _mismatch_named(x, self):
                maps = super().forward(x)
        names = list(maps) if isinstance(maps, dict) else range(len(maps))
        ordered = {names[i]: in_format_of(x, maps[names[i]]) for i in self._positions}
        return type(maps)(ordered) if isinstance(maps, dict) else list(ordered.values())

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass rather than keep their activations."""
        check_flag("enable", enable)
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    def fuse(self) -> _Features:
        """Fold BatchNorm into neighbouring convolutions, in place, and return the model."""
        fuse_children(self)
        return self


class FeatureList(_Features, FeatureListNet):
    """Stage maps as a list, the network rebuilt from its stem and stages."""


class FeatureDict(_Features, FeatureDictNet):
    """Stage maps as a dict, the network rebuilt from its stem and stages."""


class FeatureHook(_Features, FeatureHookNet):
    """Stage maps collected by hooks."""


class FeatureGraph(_Features, FeatureGraphNet):
    """Stage maps of an FX graph, stem and stages its leaves."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for graph in (self.graph_module.train_graph, self.graph_module.eval_graph):
            for node in graph.nodes:
                node.type = None  # an annotation as text, which torch 2.6 cannot pickle
        self.graph_module.recompile()

    def __deepcopy__(self, memo: dict[int, Any]) -> FeatureGraph:
        """Copy as any module is; torch.fx alone would put the whole copy in training mode."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__dict__, memo))
        # This chooses between the graphs of training and evaluation.
        twin.graph_module.train(self.graph_module.training)
        for module, copied in zip(self.modules(), twin.modules(), strict=True):
            copied.training = module.training
        return twin


class FeatureGetter(_Features, FeatureGetterNet):
    """Stage maps by `forward_intermediates`, the rest of the model dropped."""


FEATURE_CLASSES = {
    "getter": FeatureGetter,
    "list": FeatureList,
    "dict": FeatureDict,
    "hook": FeatureHook,
    "fx": FeatureGraph,
}

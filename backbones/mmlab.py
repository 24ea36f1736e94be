"""DenseBackbone: the one adapter through which mmdet and mmseg build a backbone.

Importing it needs mmengine. It is registered in mmengine's root MODELS, which every OpenMMLab
library looks names up in; a config needs ``custom_imports = dict(imports=["densezoo"])`` alone.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import timm
import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.layers import LayerNorm2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers.arguments import check_flag, check_mapping, check_number, check_whole_number
from .base import absolute_indices, in_format_of
from .checkpoints import (
    download_checkpoint,
    load_safely,
    map_keys,
    read_checkpoint,
    strip_prefixes,
    unwrap_nesting,
)
from .registry import (
    check_model_name,
    create_with_weights,
    find_backbone,
    register_in_mmengine,
)

_logger = logging.getLogger(__name__)

_OUT_NORMS = {"batch_norm": nn.BatchNorm2d, "layer_norm": LayerNorm2d}


def check_init_cfg(init_cfg: object) -> None:
    """Raise a ValueError unless `init_cfg` is one of mmengine's, a "Pretrained" one with a file."""
    for cfg in [init_cfg] if not isinstance(init_cfg, (list, tuple)) else init_cfg:
        if cfg is None:
            continue
        if not isinstance(cfg, Mapping) or not isinstance(cfg.get("type"), str):
            raise ValueError(
                f'init_cfg is {init_cfg!r}: dict(type="Pretrained", checkpoint=FILE), or a dict '
                "with the type of another initialiser of mmengine, is taken"
            )
        if cfg["type"] == "Pretrained" and not isinstance(cfg.get("checkpoint"), str):
            raise ValueError(
                f"init_cfg.checkpoint is {cfg.get('checkpoint')!r}: the path or URL of a "
                "checkpoint is taken"
            )


class _SafeTorch(ModuleType):
    """torch as mmengine's checkpoint module sees it: all of it, but for how a file is loaded."""

    def __init__(self) -> None:
        super().__init__("torch", torch.__doc__)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def load(
        file: str | Path | BinaryIO,
        map_location: str | torch.device | Callable | dict | None = None,
        **options: Any,
    ) -> dict:
        """Load a checkpoint with the zoo's reader, whatever the options say."""
        if isinstance(file, (str, Path)):
            # In memory: a run keeps the tensors longer than the file may live.
            checkpoint = read_checkpoint(file, map_location=map_location, mmap=False)
        else:
            checkpoint = load_safely(file, "the checkpoint", map_location=map_location)
        return _without_code(checkpoint)


def _without_code(checkpoint: dict) -> dict:
    """Drop the text that mmengine's Runner would run as a config, as it resumes.

    No version of mmengine writes it under that name.
    """
    meta = checkpoint.get("meta")
    if isinstance(meta, dict):
        meta.pop("config", None)
    return checkpoint


def _load_url_safely(
    url: str,
    model_dir: str | None = None,
    map_location: str | torch.device | Callable | dict | None = None,
    progress: bool = True,
) -> dict:
    """Stand in for torch.utils.model_zoo.load_url, which unpickles whatever comes."""
    path = download_checkpoint(url, cache_dir=model_dir, progress=progress)
    return _without_code(read_checkpoint(path, map_location=map_location, mmap=False))


def read_mmengine_checkpoints_safely() -> None:
    """Make every load through mmengine's CheckpointLoader execute nothing, for this process.

    Whatever the scheme (a local file, http, s3, open-mmlab, ...), and so for a Runner's
    ``load_from`` and ``resume``, ``init_cfg`` of any module and published checkpoints, files are
    read with `read_checkpoint`. mmengine on its own unpickles a file in full where the safe way
    fails (0.10.12), or where it comes from a URL (0.10.7 too). Acting twice is harmless.

    Raises:
        ImportError: mmengine loads in another way than its known versions.
    """
    from mmengine.runner import checkpoint as mmengine_checkpoint

    if isinstance(mmengine_checkpoint.torch, _SafeTorch):
        return
    if not hasattr(mmengine_checkpoint, "load_url"):
        raise ImportError(
            "this version of mmengine loads checkpoints in a way that densezoo can't make safe; "
            "install one that densezoo names: pip install 'densezoo[openmmlab]'"
        )
    mmengine_checkpoint.torch = _SafeTorch()
    mmengine_checkpoint.load_url = _load_url_safely


def read_from_anywhere(path: str | Path) -> dict:
    """Read a checkpoint file, or what a URL of one of mmengine's schemes names; see above.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint that can be read safely, or not listed.
    """
    if "://" not in str(path):
        return read_checkpoint(path)
    # Costs as much to import as the rest of densezoo.
    from mmengine.runner.checkpoint import CheckpointLoader

    read_mmengine_checkpoints_safely()
    try:
        return CheckpointLoader.load_checkpoint(str(path), map_location="cpu")
    except KeyError as error:
        raise ValueError(f"{path} is no checkpoint that is listed: {error}") from error


@register_in_mmengine(MODELS)
class DenseBackbone(BaseModule):
    """A timm model as the backbone of a detector or segmenter: image batch to stage maps.

    It holds only the parameters that the maps of `out_indices` need, so that distributed
    training needs no `find_unused_parameters`.

    Args:
        model_name: a model of the zoo, or any of timm's that takes ``features_only=True``.
        out_indices: stages whose maps are returned, in this order; negative from the end. For a
            timm model, indices of its feature levels.
        drop_path_rate: stochastic depth; the model's default when None.
        frozen_stages: -1 freezes nothing, 0 the stem, n the stem and the first n stages (of
            stride 4 and more): no gradients, and evaluation mode also after `train()`.
        norm_eval: keep every BatchNorm in evaluation mode while training.
        with_cp: recompute activations in the backward pass to save memory.
        out_norms: norm of each returned map, of its own: "batch_norm", "layer_norm", True for
            what the official dense backbone has, False for none.
        pretrained: True for the published weights, or the path or URL of a checkpoint in any
            layout that the zoo knows.
        init_cfg: ``dict(type="Pretrained", checkpoint=...)`` loads the same way when
            `init_weights()` is called; mmengine's other initialisers work as they do elsewhere.
        model_kwargs: further arguments of the model.

    Attributes:
        out_channels: channels of each returned map.
        out_strides: stride of each returned map, pixels.
        model_kwargs: arguments of the model, `drop_path_rate` included.

    Raises:
        ValueError: an unknown model name, stage, norm or number of frozen stages; weights that
            do not belong to the model.

    Shapes: (B, in_chans, H, W) -> a tuple of (B, out_channels[i], ceil(H / s), ceil(W / s)),
    s = out_strides[i].
    """

    def __init__(
        self,
        model_name: str,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        drop_path_rate: float | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        out_norms: bool | str = False,
        pretrained: bool | str | None = None,
        init_cfg: dict | list[dict] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        check_model_name(model_name)
        if drop_path_rate is not None:
            check_number("drop_path_rate", drop_path_rate, 0, 1)
        check_whole_number("frozen_stages", frozen_stages, -1)
        check_flag("norm_eval", norm_eval)
        check_flag("with_cp", with_cp)
        if pretrained is not None and not isinstance(pretrained, (bool, str, os.PathLike)):
            raise ValueError(
                f"pretrained is {pretrained!r}: True, False or the path or URL of a checkpoint is "
                "taken"
            )
        check_init_cfg(init_cfg)
        reserved = ("features_only", "out_indices", "pretrained", "drop_path_rate")
        check_mapping("model_kwargs", {} if model_kwargs is None else model_kwargs, reserved)
        super().__init__(init_cfg=init_cfg)
        if "mmengine.runner" in sys.modules:  # where a Runner, of whatever class, may load next
            read_mmengine_checkpoints_safely()
        self.model_name = model_name
        self.norm_eval = norm_eval
        self.frozen_stages = frozen_stages
        self.model_kwargs = dict(model_kwargs or {})
        if drop_path_rate is not None:
            self.model_kwargs["drop_path_rate"] = drop_path_rate
        self._indices = self._resolve(out_indices)
        # timm gives most maps in the network's order, whatever the order asked for.
        self._arguments = dict(
            self.model_kwargs, features_only=True, out_indices=tuple(sorted(self._indices))
        )
        self._positions = tuple(sorted(self._indices).index(i) for i in self._indices)
        self.model = timm.create_model(model_name, pretrained=pretrained is True, **self._arguments)
        self.out_channels = self.model.feature_info.get("num_chs", self._indices)
        self.out_strides = self.model.feature_info.get("reduction", self._indices)
        self.out_norms = self._make_out_norms(out_norms)
        if with_cp:
            self.model.set_grad_checkpointing(True)
        self._frozen = self._find_frozen_modules()
        for name in self._frozen:
            for parameter in self.model.get_submodule(name).parameters(recurse=False):
                parameter.requires_grad_(False)
        if isinstance(pretrained, (str, os.PathLike)):
            self.load_weights(os.fspath(pretrained))
        self._has_weights = bool(pretrained)

    def _resolve(self, out_indices: int | Sequence[int]) -> list[int]:
        """Stage indices from 0, in the order asked for."""
        is_list = isinstance(out_indices, (list, tuple)) and len(out_indices) > 0
        if is_list and all(type(i) is int and i >= 0 for i in out_indices):
            return absolute_indices(out_indices, max(out_indices) + 1)
        if out_indices is None:
            raise ValueError("out_indices is None: whole numbers, or one, are taken")
        # How many levels there are, timm says of a model alone.
        levels = timm.create_model(self.model_name, features_only=True, **self.model_kwargs)
        return absolute_indices(out_indices, len(levels.feature_info))

    def _make_out_norms(self, out_norms: bool | str) -> nn.ModuleDict:
        """One norm a returned map, under the stage's index."""
        name = out_norms
        cls = registered.cls if (registered := find_backbone(self.model_name)) else None
        if out_norms is True:
            name = cls.dense_norm if cls else None
        if not name:
            if out_norms is True:
                raise ValueError(
                    f"out_norms=True: {self.model_name} has no official output norms; "
                    f"{list(_OUT_NORMS)} are taken"
                )
            return nn.ModuleDict()
        if name not in _OUT_NORMS:
            raise ValueError(
                f"out_norms is {out_norms!r}: a bool or one of {list(_OUT_NORMS)} is taken"
            )
        # timm's LayerNorm has an eps of its own; most dense backbones have PyTorch's.
        eps = cls.dense_norm_eps if cls else 1e-5
        return nn.ModuleDict(
            {
                str(i): _OUT_NORMS[name](channels, eps=eps)
                for i, channels in zip(self._indices, self.out_channels, strict=True)
            }
        )

    def _find_frozen_modules(self) -> list[str]:
        """Names of the model's modules that lie before the end of the last frozen stage.

        Names, because converters (to SyncBatchNorm) put other modules in their places.
        """
        levels = [i["module"] for i in self.model.feature_info.info if i["reduction"] >= 4]
        if not -1 <= self.frozen_stages <= len(levels):
            raise ValueError(
                f"frozen_stages is {self.frozen_stages}: {self.model_name} takes -1 (none), 0 "
                f"(stem) to {len(levels)}"
            )
        if self.frozen_stages < 0:
            return []
        names = [name for name, _ in self.model.named_modules()]
        path = levels[max(self.frozen_stages - 1, 0)]
        # Where timm's feature wrappers put a model's own modules.
        candidates = [path, path.replace(".", "_", 1), f"model.{path}", f"body.{path}"]
        inside = [
            k
            for k, name in enumerate(names)
            if any(name == c or name.startswith(f"{c}.") for c in candidates)
        ]
        if not inside:
            raise ValueError(
                f"frozen_stages={self.frozen_stages} is not possible: {path} is not kept in "
                f"{self.model_name} with out_indices {self._indices}"
            )
        end = inside[-1] + 1 if self.frozen_stages else inside[0]
        return [
            name
            for name in names[1:end]
            if not any(later.startswith(f"{name}.") for later in names[end:])
        ]

    def init_weights(self) -> None:
        """Load ``init_cfg``'s checkpoint through the zoo's key mapping; once.

        Weights loaded by `pretrained` are left as they are.
        """
        configs = [self.init_cfg] if isinstance(self.init_cfg, Mapping) else self.init_cfg or []
        checkpoints = [c["checkpoint"] for c in configs if c["type"] == "Pretrained"]
        if not checkpoints:
            if not self._has_weights:
                super().init_weights()
        elif not self._is_init:
            self.load_weights(checkpoints[-1])
        self._is_init = True

    def load_weights(self, path: str) -> None:
        """Load a checkpoint file or URL in any layout that the zoo, or timm, knows.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the weights belong to another model.
        """
        registered = find_backbone(self.model_name)
        first = registered.cls.checkpoint_nests if registered else ()
        state = strip_prefixes(unwrap_nesting(read_from_anywhere(path), first))
        norms = {}
        for name in list(state):
            for rules in ((), *(registered.key_rules.values() if registered else ())):
                (mapped,) = map_keys({name: state[name]}, rules)
                if mapped.startswith("out_norms."):
                    norms[mapped.removeprefix("out_norms.")] = state.pop(name)
                    break
        try:
            source = create_with_weights(self.model_name, state, self._arguments)
        except ValueError as error:
            raise ValueError(f"{path} does not fit {self.model_name}: {error}") from error
        self.model.load_state_dict(source.state_dict())
        own = self.out_norms.state_dict()
        found = {k: norms[k] for k in own if k in norms}
        self.out_norms.load_state_dict({**own, **found})
        _logger.info("%s: %d of %d entries of out_norms loaded", path, len(found), len(own))

    def train(self, mode: bool = True) -> DenseBackbone:
        super().train(mode)
        if mode:
            for name in self._frozen:
                self.model.get_submodule(name).training = False
            if self.norm_eval:
                for module in self.modules():
                    if isinstance(module, _BatchNorm):
                        module.eval()
        return self

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        maps = self.model(x)
        if str(getattr(self.model, "output_fmt", "NCHW")) in ("NHWC", "Format.NHWC"):
            maps = [m.permute(0, 3, 1, 2).contiguous() for m in maps]
        maps = [maps[i] for i in self._positions]
        if self.out_norms:
            pairs = zip(self.out_norms.values(), maps, strict=True)
            maps = [in_format_of(x, norm(m)) for norm, m in pairs]
        return tuple(maps)

    def fuse(self) -> DenseBackbone:
        """Fold BatchNorm into neighbouring convolutions, in place, and return the backbone.

        For inference; see `HierarchicalBackbone.fuse`.

        Raises:
            ValueError: the model is not one of the zoo.
        """
        if not hasattr(self.model, "fuse"):
            raise ValueError(f"fuse() works on models of densezoo; {self.model_name} is timm's")
        self.model.fuse()
        return self

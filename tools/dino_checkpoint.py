"""Checkpoints of DINO's own repository (IDEA-Research/DINO), as mmdet's DINO has their entries.

Detectors that were trained in a copy of that repository, as FasterViT's published one, hold a
backbone under ``backbone.0.`` and the rest under names of its own. Both compute the same but for
two layouts, which are changed here:

- the classes: one row for each of COCO's category numbers 0 to 90, of which 80 are in use;
- the position of a query: the repository encodes each of its four coordinates with 128 sines and
  cosines, and some versions of mmdet with 256, every second pair of which is one of the 128.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..backbones.base import HierarchicalBackbone
from ..backbones.checkpoints import KeyRules, map_keys

_UNUSED_CATEGORIES = {0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
_CATEGORIES = [number for number in range(91) if number not in _UNUSED_CATEGORIES]
_CLASSIFIERS = re.compile(r"bbox_head\.cls_branches\.\d+\.(weight|bias)")
_LABELS = "dn_query_generator.label_embedding.weight"
_QUERY_POSITION = "decoder.ref_point_head.layers.0.weight"
# In the decoder of the repository the first norm is that after the cross attention.
_RULES: KeyRules = (
    (r"^backbone\.0\.", "backbone."),
    (r"^label_enc\.", "dn_query_generator.label_embedding."),
    (r"^transformer\.tgt_embed\.", "query_embedding."),
    (r"^transformer\.enc_output\.", "memory_trans_fc."),
    (r"^transformer\.enc_output_norm\.", "memory_trans_norm."),
    (r"^transformer\.(level_embed$|encoder\.|decoder\.)", r"\1"),
    (r"^((?:en|de)coder\.layers\.\d+)\.linear1\.", r"\1.ffn.layers.0.0."),
    (r"^((?:en|de)coder\.layers\.\d+)\.linear2\.", r"\1.ffn.layers.1."),
    (r"^(encoder\.layers\.\d+)\.norm1\.", r"\1.norms.0."),
    (r"^(encoder\.layers\.\d+)\.norm2\.", r"\1.norms.1."),
    (r"^(decoder\.layers\.\d+)\.norm2\.", r"\1.norms.0."),
    (r"^(decoder\.layers\.\d+)\.norm1\.", r"\1.norms.1."),
    (r"^(decoder\.layers\.\d+)\.norm3\.", r"\1.norms.2."),
    (r"^(decoder\.layers\.\d+\.self_attn)\.", r"\1.attn."),
    (r"^class_embed\.", "bbox_head.cls_branches."),
    (r"^bbox_embed\.", "bbox_head.reg_branches."),
    # Between its linear layers mmdet counts the activations.
    (r"^(bbox_head\.reg_branches\.\d+)\.layers\.0\.", r"\1.0."),
    (r"^(bbox_head\.reg_branches\.\d+)\.layers\.1\.", r"\1.2."),
    (r"^(bbox_head\.reg_branches\.\d+)\.layers\.2\.", r"\1.4."),
    (r"^input_proj\.(\d+)\.0\.", r"neck.convs.\1.conv."),
    (r"^input_proj\.(\d+)\.1\.", r"neck.convs.\1.gn."),
)


def is_of_dino_repository(state: Mapping[str, Tensor]) -> bool:
    """Tell whether entries are named as in DINO's repository."""
    return any(key.startswith("transformer.decoder.layers.") for key in state) and any(
        key.startswith("backbone.0.") for key in state
    )


def rename_dino(
    state: Mapping[str, Tensor], model: nn.Module, trunk: HierarchicalBackbone
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Bring a checkpoint of DINO's repository to the names of mmdet's DINO.

    Entries of the backbone keep the names of its authors, under ``backbone.``; the norms of its
    outputs, ``norm{k}``, become those of the stage whose width they have.

    Args:
        state: its entries.
        model: mmdet's DINO that they are for.
        trunk: its backbone.

    Returns:
        The entries; names of those that hold the same as another (the predictors are in the file
        twice); a line for each change beside names.

    Raises:
        ValueError: the model is no DINO; or predictors that are the same module there differ.
    """
    if not hasattr(model, "dn_query_generator"):
        raise ValueError(
            f"its entries are those of a DINO, and the model is a {type(model).__name__}: give a "
            "config of DINO with the same backbone"
        )
    repeated = [k for k in state if re.match(r"transformer\.decoder\.(class|bbox)_embed\.", k)]
    for key in repeated:
        twin = state.get(key.removeprefix("transformer.decoder."))
        if twin is None or not torch.equal(twin, state[key]):
            raise ValueError(f"{key} is not the same as {key.removeprefix('transformer.decoder.')}")
    state = {key: value for key, value in state.items() if key not in repeated}
    renamed = map_keys(state, [*_own_rules(model), *_RULES])
    dims = [info["num_chs"] for info in trunk.feature_info]
    stages = _find_norms(renamed, dims)
    renamed = {_place_norm(key, stages): value for key, value in renamed.items()}

    notes = []
    num_classes = model.bbox_head.num_classes
    for key in [k for k in renamed if _CLASSIFIERS.fullmatch(k) or k == _LABELS]:
        rows = len(renamed[key])
        if num_classes == len(_CATEGORIES) and rows in (91, 92):
            renamed[key] = renamed[key][_CATEGORIES]
            notes.append(f"{key}: {num_classes} of {rows} rows, those of COCO's categories")
        elif key == _LABELS and rows == num_classes + 1:
            renamed[key] = renamed[key][:num_classes]
            notes.append(f"{key}: without the last row, which nothing reads")
    wanted = model.decoder.ref_point_head.layers[0].in_features
    given = renamed.get(_QUERY_POSITION)
    if given is not None and 2 * given.shape[1] == wanted:
        renamed[_QUERY_POSITION] = _spread_frequencies(given)
        notes.append(f"{_QUERY_POSITION}: zeros between frequencies, which mmdet has twice as many")
    return renamed, repeated, notes


def _own_rules(model: nn.Module) -> KeyRules:
    """Give the rules that depend on a model's numbers of layers and maps."""
    last = len(model.decoder.layers)
    maps = len(model.neck.convs)
    extra = range(maps, maps + len(model.neck.extra_convs or ()))
    return [
        (r"^transformer\.enc_out_class_embed\.", f"bbox_head.cls_branches.{last}."),
        (r"^transformer\.enc_out_bbox_embed\.", f"bbox_head.reg_branches.{last}."),
        *(
            (rf"^input_proj\.{level}\.{index}\.", f"neck.extra_convs.{level - maps}.{part}.")
            for level in extra
            for index, part in enumerate(("conv", "gn"))
        ),
    ]


def _find_norms(state: Mapping[str, Tensor], dims: list[int]) -> dict[str, int]:
    """Find the stages that the norms ``backbone.norm{k}.`` are of, by their widths."""
    stages = {}
    for key, value in state.items():
        norm = re.match(r"backbone\.norm\d\.", key)
        if norm and value.ndim == 1 and len(value) in dims:
            stages[norm[0]] = dims.index(len(value))
    return stages


def _place_norm(key: str, stages: Mapping[str, int]) -> str:
    """Name an entry of an output's norm after its stage; others keep their names."""
    norm, _, entry = key.rpartition(".")
    stage = stages.get(f"{norm}.")
    return key if stage is None else f"backbone.out_norms.{stage}.{entry}"


def _spread_frequencies(weight: Tensor) -> Tensor:
    """Spread (out, 4 x 2F) columns, sine and cosine of F frequencies a coordinate, over 2F."""
    pairs = weight.unflatten(1, (4, -1, 1, 2))  # out, coordinates, F, 1, sine and cosine
    return torch.cat((pairs, torch.zeros_like(pairs)), dim=3).flatten(1)

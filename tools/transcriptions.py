"""Models written as their official code computes them, with the weights of the zoo's models.

A transcription is `torch.nn.Module` of plain PyTorch whose parameters have the names of the
published files. It has `forward_features`, which gives the maps of the stages, `HEAD`, the names of
what comes after these, and an `OperatorStandIn` in the place of each of the zoo's operators.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..backbones.base import HierarchicalBackbone
from ..backbones.checkpoints import convert_checkpoint
from ..backbones.registry import find_backbone
from . import biformer_transcription, ppma_transcription
from .biformer_transcription import BiFormerTranscription
from .ppma_transcription import PPMATranscription

# By the name of the model; built with arguments in place of the variant's own.
TRANSCRIPTIONS: dict[str, Callable[..., nn.Module]] = {
    name: partial(transcription, **arguments)
    for transcription, variants in (
        (BiFormerTranscription, biformer_transcription.VARIANTS),
        (PPMATranscription, ppma_transcription.VARIANTS),
    )
    for name, arguments in variants.items()
}


class StageMaps(nn.Module):
    """A transcription's stage maps; it takes what comes after the stages from it."""

    def __init__(self, transcription: nn.Module) -> None:
        super().__init__()
        for part in transcription.HEAD:
            delattr(transcription, part)
        self.transcription = transcription

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.transcription.forward_features(images)


def transcribe(name: str, model: HierarchicalBackbone, arguments: Mapping[str, Any]) -> nn.Module:
    """Transcribe a model of the zoo, weights included.

    Args:
        name: of `TRANSCRIPTIONS`.
        model: the model as `name` and `arguments` build it.
        arguments: of the transcription, in the place of the variant's own.

    Raises:
        ValueError: an argument is none of the transcription's.
    """
    try:
        transcription = TRANSCRIPTIONS[name](**arguments)
    except TypeError as error:
        raise ValueError(
            f"the transcription of {name} cannot be built with {dict(arguments)}: {error}"
        ) from error
    registered = find_backbone(name)
    # Key rules rename entries without copies: what they give is the transcription's own memory.
    renamed, report = convert_checkpoint(
        transcription.state_dict(),
        model,
        registered.key_rules,
        first_conv=registered.weights.first_conv,
    )
    assert not report.missing and not report.unexpected, report
    state = model.state_dict()
    for key, entry in renamed.items():
        entry.copy_(state[key])
    return transcription

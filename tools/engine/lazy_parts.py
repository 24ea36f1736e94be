"""Parts whose modules import OpenCV through mmengine, registered without importing them.

``import densezoo`` is not to pay for that, so each name is registered with a stand-in that imports
the part when it is built.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmengine.registry import HOOKS, RUNNERS

from ...backbones.registry import register_in_mmengine

if TYPE_CHECKING:
    from mmengine.hooks import Hook
    from mmengine.runner import Runner


@register_in_mmengine(RUNNERS, "DurableRunner")
class RunnerFromConfig:
    """What ``runner_type="DurableRunner"`` of a config builds a ``DurableRunner`` with."""

    @staticmethod
    def from_cfg(cfg: dict) -> Runner:
        """Build the Runner of a config."""
        from .runner import DurableRunner

        return DurableRunner.from_cfg(cfg)


@register_in_mmengine(HOOKS, "ReseedHook")
def reseed_hook(**options) -> Hook:
    """Build the hook that makes a resumed run equal one that was not interrupted."""
    from .reseed_hook import ReseedHook

    return ReseedHook(**options)


@register_in_mmengine(HOOKS, "DurableCheckpointHook")
def durable_checkpoint_hook(**options) -> Hook:
    """Build the hook whose checkpoints outlive a killed run and a full disk."""
    from .durable_checkpoints import DurableCheckpointHook

    return DurableCheckpointHook(**options)


@register_in_mmengine(HOOKS, "SelfDistillationHook")
def self_distillation_hook(**options) -> Hook:
    """Build the hook with which a classifier learns from the average of its weights."""
    from .self_distillation import SelfDistillationHook

    return SelfDistillationHook(**options)


@register_in_mmengine(HOOKS, "StopOnBadLossHook")
def stop_on_bad_loss_hook(**options) -> Hook:
    """Build the hook that ends a run whose loss is no number."""
    from .bad_loss import StopOnBadLossHook

    return StopOnBadLossHook(**options)

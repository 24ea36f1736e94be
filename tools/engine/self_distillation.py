"""Self-distillation: a classifier learns from the average of its own weights (MESA)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import Tensor

from ...layers.arguments import check_number, check_whole_number


class SelfDistillationHook(Hook):
    """Add to the loss of an ``ImageClassifier`` how far it is from the average of its weights.

    From an epoch on, the loss of a batch gets, beside that of the labels,

        weight * 50 * KL(softmax(teacher / temperature) || softmax(student / temperature)),

    the mean over the images. The teacher is the average that the config's EMAHook keeps, in
    evaluation mode, without a gradient and on the same images, mixed and erased as they are. The
    two parts are logged as ``loss_labels`` and ``loss_teacher``.

    Source: MESA, Du et al., arXiv 2205.14083; the form and the factor 50 are those of FasterViT's
    training script.

    Args:
        weight: factor of the term, of at least 0.
        begin_epoch: the first epoch with the term, counted from 0.
        temperature: what logits are divided by, above 0.

    Raises:
        ValueError: an argument out of its range; from `check`, what a run lacks.
    """

    def __init__(self, weight: float, begin_epoch: int, temperature: float = 3.0) -> None:
        check_number("weight of SelfDistillationHook", weight, 0)
        check_whole_number("begin_epoch of SelfDistillationHook", begin_epoch, 0)
        check_number("temperature of SelfDistillationHook", temperature, 0)
        if not temperature:
            raise ValueError("temperature of SelfDistillationHook is 0: a number above 0 is taken")
        self.weight = weight
        self.begin_epoch = begin_epoch
        self.temperature = temperature

    def check(self, runner: Runner) -> None:
        """Check that a run has what the hook needs; before it starts, where no work is lost.

        Raises:
            ValueError: the model is no ``ImageClassifier``; there is no EMAHook; or the run counts
                iterations, in which no epoch after the first comes.
        """
        student = getattr(runner.model, "module", runner.model)
        if not hasattr(student, "distillation"):
            raise ValueError(
                f"SelfDistillationHook takes an ImageClassifier, and {type(student).__name__} "
                "is none: remove it from custom_hooks"
            )
        if not any(isinstance(hook, EMAHook) for hook in runner.hooks):
            raise ValueError(
                "SelfDistillationHook learns from the average of an EMAHook, and custom_hooks has "
                "none: add one"
            )
        if self.begin_epoch and isinstance(runner.train_loop, IterBasedTrainLoop):
            raise ValueError(
                f"begin_epoch of SelfDistillationHook is {self.begin_epoch}, and the run counts "
                "iterations: set it to 0, or train_cfg.type to EpochBasedTrainLoop"
            )

    def before_train(self, runner: Runner) -> None:
        """Find the student and the teacher."""
        self.check(runner)
        self.student = getattr(runner.model, "module", runner.model)
        averages = [hook.ema_model for hook in runner.hooks if isinstance(hook, EMAHook)]
        self.teacher = averages[0].module

    def before_train_epoch(self, runner: Runner) -> None:
        """Switch the term on, once its epoch has come."""
        if runner.epoch >= self.begin_epoch:
            self.teacher.eval()
            self.student.distillation = self.compute_loss

    def after_train(self, runner: Runner) -> None:
        """Leave the model as it was."""
        self.student.distillation = None

    def compute_loss(self, images: Tensor, heads: Sequence[Tensor]) -> Tensor:
        """Compute the term.

        Args:
            images: (B, C, H, W), as the student got them.
            heads: logits (B, num_classes) of each of the student's heads.
        """
        with torch.no_grad():
            wanted = F.log_softmax(self.teacher.backbone(images) / self.temperature, dim=-1)
        distances = [
            F.kl_div(
                F.log_softmax(logits / self.temperature, dim=-1),
                wanted,
                reduction="batchmean",
                log_target=True,
            )
            for logits in heads
        ]
        return 50 * self.weight * torch.stack(distances).mean()

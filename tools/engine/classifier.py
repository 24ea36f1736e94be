"""The image classifier: a timm model with a loss, as mmengine's Runner trains it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import timm
import torch
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn

from ...backbones.mmlab import check_init_cfg, read_from_anywhere
from ...backbones.registry import (
    check_model_name,
    create_with_weights,
    register_in_mmengine,
)
from ...layers.arguments import check_flag, check_mapping, check_number, check_whole_number


def build_loss(loss: dict) -> nn.Module:
    """Build a classification loss from ``dict(type=NAME, ...)``.

    Raises:
        ValueError: if the type is none of timm's classification losses nor CrossEntropyLoss.
    """
    import timm.loss

    types = {
        "CrossEntropyLoss": nn.CrossEntropyLoss,
        "LabelSmoothingCrossEntropy": timm.loss.LabelSmoothingCrossEntropy,
        "SoftTargetCrossEntropy": timm.loss.SoftTargetCrossEntropy,
        "BinaryCrossEntropy": timm.loss.BinaryCrossEntropy,
        "JsdCrossEntropy": timm.loss.JsdCrossEntropy,
    }
    options = dict(loss)
    name = options.pop("type", None)
    if name not in types:
        raise ValueError(f"loss type={name!r} is not one of {', '.join(types)}")
    try:
        return types[name](**options)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"loss of type {name} has a wrong argument: {error}") from error


@register_in_mmengine(MODELS)
class ImageClassifier(BaseModel):
    """Classify images with any model of timm's registry, densezoo's included.

    Images come as (B, C, H, W) uint8 RGB and are normalised on the device. A model that returns
    a pair of logits in training (two heads, as CAS-ViT) is trained with the mean of the losses of
    its heads; in evaluation it returns one tensor of logits itself.

    Args:
        model_name: a name of ``timm.create_model``, with a tag or without.
        num_classes: classes of the head.
        drop_path_rate: rate of stochastic depth of the last block; None keeps the model's own.
        pretrained: load the weights that timm's registry names, at construction.
        init_cfg: ``dict(type="Pretrained", checkpoint=FILE)`` starts training from a file, read
            the way timm reads one (a head of another number of classes is left out). As with
            every mmengine model the file is read by :meth:`init_weights`, so only in training.
        loss: ``dict(type=NAME, ...)`` of timm's classification losses, or CrossEntropyLoss.
            None is CrossEntropyLoss, or SoftTargetCrossEntropy when `mixup` is given.
        mixup: arguments of ``timm.data.Mixup`` (mixup_alpha, cutmix_alpha, prob, ...), applied to
            each training batch, which then needs an even number of images.
        random_erasing: arguments of ``timm.data.RandomErasing`` (probability, mode, max_count),
            applied to the normalised training batch on its device, as timm's loader does.
        model_kwargs: further arguments of ``timm.create_model``.
        data_preprocessor: config of mmengine's preprocessor; by default ``ImgDataPreprocessor``
            with mean and std of the model's ``pretrained_cfg``.

    Raises:
        ValueError: for a model name that is not registered (near names are given), a loss that is
            not known, or one that cannot take the soft targets of `mixup`.
    """

    def __init__(
        self,
        model_name: str,
        num_classes: int = 1000,
        *,
        drop_path_rate: float | None = None,
        pretrained: bool = False,
        init_cfg: dict | None = None,
        loss: dict | None = None,
        mixup: dict | None = None,
        random_erasing: dict | None = None,
        model_kwargs: dict | None = None,
        data_preprocessor: dict | None = None,
    ) -> None:
        check_model_name(model_name)
        check_whole_number("num_classes", num_classes, 1)
        if drop_path_rate is not None:
            check_number("drop_path_rate", drop_path_rate, 0, 1)
        check_flag("pretrained", pretrained)  # a file goes into init_cfg
        check_init_cfg(init_cfg)
        reserved = ("num_classes", "features_only", "pretrained", "drop_path_rate")
        check_mapping("model_kwargs", {} if model_kwargs is None else model_kwargs, reserved)
        for name, part in (("loss", loss), ("mixup", mixup), ("random_erasing", random_erasing)):
            if part is not None:
                check_mapping(name, part)
        self.create_args = {
            "num_classes": num_classes,
            **({} if drop_path_rate is None else {"drop_path_rate": drop_path_rate}),
            **(model_kwargs or {}),
        }
        backbone = timm.create_model(model_name, pretrained=pretrained, **self.create_args)
        if data_preprocessor is None:
            statistics = backbone.pretrained_cfg
            data_preprocessor = {
                "type": "ImgDataPreprocessor",
                "mean": [255 * value for value in statistics["mean"]],
                "std": [255 * value for value in statistics["std"]],
                "non_blocking": True,
            }
        super().__init__(data_preprocessor=data_preprocessor, init_cfg=init_cfg)
        self.model_name = model_name
        self.num_classes = num_classes
        self.backbone = backbone

        if loss is None:
            loss = {"type": "SoftTargetCrossEntropy" if mixup else "CrossEntropyLoss"}
        if mixup and loss.get("type") in ("LabelSmoothingCrossEntropy", "JsdCrossEntropy"):
            raise ValueError(
                f"loss type={loss['type']!r} takes no soft targets, which mixup makes; use "
                "SoftTargetCrossEntropy (mixup has label_smoothing) or BinaryCrossEntropy"
            )
        self.criterion = build_loss(loss)
        try:
            self.mixup = Mixup(**mixup, num_classes=num_classes) if mixup else None
            RandomErasing(**(random_erasing or {}), device="cpu")
        except (TypeError, AssertionError) as error:
            raise ValueError(f"mixup or random_erasing has a wrong argument: {error}") from error
        self.random_erasing = random_erasing
        # Set by SelfDistillationHook while it is on: (inputs, logits of each head) -> loss.
        self.distillation: Callable[[Tensor, Sequence[Tensor]], Tensor] | None = None

    def init_weights(self) -> None:
        """Load the file of `init_cfg`, if there is one; timm initialised the rest at construction.

        Raises:
            FileNotFoundError: if the file is not there.
            ValueError: if it does not hold weights of this model.
        """
        # mmengine's own walk would call the init_weights of timm's modules again and undo
        # pretrained=True, so it is not called.
        if self.init_cfg:
            self.load_backbone(self.init_cfg["checkpoint"])

    def load_backbone(self, checkpoint: str) -> None:
        """Load a checkpoint of the bare backbone through timm's own path, key mapping included."""
        try:
            source = create_with_weights(
                self.model_name, read_from_anywhere(checkpoint), self.create_args
            )
        except ValueError as error:
            raise ValueError(
                f"{checkpoint} does not hold weights of {self.model_name}: {error}"
            ) from error
        self.backbone.load_state_dict(source.state_dict())

    def forward(
        self,
        inputs: Tensor,
        labels: Tensor | None = None,
        img_path: list[str] | None = None,
        data_samples: None = None,
        mode: str = "tensor",
    ) -> dict[str, Tensor] | list[dict[str, Tensor]] | Tensor | tuple[Tensor, Tensor]:
        """Run the classifier.

        Args:
            inputs: (B, C, H, W), normalised.
            labels: (B,), class indices; needed by mode "loss".
            img_path: not used; where the images come from, for messages.
            data_samples: not used; mmengine's preprocessor adds it to each batch.
            mode: "loss" gives a dict of losses, "predict" one dict for each image (`pred_scores`
                (num_classes,) and, where labels are given, `gt_label`), "tensor" what the model
                returns.
        """
        if not isinstance(inputs, Tensor) or inputs.ndim != 4:
            found = tuple(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
            raise ValueError(f"the inputs are {found}: a tensor (B, C, H, W) is taken")
        if mode == "loss" and not isinstance(labels, Tensor):
            raise ValueError(f"labels is {labels!r}: a tensor (B,) of classes is needed for a loss")
        if mode == "loss":
            return self.loss(inputs, labels)
        logits = self.backbone(inputs)
        if mode == "tensor":
            return logits
        if mode != "predict":
            raise ValueError(f"mode={mode!r} is not one of loss, predict, tensor")
        scores = logits.float().softmax(dim=-1)
        if labels is None:
            return [{"pred_scores": score} for score in scores]
        return [
            {"pred_scores": score, "gt_label": label}
            for score, label in zip(scores, labels, strict=True)
        ]

    def loss(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Compute the training loss of a batch: inputs (B, C, H, W) normalised, labels (B,)."""
        if self.random_erasing:
            inputs = RandomErasing(**self.random_erasing, device=inputs.device)(inputs)
        if self.mixup:
            if len(inputs) % 2:
                raise ValueError(
                    f"mixup needs an even number of images and got a batch of {len(inputs)}; set "
                    "an even train_dataloader.batch_size and train_dataloader.drop_last=True"
                )
            inputs, labels = self.mixup(inputs, labels)
        logits = self.backbone(inputs)
        heads = logits if isinstance(logits, tuple) else (logits,)
        loss = torch.stack([self.criterion(head, labels) for head in heads]).mean()
        if self.distillation is None:
            return {"loss": loss}
        return {"loss_labels": loss, "loss_teacher": self.distillation(inputs, heads)}

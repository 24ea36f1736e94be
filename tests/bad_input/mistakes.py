"""What mistakes are made with: the smallest models, names of configs, a run of seconds."""

import timm
import torch

from densezoo.backbones.mmlab import DenseBackbone
from densezoo.tools.engine import ImageClassifier

CONFIG = "cas_vit_xs_8xb128_300e_in1k"
DETECTOR = "retinanet_cas_vit_xs_fpn_1x_coco"
IMAGE = torch.zeros(1, 3, 32, 32)


def create(**arguments):
    """Build the smallest model of three classes with these arguments."""
    small = dict(depths=(1, 1, 1, 1), num_classes=3)
    return timm.create_model("cas_vit_xs", **{**small, **arguments})


def features(**arguments):
    """Build the smallest model's feature extractor with these arguments."""
    return timm.create_model(
        "cas_vit_xs", features_only=True, **{"depths": (1, 1, 1, 1), **arguments}
    )


def dense(**arguments):
    """Build a DenseBackbone with these arguments."""
    return DenseBackbone(
        **{"model_name": "cas_vit_xs", "model_kwargs": dict(depths=(1, 1, 1, 1)), **arguments}
    )


def classifier(**arguments):
    """Build an ImageClassifier of three classes with these arguments."""
    return ImageClassifier(**{"model_name": "test_vit", "num_classes": 3, **arguments})


def snapshot(folder):
    """{path: (size, time of change)} of what is in a folder."""
    return {
        path: (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def classifier_options(stage):
    """The options that make the ImageNet config a run of seconds on the digits."""
    loaders = ("train_dataloader", "val_dataloader", "test_dataloader")
    return [
        "model.model_kwargs.depths=(1,1,1,1)",
        "model.num_classes=10",
        *(f"{loader}.dataset.root={stage / 'digits' / 'classes'}" for loader in loaders),
        *(f"{loader}.dataset.input_size=32" for loader in loaders),
        *(f"{loader}.num_workers=0" for loader in loaders),
        *(f"{loader}.persistent_workers=False" for loader in loaders),
        "train_dataloader.batch_size=4",
        "optim_wrapper.type=OptimWrapper",
        "param_scheduler=None",
    ]

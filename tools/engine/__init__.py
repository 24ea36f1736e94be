"""What mmengine's Runner needs beside mmdet's and mmseg's own parts.

Importing it registers, in mmengine's root registries, the classifier on timm's models with its
data sets, sampler and metric, and the optimizer constructor with layer-wise learning-rate decay.
"""

from .accuracy import TopKAccuracy
from .classifier import ImageClassifier
from .cpu import CpuAmpOptimWrapper
from .image_data import timm_dataset
from .layer_decay import LayerDecayOptimWrapperConstructor, timm_optimizer
from .lazy_parts import (
    RunnerFromConfig,
    durable_checkpoint_hook,
    reseed_hook,
    self_distillation_hook,
    stop_on_bad_loss_hook,
)
from .repeated_augmentation import RepeatedAugmentationSampler
from .segmentor import dense_segmentor

__all__ = [
    "CpuAmpOptimWrapper",
    "ImageClassifier",
    "LayerDecayOptimWrapperConstructor",
    "RepeatedAugmentationSampler",
    "RunnerFromConfig",
    "TopKAccuracy",
    "dense_segmentor",
    "durable_checkpoint_hook",
    "reseed_hook",
    "self_distillation_hook",
    "stop_on_bad_loss_hook",
    "timm_dataset",
    "timm_optimizer",
]

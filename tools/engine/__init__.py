"""What mmengine's Runner needs beside mmdet's and mmseg's own parts.

Importing it registers, in mmengine's root registries, the classifier on timm's models with its
data sets and metric, and the optimizer constructor with layer-wise learning-rate decay.
"""

from .accuracy import TopKAccuracy
from .classifier import ImageClassifier
from .cpu import CpuAmpOptimWrapper
from .image_data import epoch_seed_hook, timm_dataset
from .layer_decay import LayerDecayOptimWrapperConstructor, timm_optimizer

__all__ = [
    "CpuAmpOptimWrapper",
    "ImageClassifier",
    "LayerDecayOptimWrapperConstructor",
    "TopKAccuracy",
    "epoch_seed_hook",
    "timm_dataset",
    "timm_optimizer",
]

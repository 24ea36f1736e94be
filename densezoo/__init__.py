"""densezoo: hierarchical vision backbones for dense prediction.

Importing it registers every backbone in timm and, where mmengine is installed, the adapter
``DenseBackbone`` and the classification engine in mmengine's registries.
"""

import importlib.util

from . import backbones
from ._version import __version__
from .backbones import list_backbones
from .kernels import mmcv_ops

mmcv_ops.install()

if importlib.util.find_spec("mmengine") is not None:
    from .backbones import mmlab
    from .tools import engine

__all__ = ["__version__", "backbones", "list_backbones"]

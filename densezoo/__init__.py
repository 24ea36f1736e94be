"""densezoo: hierarchical vision backbones for dense prediction.

Importing it registers every backbone in timm and, where mmengine is installed, the adapter
``DenseBackbone`` and the classification engine in mmengine's registries.
"""

from importlib import import_module

from . import backbones
from ._version import __version__
from .backbones import list_backbones
from .kernels import mmcv_ops

mmcv_ops.install()

try:
    import_module("mmengine")
except ImportError:
    pass
else:
    for _registering in (".backbones.mmlab", ".tools.engine"):
        import_module(_registering, __name__)

__all__ = ["__version__", "backbones", "list_backbones"]

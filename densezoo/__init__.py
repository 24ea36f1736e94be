"""densezoo: hierarchical vision backbones for dense prediction.

Importing it registers every backbone in timm and, where mmengine is installed, the adapter
``DenseBackbone`` and the classification engine in mmengine's registries.
"""

from importlib import import_module

from ._interruption import end_commands_in_one_line

end_commands_in_one_line()  # before the imports below, which take seconds

from . import backbones  # noqa: E402
from ._version import __version__  # noqa: E402
from .backbones import list_backbones  # noqa: E402
from .kernels import mmcv_ops  # noqa: E402

mmcv_ops.install()

try:
    import_module("mmengine")
except ImportError:
    pass
else:
    for _registering in (".backbones.mmlab", ".tools.engine"):
        import_module(_registering, __name__)

__all__ = ["__version__", "backbones", "list_backbones"]

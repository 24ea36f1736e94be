"""The backbones; importing them registers every variant in timm."""

from .base import HierarchicalBackbone
from .cas_vit import CASViT
from .nat import NAT, DiNATS, fitting_dilations
from .nat_isotropic import IsotropicNAT, ViTRPB
from .registry import list_backbones

__all__ = [
    "CASViT",
    "DiNATS",
    "HierarchicalBackbone",
    "IsotropicNAT",
    "NAT",
    "ViTRPB",
    "fitting_dilations",
    "list_backbones",
]

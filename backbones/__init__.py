"""The backbones; importing them registers every variant in timm."""

from .base import HierarchicalBackbone
from .biformer import BiFormer, BiFormerSTL
from .cas_vit import CASViT
from .faster_vit import FasterViT
from .gc_vit import GCViT
from .maxvit import MaxViT
from .nat import NAT, DiNATS, fitting_dilations
from .nat_isotropic import IsotropicNAT, ViTRPB
from .ppma import PPMA, RMT
from .registry import list_backbones

__all__ = [
    "BiFormer",
    "BiFormerSTL",
    "CASViT",
    "DiNATS",
    "FasterViT",
    "GCViT",
    "HierarchicalBackbone",
    "IsotropicNAT",
    "MaxViT",
    "NAT",
    "PPMA",
    "RMT",
    "ViTRPB",
    "fitting_dilations",
    "list_backbones",
]

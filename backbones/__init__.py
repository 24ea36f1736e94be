"""The backbones; importing them registers every variant in timm."""

from .base import HierarchicalBackbone
from .cas_vit import CASViT
from .registry import list_backbones

__all__ = ["CASViT", "HierarchicalBackbone", "list_backbones"]

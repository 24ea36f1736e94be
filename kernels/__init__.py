"""Operators: each with a plain PyTorch definition and the fast paths that equal it."""

from .neighborhood_attention import neighborhood_attention

__all__ = ["neighborhood_attention"]

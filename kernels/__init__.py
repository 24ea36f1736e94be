"""Operators: each with a plain PyTorch definition and the fast paths that equal it."""

from .neighborhood_attention import neighborhood_attention
from .runtime import use_backend, which_backend

__all__ = ["neighborhood_attention", "use_backend", "which_backend"]

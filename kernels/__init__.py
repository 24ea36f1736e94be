"""Operators: each with a plain PyTorch definition and the fast paths that equal it."""

from .neighborhood_attention import neighborhood_attention
from .polyline_attention import polyline_attention
from .routing_attention import route_regions, routing_attention
from .runtime import use_backend, which_backend

__all__ = [
    "neighborhood_attention",
    "polyline_attention",
    "route_regions",
    "routing_attention",
    "use_backend",
    "which_backend",
]

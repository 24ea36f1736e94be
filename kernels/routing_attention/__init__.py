"""Routing attention: every region of a map attends to the regions that it routes to."""

from .dispatch import attend_known_routes, routing_attention
from .routing import route_regions

__all__ = ["attend_known_routes", "route_regions", "routing_attention"]

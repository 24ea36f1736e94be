"""Polyline attention: tokens of a map attend to each other along paths whose steps decay."""

from .dispatch import attend_with_decays, polyline_attention

__all__ = ["attend_with_decays", "polyline_attention"]

"""Neighborhood attention: every query attends to a window of keys around it."""

from .dispatch import neighborhood_attention

__all__ = ["neighborhood_attention"]

"""Operators: each with a plain PyTorch definition and the fast paths that equal it."""

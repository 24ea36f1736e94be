"""Arguments of models on the command line: ``--model-kwargs KEY=VALUE``."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any


def read_model_arguments(words: Sequence[str]) -> dict[str, Any]:
    """Read ``KEY=VALUE`` arguments: values are Python's literals, lists as tuples, or else texts.

    Raises:
        ValueError: a word is not of that form, or a key is given twice.
    """
    arguments: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"--model-kwargs takes KEY=VALUE, as in num_regions=16, not {word!r}")
        if key in arguments:
            raise ValueError(f"--model-kwargs has {key} twice")
        try:
            arguments[key] = freeze(ast.literal_eval(value))
        except (ValueError, SyntaxError):
            arguments[key] = value
    return arguments


def freeze(value: Any) -> Any:
    """Turn lists, also those within others, into tuples."""
    return tuple(map(freeze, value)) if isinstance(value, (list, tuple)) else value

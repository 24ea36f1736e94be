"""Checks of arguments, each of which raises a ValueError that names the argument and its value."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def is_whole_number(value: object) -> bool:
    """Whether `value` is an integer, of Python or NumPy; a bool is not."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def check_whole_number(
    name: str, value: object, lowest: int | None = None, highest: int | None = None
) -> None:
    """Raise a ValueError unless `value` is a whole number from `lowest` to `highest`.

    Python's and NumPy's integers are, bools and floats are not.
    """
    if (
        not is_whole_number(value)
        or (lowest is not None and value < lowest)
        or (highest is not None and value > highest)
    ):
        limits = "" if lowest is None else f" of at least {lowest}"
        limits += "" if highest is None else f" and at most {highest}"
        raise ValueError(f"{name} is {value!r}: a whole number{limits} is taken")


def check_number(name: str, value: object, lowest: float, highest: float = float("inf")) -> None:
    """Raise a ValueError unless `value` is a finite number from `lowest` to `highest`."""
    is_number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if not is_number or not lowest <= value <= highest or value == float("inf"):
        limits = (
            f"of at least {lowest}" if highest == float("inf") else f"from {lowest} to {highest}"
        )
        raise ValueError(f"{name} is {value!r}: a number {limits} is taken")


def check_flag(name: str, value: object) -> None:
    """Raise a ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}: True or False is taken")


def check_mapping(name: str, value: object, reserved: tuple[str, ...] = ()) -> None:
    """Raise a ValueError unless `value` is a dict with names as keys, none of them `reserved`."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name} is {value!r}: a dict of arguments by name is taken")
    for key in reserved:
        if key in value:
            raise ValueError(f"{name} has {key!r}, which is an argument of its own: move it there")

"""Whether an image file can be decoded, independent of who failed to."""

from __future__ import annotations

import io
import os
from functools import lru_cache
from pathlib import Path

from PIL import Image

# First and last bytes of the formats that OpenCV decodes without an error when the end is missing.
ENDS = {b"\xff\xd8\xff": b"\xff\xd9", b"\x89PNG\r\n\x1a\n": b"IEND\xaeB`\x82"}


def decoding_problem(content: bytes) -> str | None:
    """Decode an image whole and return what is wrong with it, or None."""
    if not content:
        return "the file is empty"
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises half a dozen types for what is broken
        return " ".join(f"{error or type(error).__name__}".split())
    return None


@lru_cache(maxsize=100_000)
def _file_problem(path: str, size: int) -> str | None:
    return decoding_problem(Path(path).read_bytes())


def quick_problem(path: str) -> str | None:
    """Look at the ends of a local file for what decoders may pass over, and return it, or None.

    A JPEG or PNG that does not end as one is decoded whole, once. Files on remote stores and of
    other formats are not looked at.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(8)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 8))
            tail = file.read()
    except FileNotFoundError:
        return None  # loading it tells, by whatever backend the data set has
    except OSError as error:
        return error.strerror or str(error)
    if not size:
        return "the file is empty"
    for begin, end in ENDS.items():
        if head.startswith(begin) and not tail.endswith(end):
            return _file_problem(path, size)
    return None


def unreadable_message(name: str, problem: str) -> str:
    """Say that an image of data that must be whole can't be read."""
    return (
        f"image {name} of the validation or test data can't be read ({problem}); figures without "
        "it would be wrong: repair it, or remove it from the data set"
    )

"""Image files as users have them: found in folders, and read as upright 8-bit RGB."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif")


class UnusableImage(ValueError):
    """An image that can't be read, or of which nothing can be predicted."""


def find_images(folder: Path, *, beside: Path | None = None) -> list[Path]:
    """List the images in a folder and the folders in it, sorted, hidden ones left out.

    Args:
        folder: where to look; links to folders are not followed.
        beside: a folder whose content is left out.

    Raises:
        ValueError: there is no image.
        OSError: a folder can't be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    left_out = None if beside is None else beside.resolve()
    images = []
    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and Path(parent, name).resolve() != left_out
        ]
        images += [
            Path(parent, name)
            for name in files
            if not name.startswith(".") and name.lower().endswith(SUFFIXES)
        ]
    if not images:
        raise ValueError(f"folder {folder} holds no image ({', '.join(SUFFIXES)})")
    return sorted(images)


def check_header(path: str | os.PathLike) -> None:
    """Raise as :func:`read_image` does for a file that does not begin as an image."""
    _open(path).close()


def read_image(path: str | os.PathLike) -> Image.Image:
    """Read an image as 8-bit RGB, turned upright as its EXIF data says.

    Of 16 bits the upper 8 are kept, rounded; transparency is left out, as in training; of an
    animation the first frame is taken.

    Raises:
        FileNotFoundError: There is no such file.
        UnusableImage: The file is not an image that Pillow can read, is damaged or too large, or
            holds values of unknown range.
    """
    with _open(path) as image, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on odd metadata and palettes
        try:
            # What is turned knows its format no more.
            return _to_rgb(ImageOps.exif_transpose(image), image.format)
        except MemoryError:
            raise
        except Exception as error:  # Pillow raises half a dozen types for damaged files
            reason = str(error) or type(error).__name__
            raise UnusableImage(f"{path} can't be read: {reason}") from error


def _open(path: str | os.PathLike) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on odd metadata, and images over half the limit
            return Image.open(path)
    except FileNotFoundError:
        raise
    except UnidentifiedImageError as error:
        what = "is empty" if not os.path.getsize(path) else "is not an image"
        raise UnusableImage(f"{path} {what}") from error
    except Image.DecompressionBombError as error:
        limit = 2 * Image.MAX_IMAGE_PIXELS
        raise UnusableImage(
            f"{path} is too large: up to {limit / 1e6:.0f} million pixels are read; scale it down "
            "or cut it"
        ) from error
    except OSError as error:
        raise UnusableImage(f"{path} can't be read: {error.strerror or error}") from error
    except Exception as error:  # as in read_image
        reason = str(error) or type(error).__name__
        raise UnusableImage(f"{path} can't be read: {reason}") from error


def _to_rgb(image: Image.Image, file_format: str | None) -> Image.Image:
    """Convert an image of any mode to RGB by the whole range of its values."""
    # Older Pillow gives 16-bit files of these formats as 32-bit integers.
    is_16_bit = image.mode == "I" and file_format in ("PNG", "PPM")
    if image.mode.startswith("I;16") or is_16_bit:
        values = np.asarray(image).astype(np.int64)
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode in ("I", "F"):
        kind = "floating-point numbers" if image.mode == "F" else "32-bit integers"
        raise ValueError(
            f"its pixels are {kind} of unknown range; save it with 8 or 16 bits a channel"
        )
    return image.convert("RGB")

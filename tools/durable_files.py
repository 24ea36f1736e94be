"""Files that are the old one or the new one at any moment, whatever interrupts the writing."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

# Of a file that is being written: ".epoch_3.pth.unfinished", which no pattern of checkpoints takes.
UNFINISHED = ".unfinished"


def write_durably(path: str | os.PathLike, content: bytes) -> None:
    """Write a file so that at any moment `path` is the old file or the new one, on disk.

    Raises:
        OSError: it could not be written; `filename` is `path`, and the old file is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}{UNFINISHED}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if hasattr(os, "O_DIRECTORY"):
            _sync_folder(path.parent)
    except BaseException as error:  # Ctrl-C included
        with contextlib.suppress(OSError):  # the first error is the one to tell
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None
        raise


def _sync_folder(folder: Path) -> None:
    """Bring the names in a folder to disk, where its file system can do that by itself."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems sync names with the files and refuse folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)

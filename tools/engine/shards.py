"""timm's reader of WebDataset shards, made to name its images and to leave none out in silence."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from typing import Any

from timm.data.readers import reader_wds
from timm.data.readers.reader_wds import ReaderWds

from .errors import RunStopped
from .image_files import decoding_problem, unreadable_message


class NamedShards:
    """The pipeline of a reader of shards, which timm builds around the functions of this object.

    Args:
        reader: timm's; its pipeline is built anew, in the process that iterates over it.
        on_unreadable: called with the name of an image that can't be decoded and the reason,
            before it is left out; None is for data that must be whole and raises.
        seed: of the order of images, which timm would take from PyTorch's worker; None leaves it.

    Attributes:
        name: of the image that was decoded last.
    """

    def __init__(
        self,
        reader: ReaderWds,
        on_unreadable: Callable[[str, str], None] | None,
        seed: int | None,
    ) -> None:
        self.name = ""
        self._on_unreadable = on_unreadable
        self._decode = reader_wds._decode
        # The pipeline is made of these two functions of timm's module, which drop what fails.
        originals = reader_wds._decode, reader_wds.log_and_continue
        reader_wds._decode, reader_wds.log_and_continue = self.decode, self.fail
        try:
            reader._lazy_init()
            if seed is not None:
                # Now that the reader knows its worker, it takes no other seed from it.
                reader.worker_seed = seed
                reader._lazy_init()
        finally:
            reader_wds._decode, reader_wds.log_and_continue = originals

    def decode(self, sample: dict[str, Any], **options: Any) -> dict[str, Any] | None:
        """Decode a sample as timm does; None leaves it out."""
        self.name = f"{sample['__url__']}: {sample['__key__']}"
        try:
            return self._decode(sample, **options)
        except Exception:
            keys = options["image_key"].split(";")
            content = next((sample[key] for key in keys if key in sample), None)
            problem = (
                f"there is no entry {' or '.join(keys)}"
                if content is None
                else decoding_problem(content)
            )
            if problem is None:
                raise
            if self._on_unreadable is None:
                raise RunStopped(unreadable_message(self.name, problem)) from None
            self._on_unreadable(self.name, problem)
            return None

    @staticmethod
    def fail(error: Exception) -> bool:
        """Let an error through; one of reading a shard stops the run with its name.

        Raises:
            Exception: always.
        """
        if isinstance(error, (tarfile.TarError, OSError, EOFError)):
            reason, *_, shard = [text for text in error.args if isinstance(text, str)] or [error]
            raise RunStopped(
                f"shard {shard} can't be read ({reason}); repair it, or take it out of the split"
            ) from error
        raise error

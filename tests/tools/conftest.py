"""Small real data for the tests of the tools."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def _images(classes, num_images):
    """Yield (label, number, PNG bytes) of noisy images whose class is their strongest colour."""
    generator = np.random.default_rng(0)
    for label in range(len(classes)):
        for number in range(num_images):
            pixels = generator.integers(0, 120, (40, 48, 3), dtype=np.uint8)
            pixels[..., 2 - label] += 120
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            yield label, number, buffer.getvalue()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="session")
def colours(tmp_path_factory) -> Path:
    """A folder with the same 21 images three times over: as class folders, under ``folder/train``
    and ``folder/val``; as the tar file ``classes.tar``; as the WebDataset shards
    ``shards/colours-{0..2}.tar``.
    """
    root = tmp_path_factory.mktemp("colours")
    classes = ("blue", "green", "red")
    # 7 of each class: no multiple of a batch, nor of a number of workers.
    samples = list(_images(classes, num_images=7))
    for split in ("train", "val"):
        for label, number, content in samples:
            path = root / "folder" / split / classes[label] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    with tarfile.open(root / "classes.tar", "w") as archive:
        for label, number, content in samples:
            _add(archive, f"{classes[label]}/{number}.png", content)
    (root / "shards").mkdir()
    for shard in range(3):
        with tarfile.open(root / "shards" / f"colours-{shard}.tar", "w") as archive:
            for index, (label, _, content) in enumerate(samples[shard::3]):
                _add(archive, f"{shard}{index:04d}.png", content)
                _add(archive, f"{shard}{index:04d}.cls", str(label).encode())
    return root

"""How the benchmarks run, what their records say of the run, and the files these go to."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from .count_macs import first_line

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Setup:
    """How models are run.

    Attributes:
        batch: images a step.
        dtype: of weights and images, a name of `DTYPES`.
        device: as torch names it.
        threads: of PyTorch on the CPU.
        channels_last: whether weights and images are in channels-last memory.
        compile: whether models go through `torch.compile`, in one graph.
        train: forward and backward in training mode, rather than inference.
        features_only: the stage maps alone, without norm and head.
    """

    batch: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    channels_last: bool = False
    compile: bool = False
    train: bool = False
    features_only: bool = False

    def check(self) -> None:
        """Raise a ValueError for a setup that cannot be run."""
        for name in ("batch", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: at least 1 is taken")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}: one of {', '.join(DTYPES)} is taken")
        try:
            if torch.empty(1, device=self.device).device.type not in ("cpu", "cuda"):
                raise RuntimeError("cpu and cuda are taken")
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise ValueError(
                f"device {self.device!r} cannot be used: {first_line(error)}"
            ) from error


@contextlib.contextmanager
def limit_threads(number: int) -> Iterator[None]:
    """Let PyTorch use `number` threads of the CPU inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def describe_run(setup: Setup) -> dict[str, Any]:
    """Describe the setup, the machine and the versions: what every row of a CSV repeats."""
    device = torch.device(setup.device)
    return dict(
        mode="training" if setup.train else "inference",
        features_only=setup.features_only,
        batch=setup.batch,
        dtype=setup.dtype,
        layout="channels_last" if setup.channels_last else "contiguous",
        compiled=setup.compile,
        threads=setup.threads,
        device=_device_name(device),
        driver=_driver_version() if device.type == "cuda" else "",
        torch=torch.__version__,
        timm=importlib.metadata.version("timm"),
        triton=_triton_version(),
        python=platform.python_version(),
        densezoo=__version__,
        commit=_commit(),
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _run_quietly(*command: str) -> str | None:
    """Return what a command prints, None where it fails or does not exist."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _driver_version() -> str:
    query = _run_quietly("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return query.splitlines()[0] if query else ""


def _commit() -> str:
    """Give the commit of the checkout this file is tracked in, "+changes" where it has some."""
    git = ("git", "-C", str(Path(__file__).parent))
    if _run_quietly(*git, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return ""
    commit = _run_quietly(*git, "rev-parse", "--short=12", "HEAD")
    if commit is None:
        return ""
    # Of tracked files: the CSV that is being written is none yet.
    changes = _run_quietly(*git, "status", "--porcelain", "--untracked-files=no")
    return commit + ("+changes" if changes else "")


@contextlib.contextmanager
def new_file(path: str | None) -> Iterator[Any]:
    """Open a file that must not be there yet, at once; it goes away again if the work fails."""
    if path is None:
        yield None
        return
    try:
        file = open(path, "x", newline="", encoding="utf-8")
    except FileExistsError as error:
        raise FileExistsError(f"--out {path} is there already: name another file") from error
    except OSError as error:
        raise type(error)(
            f"--out {path} cannot be written ({error.strerror}): name a file in an existing folder"
        ) from error
    try:
        with file:
            yield file
    except BaseException:
        Path(path).unlink()
        raise

"""The process group of a distributed run: joined before it, left after it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed


@contextmanager
def process_group(cfg: dict) -> Iterator[None]:
    """Connect the processes of ``cfg["launcher"]``, and part when the run has ended well.

    On GPUs as ``env_cfg.dist_cfg`` of the config says (`backend`, `timeout` in seconds, ...);
    without a GPU through gloo, with the same timeout. A group that exists already is used, and
    kept. After an error the others are not waited for, so the group is left as it is.

    Raises:
        ValueError: if slurm or mpi started processes on a machine without a GPU.
    """
    launcher = cfg.get("launcher", "none")
    if launcher == "none" or distributed.is_initialized():
        yield
        return
    dist_cfg = dict(cfg.get("env_cfg", {}).get("dist_cfg", {}))
    if torch.cuda.is_available():
        from mmengine.dist import init_dist

        # Else mmengine chooses another one, and warns as the Runner sets the config's.
        method = (cfg.get("env_cfg", {}).get("mp_cfg") or {}).get("mp_start_method")
        if method and multiprocessing.get_start_method(allow_none=True) is None:
            multiprocessing.set_start_method(method)
        init_dist(launcher, **dist_cfg)
    elif launcher == "pytorch":
        timeout = dist_cfg.get("timeout")
        distributed.init_process_group(
            "gloo", timeout=None if timeout is None else timedelta(seconds=timeout)
        )
    else:
        raise ValueError(
            f"--launcher {launcher} needs GPUs; without one start the processes with torchrun and "
            "--launcher pytorch"
        )
    yield
    distributed.destroy_process_group()


def check_equal_lengths(loops: Sequence[object]) -> None:
    """Check that every process has as many batches in its loaders as the others.

    Otherwise some would wait for the gradients of one that has none left.

    Raises:
        ValueError: on every process, with the counts.
    """
    if not distributed.is_initialized():
        return
    for loop in loops:
        try:
            count = len(loop.dataloader)
        except TypeError:  # an iterable data set of unknown length
            count = None
        counts = [None] * distributed.get_world_size()
        distributed.all_gather_object(counts, count)
        if len(set(counts)) > 1:
            ranks = ", ".join(f"rank {rank} has {count}" for rank, count in enumerate(counts))
            raise ValueError(
                f"the processes have different numbers of batches for {type(loop).__name__}: "
                f"{ranks}; all of them need the same data, and a sampler that divides it, such as "
                "DefaultSampler"
            )

"""A run of mmengine's that takes a second: for the tests of hooks, and to be killed by them.

As a script, ``small_run.py WORK_DIR SEED KILLS`` trains in processes that it kills at random
moments, and checks after each what is left.
"""

import itertools
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn

import densezoo  # noqa: F401  registers the hooks
from densezoo.backbones.checkpoints import read_checkpoint
from densezoo.tools.engine.checks import find_last_checkpoint

_run_numbers = itertools.count()


class Line(BaseModel):
    """A line through points, with as many useless numbers as a checkpoint is to weigh."""

    def __init__(self, size=0):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.register_buffer("ballast", torch.zeros(size))

    def forward(self, x, mode="loss"):
        y = self.layer(x)
        return {"loss": (y - 1).square().mean()} if mode == "loss" else [y]


class Given(BaseMetric):
    """A metric with given figures, one a validation."""

    def __init__(self, figures):
        super().__init__()
        self.figures = iter(figures)

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        return {"score": next(self.figures)}


def make_runner(work_dir, *, figures=None, size=0, hooks=(), resume_from=None, **checkpoint):
    """Build a Runner of five epochs of two iterations, with the checkpoint hook's options."""
    by_epoch = checkpoint.get("by_epoch", True)
    loader = dict(
        batch_size=2,
        num_workers=0,
        sampler=dict(type="DefaultSampler" if by_epoch else "InfiniteSampler", shuffle=False),
        collate_fn=dict(type="default_collate"),
        dataset=[dict(x=torch.ones(1)) for _ in range(4)],
    )
    validation = {}
    if figures is not None:
        validation = dict(
            val_dataloader=loader, val_cfg=dict(), val_evaluator=Evaluator(Given(figures))
        )
    return Runner(
        Line(size),
        str(work_dir),
        train_dataloader=loader,
        train_cfg=dict(by_epoch=True, max_epochs=5)
        if by_epoch
        else dict(by_epoch=False, max_iters=10**6),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
        default_hooks=dict(
            bad_loss=dict(type="StopOnBadLossHook"),
            checkpoint=dict(type="DurableCheckpointHook", **{"interval": 1, **checkpoint}),
        ),
        custom_hooks=list(hooks),
        load_from=str(resume_from) if resume_from else None,
        resume=resume_from is not None,
        default_scope="mmengine",
        log_level="ERROR",
        experiment_name=f"small{os.getpid()}_{next(_run_numbers)}",
        **validation,
    )


def _kill_runs(work_dir: Path, seed: int, kills: int) -> None:
    """Start a run, kill it, look at what is left, and go on from there."""
    generator = random.Random(seed)
    record = work_dir / "last_checkpoint"
    reached = [0]
    while len(reached) <= kills:
        last = find_last_checkpoint(work_dir)
        before = record.read_text() if last else ""
        assert str(last or "") == before, "the record was of no use"
        pid = os.fork()
        if not pid:
            options = dict(by_epoch=False, max_keep_ckpts=2, size=1_000_000)
            make_runner(work_dir, resume_from=last, **options).train()
        while not record.exists() or record.read_text() == before:
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the run ended by itself"
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.2))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        checkpoint = read_checkpoint(record.read_text(), mmap=False)
        assert checkpoint["state_dict"]["ballast"].shape == (1_000_000,)
        assert checkpoint["meta"]["iter"] > reached[-1]
        reached.append(checkpoint["meta"]["iter"])
        for path in work_dir.glob("*.pth"):
            read_checkpoint(path, mmap=False)
        # The two to keep, and one that comes or goes.
        assert len(list(work_dir.glob("*.pth"))) <= 3, list(work_dir.iterdir())
    print("iterations reached:", *reached[1:])


if __name__ == "__main__":
    torch.set_num_threads(1)
    _kill_runs(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

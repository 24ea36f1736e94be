"""Shared fixtures."""

import os

import pytest
import torch

import densezoo  # noqa: F401  offers mmcv._ext before a test imports mmcv.ops

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores; more threads than cores cost several times the time. Tests'
    # subprocesses inherit the variable.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture
def settle():
    """Give a model BatchNorm statistics of data, as a trained one has, and return it in eval."""

    def settle_(model, *, in_chans=3, size=(64, 64), steps=6):
        generator = torch.Generator().manual_seed(0)
        model.train()
        with torch.no_grad():
            for _ in range(steps):
                model(torch.randn(4, in_chans, *size, generator=generator))
            for parameter in model.parameters():
                if parameter.ndim == 1:  # norms' affine parts and biases, zeros and ones at first
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_(0.1 * noise.to(parameter))
        return model.eval()

    return settle_

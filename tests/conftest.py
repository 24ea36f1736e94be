"""Shared fixtures; the mode that Triton's kernels are tested in, and how many tests did."""

import os

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Kernels are compiled or interpreted as is said when they are imported, so before anything.
    os.environ["TRITON_INTERPRET"] = "1"

import densezoo  # noqa: E402, F401  offers mmcv._ext before a test imports mmcv.ops

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
        has_statistics = any(isinstance(m, _BatchNorm) for m in model.modules())
        with torch.no_grad():
            for _ in range(steps if has_statistics else 0):
                model(torch.randn(4, in_chans, *size, generator=generator))
            for parameter in model.parameters():
                if parameter.ndim == 1:  # norms' affine parts and biases, zeros and ones at first
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_(0.1 * noise.to(parameter))
        return model.eval()

    return settle_


@pytest.fixture
def kernel_device(record_property):
    """Give the device that Triton's kernels run on here: a GPU, or the CPU in the interpreter.

    What nobody has written is NaN meanwhile, so that an element that a kernel leaves out cannot
    pass. The tests are counted in the last lines of the run.
    """
    record_property("kernel_mode", torch.cuda.get_device_name() if HAS_GPU else "interpreter")
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan().all()
    yield torch.device("cuda" if HAS_GPU else "cpu")
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items):
    """Skip what needs a GPU where there is none."""
    if HAS_GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU, there is none"))


def pytest_terminal_summary(terminalreporter):
    """Say how many tests ran Triton's kernels, and where."""
    modes = [
        value
        for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
        if report.when == "call"
        for name, value in report.user_properties
        if name == "kernel_mode"
    ]
    where = ", ".join(sorted(set(modes))) or "none was selected"
    terminalreporter.write_line(
        f"Tests of Triton kernels that ran: {len(modes)} ({where})", yellow=not modes
    )

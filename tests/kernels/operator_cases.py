"""What tests of operators share: rounded numbers, errors that a path may have, counted reads."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def rounded_normal(generator, dtype=torch.float64, device="cpu"):
    """Give what makes tensors of a shape from `generator`, normally distributed.

    The numbers are those of float16 and bfloat16 alike, so that every dtype computes on the same.
    """

    def normal(*shape):
        numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
        return numbers.to(torch.bfloat16).to(torch.float16).to(device=device, dtype=dtype)

    return normal


def assert_within_budget(actual, eager, exact, slack=0.0):
    """Hold results to at most twice the error of the plain PyTorch path in the same dtype.

    Maximum and mean of the error count, each plus one rounding of the result's own size.

    Args:
        actual: results of a path, {name: tensor}.
        eager: those of the reference in the same dtype, on the same numbers.
        exact: those of the reference in float64, on the same numbers.
        slack: what more is allowed, as a share of the result's own size.
    """
    assert actual.keys() == eager.keys() == exact.keys()
    for name, truth in exact.items():
        assert actual[name].dtype == eager[name].dtype, name
        assert actual[name].shape == truth.shape, name
        assert torch.isfinite(actual[name]).all(), name
        error = (actual[name].double() - truth).abs()
        allowed = (eager[name].double() - truth).abs()
        epsilon = torch.finfo(actual[name].dtype).eps
        for measure in (torch.Tensor.max, torch.Tensor.mean):
            limit = 2 * measure(allowed) + (epsilon + slack) * measure(truth.abs())
            assert measure(error) <= limit, (
                f"{name}: {measure.__name__} error {measure(error):.3g}, at most {limit:.3g}"
            )


class CountReads(TorchDispatchMode):
    """Count how often Python reads a number of a tensor, which makes a GPU wait."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))

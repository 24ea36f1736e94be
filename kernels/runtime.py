"""Which path an operator takes: names of backends, how one is asked for, and why one is declined.

Every operator has an ordered list of backends, each able to say why it cannot run a call. The
first that can is taken, unless one is asked for: by the operator's argument ``backend``, inside
:func:`use_backend`, or by the environment variable ``DENSEZOO_BACKEND``, in this order of
precedence. A backend that is asked for runs or raises a ValueError; there is no silent fallback.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd import forward_ad

BACKENDS = ("triton", "cpu", "reference")
VARIABLE = "DENSEZOO_BACKEND"

_CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_used_backend: ContextVar[str | None] = ContextVar("densezoo_backend", default=None)
_is_kept_whole: ContextVar[bool] = ContextVar("densezoo_is_kept_whole", default=False)
_DERIVATIVES = (torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp)
_choosers: dict[Callable[..., Any], Callable[..., Choice]] = {}


@dataclass(frozen=True)
class Choice:
    """The path that a call takes.

    Attributes:
        backend: its name.
        reason: why it is taken.
        declined: why not, for each backend that stands before it in the operator's list.
    """

    backend: str
    reason: str
    declined: dict[str, str] = field(default_factory=dict)


def check_backend(name: object, source: str) -> None:
    """Raise a ValueError unless `name` is one of :data:`BACKENDS`; `source` says whose it is."""
    if name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}: one of {', '.join(BACKENDS)} is taken")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Take this backend for every operator that is called inside, in this thread or task.

    An argument ``backend`` of a call goes first. A compiled or exported model keeps the backend
    that it was traced with.

    Raises:
        ValueError: there is no such backend.
    """
    check_backend(name, "the backend of use_backend")
    token = _used_backend.set(name)
    try:
        yield
    finally:
        _used_backend.reset(token)


def requested_backend(argument: str | None = None) -> tuple[str | None, str]:
    """Tell which backend is asked for, and by what.

    Args:
        argument: the operator's argument ``backend``.

    Returns:
        The name, None if none is asked for, and the way that it is asked for.

    Raises:
        ValueError: the argument or the environment variable names no backend.
    """
    if argument is not None:
        check_backend(argument, "backend")
        return argument, f"backend={argument!r}"
    return _surrounding_backend()


@torch.compiler.assume_constant_result
def _surrounding_backend() -> tuple[str | None, str]:
    """Look at :func:`use_backend` and the environment; a compiled model keeps what was found."""
    name = _used_backend.get()
    if name is not None:
        return name, f"use_backend({name!r})"
    name = os.environ.get(VARIABLE) or None
    if name is not None:
        check_backend(name, f"the environment variable {VARIABLE}")
        return name, f"{VARIABLE}={name}"
    return None, ""


def choose(
    operator: str,
    refusals: Mapping[str, Callable[[], str | None]],
    argument: str | None = None,
) -> Choice:
    """Choose the backend of a call.

    Args:
        operator: name of the operator, for messages.
        refusals: for each backend of the operator, in order, what tells why it cannot run the
            call, or None when it can.
        argument: the operator's argument ``backend``.

    Raises:
        ValueError: the backend that is asked for does not exist or cannot run the call.
    """
    requested, way = requested_backend(argument)
    if requested is not None:
        refusal = refusals[requested]() if requested in refusals else "the operator has no such"
        if refusal is not None:
            raise ValueError(
                f"{way} cannot run this call of {operator}: {refusal}; ask for another backend "
                "or for none, which takes the first that can"
            )
        return Choice(requested, f"{way} asks for it")
    if is_taken_apart() and "reference" in refusals:
        return Choice("reference", "a trace is made, which gets plain PyTorch")
    return first_able(operator, refusals)


def first_able(operator: str, refusals: Mapping[str, Callable[[], str | None]]) -> Choice:
    """Choose the first backend that can run a call, whatever is asked for; see :func:`choose`.

    Raises:
        ValueError: none can.
    """
    declined: dict[str, str] = {}
    for backend, refuse in refusals.items():
        is_unasked = backend == "triton" and is_interpreted()
        refusal = "its interpreter runs when asked for by name" if is_unasked else refuse()
        if refusal is None:
            reason = f"the first of {', '.join(refusals)} that can run the call"
            return Choice(backend, reason, declined)
        declined[backend] = refusal
    reasons = "; ".join(f"{backend}: {refusal}" for backend, refusal in declined.items())
    raise ValueError(f"no backend can run this call of {operator}: {reasons}")


def register_chooser(operator: Callable[..., Any], chooser: Callable[..., Choice]) -> None:
    """Let :func:`which_backend` ask `chooser`, which takes the operator's arguments."""
    _choosers[operator] = chooser


def which_backend(operator: Callable[..., Any], *args: Any, **kwargs: Any) -> Choice:
    """Tell which path a call would take and why, without running it.

    Args:
        operator: an operator of densezoo.kernels.
        *args: its arguments.
        **kwargs: its keyword arguments.

    Raises:
        ValueError: `operator` is none, or the call itself would raise one.
    """
    if operator not in _choosers:
        names = ", ".join(known.__name__ for known in _choosers)
        raise ValueError(f"operator is {operator!r}: one of densezoo.kernels is taken: {names}")
    return _choosers[operator](*args, **kwargs)


@contextmanager
def operators_whole() -> Iterator[None]:
    """Keep operators whole in torch.jit.trace, which gets their plain PyTorch form otherwise.

    For tools that read a trace and know the operators, as counting MACs does.
    """
    token = _is_kept_whole.set(True)
    try:
        yield
    finally:
        _is_kept_whole.reset(token)


def is_taken_apart() -> bool:
    """Whether a trace is being made that should hold plain PyTorch in place of operators."""
    return torch.jit.is_tracing() and not _is_kept_whole.get()


def why_no_operator() -> str | None:
    """Tell why no operator of ours can be called, whatever runs it; None if it can."""
    if torch.compiler.is_compiling():
        return None
    transforms = torch._C._functorch.get_interpreter_stack() or ()
    if any(transform.key() in _DERIVATIVES for transform in transforms):
        return "torch.func differentiates it, which plain PyTorch alone allows"
    if forward_ad._current_level >= 0:
        return "it is differentiated in forward mode, which plain PyTorch alone allows"
    return None


def why_no_cpu_path(tensor: torch.Tensor) -> str | None:
    """Tell why no operator's CPU path takes such a tensor, or None if they do."""
    if tensor.device.type != "cpu":
        return f"it runs on CPU tensors, these are on {tensor.device}"
    if tensor.dtype not in _CPU_DTYPES:
        return f"it has no {tensor.dtype}"
    return None


@torch.compiler.assume_constant_result
def is_interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, which is decided when they are imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result
def why_no_triton(device: torch.device) -> str | None:
    """Tell why no Triton kernel runs on tensors of a device, or None if they do.

    Triton is imported only when the device may run its kernels.
    """
    if device.type == "cpu" and not is_interpreted():
        return "the tensors are on the CPU (TRITON_INTERPRET=1 would interpret the kernels there)"
    if device.type not in ("cpu", "cuda"):
        return f"the tensors are on the device {device.type!r}, the kernels are for CUDA and ROCm"
    refusal = _why_no_import()
    if refusal is None and device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 7:
            return f"the GPU has compute capability {major}.{minor}, Triton needs 7.0"
    return refusal


@functools.cache
def _why_no_import() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return None

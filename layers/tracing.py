"""What is being done with a call beside running it: autograd, tracing, compiling, transforming."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad
from torch.fx.experimental import symbolic_shapes

# A length of an axis: a symbol where a program is traced for more than one.
Length = int | torch.SymInt

# Whether a length is known while Dynamo traces; None where Dynamo cannot say (torch < 2.8).
_has_static_value = getattr(symbolic_shapes, "has_static_value", None)


def is_plain_inference() -> bool:
    """Whether operators run as they are called and nothing records or transforms them.

    False under autograd, compilers, exporters, tracing, function transforms, forward-mode
    derivatives and dispatch modes (counters, fake tensors), which are to see plain operators.
    """
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


def is_eager() -> bool:
    """Whether operators run as they are called, if under autograd, and no program is made of them.

    False under compilers, exporters, tracing and function transforms.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def is_exporting() -> bool:
    """Whether a program is traced by an exporter, other than by way of Dynamo."""
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


def is_open(length: Length) -> bool:
    """Whether a program is traced for more lengths of an axis than this one."""
    if torch.compiler.is_dynamo_compiling():  # which shows symbols as integers
        return _has_static_value is None or not _has_static_value(length)
    return isinstance(length, torch.SymInt)


def larger(length: Length, least: Length) -> Length:
    """Give the larger of two lengths, without a branch where one is a symbol."""
    # Dynamo takes max for sym_max, and fails at the latter (torch 2.6) where it is constant.
    if not _is_symbol(length, least):
        return max(length, least)
    # What is known of ranges goes in at once; else it would in some of the places alone.
    if symbolic_shapes.statically_known_true(length >= least):
        return length
    return torch.sym_max(length, least)


def smaller(length: Length, most: Length) -> Length:
    """Give the smaller of two lengths, without a branch where one is a symbol."""
    if not _is_symbol(length, most):
        return min(length, most)
    if symbolic_shapes.statically_known_true(length >= most):
        return most
    return torch.sym_min(length, most)


def _is_symbol(*lengths: Length) -> bool:
    is_symbol = any(isinstance(length, torch.SymInt) for length in lengths)
    return is_symbol and not torch.compiler.is_dynamo_compiling()

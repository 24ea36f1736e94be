"""What tests of the operators' Triton kernels share: cases, and how results are held to the truth.

The cases are small enough for the interpreter, whose tiles are 4 x 8 members of a group (1-D: 16)
in neighborhood attention, 16 tokens in routing attention, and 32 of a row (axial form: 16) in
polyline attention.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import neighborhood_cases
import polyline_cases
import routing_cases
import torch
from operator_cases import assert_within_budget

from densezoo.kernels import triton_launch
from densezoo.kernels.polyline_attention.decays import Polyline
from densezoo.kernels.polyline_attention.reference import polyline_attention_reference
from densezoo.kernels.routing_attention.reference import routing_attention_reference
from densezoo.kernels.routing_attention.regions import cut


@dataclass(frozen=True)
class Suite:
    """An operator's cases.

    Attributes:
        cases: the module of its cases, with make_inputs and run_case.
        path: the module that launches its kernels.
        small: cases for every run.
        half: those of them that are run in half precision too.
        odd: many cases.
        tuned: cases that take each kind of tiling, of `head_dim` channels.
        usual: a case as large as a model's.
        lse: gives the lse of a case's inputs where run_case does not.
    """

    cases: ModuleType
    path: ModuleType
    small: list
    half: list
    odd: list
    tuned: list
    usual: object
    lse: Callable | None = None


def _neighborhood_suite():
    Case = neighborhood_cases.Case
    small = [
        Case((5, 9), (3, 5), has_bias=True, heads=1, head_dim=16),
        Case((7, 7), (7, 7), has_bias=True, heads=1, head_dim=32),
        Case((9, 8), (5, 3), has_bias=True, heads=2, batch=2, head_dim=16),
        Case((13, 14), (13, 13), has_bias=True, heads=1, head_dim=16),
        Case((8, 11), (7, 7), has_bias=True, heads=1, head_dim=49),
        Case((9, 11), (3, 3), (2, 3), has_bias=True, heads=1, head_dim=32),
        Case((8, 8), (4, 4), (2, 2), heads=1, head_dim=16),
        Case((5, 10), (4, 6), heads=1, head_dim=16),
        Case((6, 13), (2, 2), heads=1, head_dim=16),
        Case((9, 11), (5, 3), stride=(2, 3), heads=1, head_dim=16),
        Case((7, 10), (4, 4), stride=(4, 4), heads=1, head_dim=16),
        Case((7, 9), (3, 4), is_causal=(True, True), heads=1, head_dim=16),
        Case((11, 9), (4, 3), (2, 1), (3, 2), (True, False), heads=1, head_dim=16),
        Case((6, 9), (3, 3), has_bias=True, num_extra=3, heads=2, batch=2, head_dim=16),
        Case((5, 7), (3, 3), (1, 2), (2, 1), (False, True), num_extra=17, heads=1, head_dim=16),
        Case((33,), (7,), (2,), has_bias=True, heads=2, batch=2, head_dim=32),
        Case((40,), (13,), has_bias=True, heads=1, head_dim=16),
        Case((23,), (5,), stride=(3,), is_causal=(True,), num_extra=1, heads=1, head_dim=49),
        Case((5,), (3,), stride=(2,), is_causal=(True,), heads=1, head_dim=16),
        Case((18,), (4,), (3,), scale=0.4, heads=1, head_dim=100),
    ]
    return Suite(
        cases=neighborhood_cases,
        path=importlib.import_module("densezoo.kernels.neighborhood_attention.triton"),
        small=small,
        # Sums in half precision are worth a few cases of each kind.
        half=[small[index] for index in (0, 4, 5, 12, 13, 17)],
        odd=neighborhood_cases.ODD_CASES
        + neighborhood_cases.random_cases(30, seed=5, num_axes=(1, 2)),
        tuned=[
            Case((41, 56), (7, 7), has_bias=True, num_extra=3),
            Case((14, 15), (7, 7), (2, 2), has_bias=True, num_extra=3),
            Case((300,), (7,), has_bias=True, num_extra=3),
        ],
        usual=Case((56, 41), (7, 7), has_bias=True, num_extra=2, batch=2, heads=3, head_dim=32),
    )


def _routing_lse(case, inputs):
    tensors = [inputs[name] for name in routing_cases.TENSORS]
    regions = cut(case.grid, case.num_regions, case.region_size)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    return routing_attention_reference(*tensors, regions, scale)[1]


def _routing_suite():
    Case, pads = routing_cases.Case, routing_cases.PADS
    small = [
        # By regions: of several tiles, of one token, fewer than those kept, all kept.
        Case((8, 10), (2, 2), 1, heads=1, head_dim=32),
        Case((9, 11), (2, 2), 2, pads=pads, heads=1, head_dim=16, batch=2),
        Case((3, 5), (6, 6), 3, pads=pads, heads=1, head_dim=16),
        Case((9, 10), (2, 2), 1, region_size=(8, 6), pads=("pad_key",), heads=2, head_dim=16),
        Case((5, 9), (2, 2), 2, repeats=True, heads=1, head_dim=20, value_dim=33),
        Case((5, 6), (2, 2), 1, region_size=(2, 3), heads=1, head_dim=16),
        # Dense: more work by tiles of regions; repeats are weights there.
        Case((6, 10), (4, 5), 5, heads=2, head_dim=16),
        Case((7, 9), (4, 4), 7, pads=pads, repeats=True, heads=1, head_dim=16, batch=2),
        Case((5, 6), (3, 3), 4, pads=("pad_value",), heads=1, head_dim=49, value_dim=18),
    ]
    return Suite(
        cases=routing_cases,
        path=importlib.import_module("densezoo.kernels.routing_attention.triton"),
        small=small,
        # Of the last padded tokens have most of the weight, and gradients their largest rounding.
        half=[*(small[index] for index in (1, 4, 7)), Case((1, 1), (3, 3), 9, pads=pads)],
        odd=routing_cases.ODD_CASES + routing_cases.random_cases(30, seed=5),
        tuned=[
            Case((100, 115), (8, 8), 3, pads=pads),
            Case((60, 75), (8, 8), 5, pads=pads),
            Case((39, 30), (8, 8), 6, pads=pads),
            Case((30, 23), (8, 8), 4, pads=pads),
            Case((27, 27), (7, 7), 46, pads=pads),
        ],
        usual=Case((50, 76), (16, 16), 16, pads=pads, batch=2, heads=3, head_dim=32),
        lse=_routing_lse,
    )


def _polyline_lse(case, inputs):
    tensors = [inputs[name] for name in polyline_cases.TENSORS]
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    return polyline_attention_reference(*tensors, Polyline(case.form, case.paths), scale)[1]


def _polyline_suite():
    Case = polyline_cases.Case
    small = [
        Case((3, 5), heads=1, head_dim=16),
        Case((2, 3), "full", "row_first", batch=2, head_dim=20, value_dim=33),
        Case((4, 3), "axial", heads=1, head_dim=16),
        Case((2, 3), "axial", "row_first", head_dim=49, value_dim=18),
        # Several blocks of keys; of two tiles the second has one slot for sums of its row. Columns
        # are the lines that attend to two values at a time.
        Case((2, 35), decay=0.1, heads=1, head_dim=16),
        Case((18, 1), "axial", decay=0.1, heads=1, head_dim=16),
        # Decays that underflow, none, one column of several images and heads, one token.
        Case((3, 2), decay=40.0, heads=1, head_dim=16),
        Case((2, 2), decay=0.0, heads=1, head_dim=16),
        Case((2, 2), "axial", decay=0.0, scale=0.4, head_dim=16),
        Case((2, 1), batch=2, head_dim=16),
        Case((1, 1), "axial", heads=1, head_dim=16),
    ]
    return Suite(
        cases=polyline_cases,
        path=importlib.import_module("densezoo.kernels.polyline_attention.triton"),
        small=small,
        half=small[:4],
        odd=polyline_cases.ODD_CASES + polyline_cases.random_cases(30, seed=5),
        tuned=[
            Case(grid, form, paths, batch=2)
            for grid in ((15, 14), (9, 30), (33, 76))
            for form in ("full", "axial")
            for paths in ("both", "row_first")
        ],
        usual=Case((25, 38), decay=0.1, batch=2, heads=3, head_dim=32),
        lse=_polyline_lse,
    )


SUITES = {
    "neighborhood_attention": _neighborhood_suite(),
    "polyline_attention": _polyline_suite(),
    "routing_attention": _routing_suite(),
}


def assert_exact(name, case, dtype, device, **options):
    """Hold the output and all gradients of an operator's kernels to the float64 reference.

    Within twice the error of the reference in the dtype.
    """
    cases = SUITES[name].cases
    inputs = cases.make_inputs(case, device=device)
    exact = cases.run_case(case, inputs, "reference", **options)
    lse = SUITES[name].lse(case, inputs) if SUITES[name].lse else exact.get("lse")
    inputs = cases.make_inputs(case, dtype, device=device)
    eager = cases.run_case(case, inputs, "reference", **options)
    actual = cases.run_case(case, inputs, "triton", **options)
    # The backward kernels compute the weights from the lse, with its rounding in float32.
    slack = 0.0
    if lse is not None:
        slack = float(lse.abs().max()) * torch.finfo(torch.float32).eps
    assert_within_budget(actual, eager, exact, slack)


def each_tiling(path, monkeypatch):
    """Let kernels have one candidate of their tuning at a time, until each was alone once."""
    tilings, index, most = path.tilings, 0, 1
    try:
        while index < most:
            numbers = []

            def one_of(*args, index=index, numbers=numbers):
                found = tilings(*args)
                numbers.append(len(found))
                return (found[index % len(found)],)

            monkeypatch.setattr(path, "tilings", one_of)
            triton_launch.tuned_kernel.cache_clear()
            yield
            index, most = index + 1, max(numbers)
    finally:
        triton_launch.tuned_kernel.cache_clear()

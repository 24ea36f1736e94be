"""``densezoo bench-kernels``: time and memory of operators beside other ways to compute them.

For every shape, all peers take turns in one process: each round times every peer once, and each
time is also given as a multiple of ours in the same round, so that a machine that slows down
slows all alike. A peer is timed once its output, and in training its gradients, are checked
against the definition in float64. The floor is the time that the operator's FLOPs or its bytes,
whichever takes longer, need at the rates that this machine was measured to reach in a large
matrix product of the same dtype and in a large copy.

With ``--fit``, the times of shapes that differ in their maps alone are fitted to a power of the
number of tokens.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import math
import shlex
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..kernels.runtime import BACKENDS
from . import neighborhood_peers, polyline_peers, routing_peers
from .bench_setup import DTYPES, Setup, describe_run, limit_threads, new_file
from .count_macs import first_line
from .kernel_shapes import (
    list_neighborhood_runs,
    list_neighborhood_shapes,
    list_polyline_runs,
    list_polyline_shapes,
    list_routing_runs,
    list_routing_shapes,
)
from .operator_cases import AttentionCase, DeclinedError
from .step_memory import measure_peak

EXAMPLE = (
    "densezoo bench-kernels neighborhood_attention --shapes 'dinat_mini@*' --vs gather flex "
    "--threads 1 --out kernels.csv"
)

OURS = "ours"
PASSES = ("forward", "forward+backward")
MIN_ROUNDS = 3
WARMUP = 3  # steps of a peer before its turns: the check's, one on the clock, one for its memory
TURN_MS = 20.0  # a turn is as many steps as take this long
LEAST_MAPS = 3  # numbers of tokens that times are fitted to
# Largest difference from the definition in float64, as a share of the largest value: what
# rounding makes of long sums in the dtype. Windows that are wrong at borders give 0.1 and more.
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Operator:
    """An operator that can be timed.

    Attributes:
        list_runs: lists the published models' runs, each with a `name` that holds an "@".
        list_shapes: takes runs, gives {shape: names of those that meet it}; a shape has a `name`
            without an "@".
        make_case: makes the case of a shape.
        describe_ours: names the backend that our operator takes for a case.
        peers: by name; each takes a case and whether it is for training, and returns the function
            of the inputs that is timed, or raises a DeclinedError. The first one is ours.
        default_shapes: patterns of what is timed if nothing is asked for.
        legend: how names of shapes are to be read.
    """

    list_runs: Callable[[], list[Any]]
    list_shapes: Callable[[Sequence[Any]], dict[Any, tuple[str, ...]]]
    make_case: Callable[..., AttentionCase]
    describe_ours: Callable[[Any], str]
    peers: dict[str, Callable[[Any, bool], Callable[..., torch.Tensor]]]
    default_shapes: tuple[str, ...]
    legend: str


OPERATORS = {
    "neighborhood_attention": Operator(
        list_neighborhood_runs,
        list_neighborhood_shapes,
        neighborhood_peers.NeighborhoodCase,
        neighborhood_peers.describe_ours,
        {
            OURS: neighborhood_peers.make_ours,
            "gather": neighborhood_peers.make_gather,
            "flex": neighborhood_peers.make_flex,
            "sdpa": neighborhood_peers.make_sdpa,
            "natten": neighborhood_peers.make_natten,
        },
        ("dinat_mini@224x224",),
        "HEIGHTxWIDTH-hHEADSxCHANNELS-kKERNEL-dDILATION",
    ),
    "routing_attention": Operator(
        list_routing_runs,
        list_routing_shapes,
        routing_peers.RoutingCase,
        routing_peers.describe_ours,
        {
            OURS: routing_peers.make_ours,
            "gather": routing_peers.make_gather,
            "flex": routing_peers.make_flex,
            "sdpa": routing_peers.make_sdpa,
        },
        ("biformer_tiny@224x224",),
        "HEIGHTxWIDTH-hHEADSxCHANNELS-sREGIONS-kTOPK",
    ),
    "polyline_attention": Operator(
        list_polyline_runs,
        list_polyline_shapes,
        polyline_peers.PolylineCase,
        polyline_peers.describe_ours,
        {
            OURS: polyline_peers.make_ours,
            "masks": polyline_peers.make_masks,
            "flex": polyline_peers.make_flex,
            "sdpa": polyline_peers.make_sdpa,
        },
        ("ppma_tiny@224x224",),
        "HEIGHTxWIDTH-hHEADSxCHANNELS-FORM-pNUM_PATHS",
    ),
}


@dataclass(frozen=True)
class Ceilings:
    """What the machine was measured to reach.

    Attributes:
        flops: a second, in a large matrix product.
        bytes: a second, read and written in a large copy.
    """

    flops: float
    bytes: float


@dataclass(frozen=True)
class Plan:
    """How operators are timed.

    Attributes:
        setup: batch, dtype, device and threads; nothing else of it is used.
        peers: what to compare with; all if None.
        passes: of `PASSES`.
        backend: what computes ours, by name; the operator chooses if None.
        has_bias: whether operators' biases are among the inputs: those of relative positions, and
            the key and value of padded tokens.
        rounds: turns of each peer.
        seconds: rounds end after this time at a shape and pass, but not before 3 of them; a peer
            whose step takes as long is left out.
        memory_limit: GiB that a peer may need by its estimate.
    """

    setup: Setup
    peers: Sequence[str] | None = None
    passes: Sequence[str] = PASSES
    backend: str | None = None
    has_bias: bool = True
    rounds: int = 20
    seconds: float = 10.0
    memory_limit: float = 2.0

    def check(self) -> None:
        """Raise a ValueError for a plan that cannot be carried out."""
        self.setup.check()
        known = {name for operator in OPERATORS.values() for name in operator.peers} - {OURS}
        check_known("a peer of --vs", self.peers or (), sorted(known))
        check_known("a pass of --passes", self.passes, PASSES)
        check_known("backend", [self.backend] if self.backend else (), BACKENDS)
        if self.rounds < MIN_ROUNDS:
            raise ValueError(
                f"repeats is {self.rounds}: at least {MIN_ROUNDS} alternations are taken"
            )
        for name, number in (("seconds", self.seconds), ("memory", self.memory_limit)):
            if not 0 < number < math.inf:
                raise ValueError(f"{name} is {number}: a number over 0 is taken")


@dataclass
class _Runner:
    """A peer on a case: ready to be timed, or the reason why it is not."""

    peer: str
    status: str = "timed"
    backend: str = ""
    error: float | None = None
    step: Callable[[], None] | None = None
    calls: int = 1
    memory_mib: float | None = None


def select_shapes(
    operators: Sequence[str], patterns: Sequence[str]
) -> dict[str, dict[Any, tuple[str, ...]]]:
    """Select published shapes by their names or by those of the runs that meet them.

    Args:
        operators: names of `OPERATORS`.
        patterns: shell patterns of runs where they hold an "@", such as "dinat_mini@*", else of
            shapes, such as "*-k11-*"; "all" takes all. Each operator's own choice if none.

    Returns:
        For each operator that has some: the shapes, for each the names of the runs that meet it,
        as far as these are looked at: all of them, unless the patterns are of runs alone.

    Raises:
        ValueError: a pattern matches nothing.
    """
    selected, matched = {}, set()
    for operator in operators:
        found, hits = _select(OPERATORS[operator], patterns or OPERATORS[operator].default_shapes)
        matched |= hits
        if found:
            selected[operator] = found
    for pattern in patterns:
        if pattern not in matched:
            examples = " or ".join(OPERATORS[name].default_shapes[0] for name in operators)
            legends = " or ".join(OPERATORS[name].legend for name in operators)
            raise ValueError(
                f"--shapes {pattern!r} matches no shape of {', '.join(operators)}: a pattern with "
                f"an @ is of models and image sizes, as of {examples}, one without is of shapes, "
                f"{legends}, and all takes all; --list shows them"
            )
    return selected


def _select(ways: Operator, patterns: Sequence[str]) -> tuple[dict[Any, tuple[str, ...]], set[str]]:
    """Select an operator's shapes; give those patterns too that match one."""
    runs = ways.list_runs()
    chosen = [run for run in runs if _matches(run.name, [p for p in patterns if "@" in p])]
    is_of_runs = all("@" in pattern for pattern in patterns)
    shapes = ways.list_shapes(chosen if is_of_runs else runs)
    known = [run.name for run in runs] + [shape.name for shape in shapes]
    matched = {p for p in patterns if p == "all" or any(_matches(name, [p]) for name in known)}
    patterns = ["*" if pattern == "all" else pattern for pattern in patterns]
    selected = {
        shape: names
        for shape, names in shapes.items()
        if any(_matches(name, patterns) for name in (shape.name, *names))
    }
    return selected, matched


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def check_known(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Raise a ValueError for the first name that is not known."""
    for name in names:
        if name not in known:
            raise ValueError(f"{what} is {name!r}: one of {', '.join(known)} is taken")


def measure_ceilings(setup: Setup) -> Ceilings:
    """Measure the rates of matrix products and copies, each the best of several trials."""
    device, dtype = torch.device(setup.device), DTYPES[setup.dtype]
    side = 512 if device.type == "cpu" else 8192
    a, b = torch.rand(2, side, side).to(device, dtype)
    product_ms = _time_best(lambda: torch.mm(a, b), device)
    # Filled with ones, both: the system gives memory of zeros without giving any.
    source, target = torch.ones(2, 2**25 if device.type == "cpu" else 2**28, device=device)
    copy_ms = _time_best(lambda: target.copy_(source), device)
    return Ceilings(1000 * 2 * side**3 / product_ms, 1000 * 2 * source.nbytes / copy_ms)


def _time_best(step: Callable[[], Any], device: torch.device) -> float:
    # Trials are short and many: other programs interrupt some of them.
    return min(_time(step, 1, device) for _ in range(30))


def _time(step: Callable[[], Any], calls: int, device: torch.device) -> float:
    """Time `calls` steps in a row: milliseconds a step."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(calls):
                step()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / calls
    begin = time.perf_counter()
    for _ in range(calls):
        step()
    return 1000 * (time.perf_counter() - begin) / calls


def measure(
    operator: str, shapes: dict[Any, tuple[str, ...]], plan: Plan, ceilings: Ceilings
) -> Iterator[list[dict[str, Any]]]:
    """Time an operator and its peers in turn, at each shape and pass for itself.

    Args:
        operator: a name of `OPERATORS`.
        shapes: what to time, with the names of the runs that meet it.
        plan: how to time it.
        ceilings: of the machine.

    Yields:
        For each shape and pass a row a peer, ours first. Times are milliseconds a step; the
        multiple of ours is the median over rounds of the ratio within a round.

    Raises:
        ValueError: the backend that the plan asks for cannot compute a shape.
    """
    setup, ways = plan.setup, OPERATORS[operator]
    with limit_threads(setup.threads):
        for shape, runs in shapes.items():
            case = ways.make_case(
                shape=shape,
                batch=setup.batch,
                dtype=DTYPES[setup.dtype],
                device=torch.device(setup.device),
                has_bias=plan.has_bias,
                memory_limit=int(plan.memory_limit * 2**30),
                backend=plan.backend,
            )
            for name in plan.passes:
                is_training = name == "forward+backward"
                flops, num_bytes = case.count_flops(is_training), case.count_bytes(is_training)
                floor_ms = 1000 * max(flops / ceilings.flops, num_bytes / ceilings.bytes)
                peers = [
                    peer
                    for peer in ways.peers
                    if peer == OURS or plan.peers is None or peer in plan.peers
                ]
                runners = [_prepare(ways, peer, case, is_training, plan) for peer in peers]
                times = _time_in_turn(runners, case.device, plan)
                about = {
                    "operator": operator,
                    "shape": shape.name,
                    "tokens": shape.num_tokens,
                    "runs": " ".join(runs),
                    "pass": name,
                    "bias": plan.has_bias,
                    "flops": flops,
                    "bytes": num_bytes,
                    "floor_ms": round(floor_ms, 4),
                }
                yield [{**about, **_make_row(runner, times, about)} for runner in runners]


def _prepare(operator: Operator, peer: str, case: Any, is_training: bool, plan: Plan) -> _Runner:
    """Check a peer against the definition, warm it up and measure its memory.

    Raises:
        ValueError: the backend that the plan asks for cannot compute the case.
    """
    tolerance, seconds = TOLERANCES[plan.setup.dtype], plan.seconds
    backend = operator.describe_ours(case) if peer == OURS else ""  # raises for one that can't
    runner = _Runner(peer, backend=backend)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # compilers' hints
            forward = operator.peers[peer](case, is_training)
            runner.error = case.measure_error(forward, is_training)
            if not runner.error <= tolerance:
                runner.status = f"wrong: off by {runner.error:.1e}, {tolerance:g} is allowed"
                return runner
            step = _make_step(forward, case, is_training)
            step_ms = _time(step, 1, case.device)
            if step_ms > 1000 * seconds:
                raise DeclinedError(
                    f"a step takes {step_ms / 1000:.0f} s, the limit is {seconds:g}"
                )
            runner.memory_mib = measure_peak(step, case.device)
    except DeclinedError as error:
        runner.status = f"declined: {error}"
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AssertionError) as error:
        runner.status = f"failed: {first_line(error)}"
    else:
        runner.step = step
        runner.calls = max(1, math.ceil(TURN_MS / step_ms))
    return runner


def _make_step(
    forward: Callable[..., torch.Tensor], case: Any, is_training: bool
) -> Callable[[], None]:
    """Make what is timed: inference, or a forward pass and the gradients of all inputs."""
    leaves = [x.detach().requires_grad_(is_training) for x in case.inputs]

    def infer() -> None:
        with torch.inference_mode():
            forward(*leaves)

    def train() -> None:
        torch.autograd.grad(forward(*leaves), leaves, case.grad_out)

    return train if is_training else infer


def _time_in_turn(
    runners: Sequence[_Runner], device: torch.device, plan: Plan
) -> dict[str, list[float]]:
    """Time every peer that can be once a round: milliseconds a step, a list a peer."""
    ready = [runner for runner in runners if runner.step is not None]
    times: dict[str, list[float]] = {runner.peer: [] for runner in ready}
    begin = time.perf_counter()
    for number in range(plan.rounds if ready else 0):
        if number >= MIN_ROUNDS and time.perf_counter() - begin > plan.seconds:
            break
        for runner in ready:
            times[runner.peer].append(_time(runner.step, runner.calls, device))
    return times


def _make_row(
    runner: _Runner, times: dict[str, list[float]], about: dict[str, Any]
) -> dict[str, Any]:
    """Make the columns of a row that are a peer's own; those of times are empty without times."""
    own = np.array(times.get(runner.peer, []))
    row: dict[str, Any] = dict(
        peer=runner.peer,
        backend=runner.backend,
        status=runner.status,
        error=None if runner.error is None else f"{runner.error:.1e}",
        **dict.fromkeys(("median_ms", "p20_ms", "p80_ms", "x_ours", "gflops_per_s")),
        floor_share=None,
        memory_mib=None if runner.memory_mib is None else round(runner.memory_mib, 2),
        rounds=len(own),
        steps_per_round=runner.calls,
        warmup=WARMUP,
    )
    if not len(own):
        return row
    p20, median, p80 = (float(x) for x in np.percentile(own, [20, 50, 80]))
    row.update(
        median_ms=round(median, 4),
        p20_ms=round(p20, 4),
        p80_ms=round(p80, 4),
        gflops_per_s=round(about["flops"] / median / 1e6, 2),
        floor_share=round(about["floor_ms"] / median, 4),
    )
    if OURS in times:
        row["x_ours"] = round(float(np.median(own / np.array(times[OURS]))), 3)
    return row


COLUMNS = (
    ("shape", 24),
    ("pass", 5),
    ("peer", 16),
    ("ms", 9),
    ("p20", 9),
    ("p80", 9),
    ("x-ours", 7),
    ("MiB", 8),
    ("GFLOP/s", 8),
    ("floor-%", 7),
)
SHORT_PASSES = {"forward": "fwd", "forward+backward": "f+b"}


def _format_line(cells: Sequence[str]) -> str:
    """Align the cells of a line that is printed before the next ones are known."""
    return "  ".join(
        cell.rjust(width) if i > 2 else cell.ljust(width)
        for i, (cell, (_, width)) in enumerate(zip(cells, COLUMNS, strict=False))
    ).rstrip()


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """Format the rows of a shape and pass as lines of the table."""
    lines = []
    for row in rows:
        peer = f"{row['peer']} ({row['backend']})" if row["backend"] else row["peer"]
        cells = [row["shape"], SHORT_PASSES[row["pass"]], peer]
        if row["median_ms"] is None:
            lines.append(_format_line(cells) + f"  {row['status']}")
            continue
        ratio = "-" if row["x_ours"] is None else f"{row['x_ours']:.2f}"
        cells += [f"{row[name]:.3f}" for name in ("median_ms", "p20_ms", "p80_ms")]
        cells += [ratio, f"{row['memory_mib']:.1f}", f"{row['gflops_per_s']:.1f}"]
        lines.append(_format_line([*cells, f"{100 * row['floor_share']:.1f}"]))
    return "\n".join(lines)


def format_summary(rows: Sequence[dict[str, Any]]) -> str:
    """Say how peers compare with ours over an operator's shapes: geometric mean, least and most."""
    lines = []
    operators = dict.fromkeys(row["operator"] for row in rows)
    groups = dict.fromkeys((row["operator"], row["pass"], row["peer"]) for row in rows)
    for operator, name, peer in groups:
        ratios = [
            row["x_ours"]
            for row in rows
            if (row["operator"], row["pass"], row["peer"]) == (operator, name, peer)
            and row["x_ours"] is not None
        ]
        if ratios and peer != OURS:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            of_operator = f"{operator}, " if len(operators) > 1 else ""
            lines.append(
                f"{of_operator}{name}: {peer} takes {mean:.2f} times as long as ours "
                f"({min(ratios):.2f} to {max(ratios):.2f}; geometric mean of {len(ratios)} shapes)"
            )
    absent = [row for row in rows if row["peer"] == OURS and row["median_ms"] is None]
    lines += [
        f"{row['shape']}, {row['pass']}: ours is not timed: {row['status']}" for row in absent
    ]
    return "\n".join(lines)


def _but_for_the_map(shape: str) -> str:
    """Give what a shape's name says after the size of its map."""
    return shape.partition("-")[2]


def check_fit(operators: dict[str, dict[Any, tuple[str, ...]]]) -> None:
    """Raise a ValueError unless some shapes differ in their maps alone, enough for a fit."""
    tokens: dict[tuple[str, str], set[int]] = {}
    for name, shapes in operators.items():
        for shape in shapes:
            group = name, _but_for_the_map(shape.name)
            tokens.setdefault(group, set()).add(shape.num_tokens)
    if not any(len(numbers) >= LEAST_MAPS for numbers in tokens.values()):
        raise ValueError(
            f"--fit takes at least {LEAST_MAPS} shapes that differ in their maps alone: choose "
            "more with --shapes, such as 'ppma_tiny@*:square' of polyline_attention"
        )


def fit_times(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Fit times to powers of the number of tokens, over shapes that differ in their maps alone.

    Args:
        rows: as `measure` gives them. Each gets a column `exponent`, the power of its shape's
            group, pass and peer; None where fewer than 3 numbers of tokens were timed.

    Returns:
        A line a fit.
    """
    lines, groups = [], {}
    for row in rows:
        key = row["operator"], _but_for_the_map(row["shape"]), row["pass"], row["peer"]
        groups.setdefault(key, []).append(row)
        row["exponent"] = None
    for (operator, form, name, peer), members in groups.items():
        timed = [row for row in members if row["median_ms"] is not None]
        tokens = sorted({row["tokens"] for row in timed})
        if len(tokens) < LEAST_MAPS:
            continue
        x, y = (np.log([row[column] for row in timed]) for column in ("tokens", "median_ms"))
        exponent, constant = np.polyfit(x, y, 1)
        furthest = math.exp(np.abs(y - exponent * x - constant).max())
        for row in members:
            row["exponent"] = round(float(exponent), 3)
        lines.append(
            f"{operator} {form}, {name}: {peer} takes time as tokens^{exponent:.2f} over "
            f"{len(tokens)} maps of {tokens[0]} to {tokens[-1]} tokens (each within a factor of "
            f"{furthest:.2f})"
        )
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``densezoo bench-kernels``."""
    parser.add_argument(
        "operators", nargs="*", metavar="OPERATOR", help=f"all of {', '.join(OPERATORS)} if none"
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=(),
        metavar="PATTERN",
        help="published shapes: all, or patterns of their names (56x56-h2x32-k7-d8) or of the "
        "models and image sizes that meet them, such as 'dinat_mini@*', '*@800x1333*', "
        "'*@*:ade20k' and 'ppma_tiny@*:square' (default: "
        + ", ".join(f"{ways.default_shapes[0]} of {name}" for name, ways in OPERATORS.items())
        + ")",
    )
    parser.add_argument("--list", action="store_true", help="print the shapes and stop")
    parser.add_argument(
        "--fit",
        action="store_true",
        help="fit times to a power of the number of tokens, over shapes that differ in their maps "
        f"alone and have at least {LEAST_MAPS} of them",
    )
    parser.add_argument(
        "--vs",
        nargs="+",
        metavar="PEER",
        help="what to compare with; all by default: gather (keys and values of each query's "
        "neighbours or regions copied, then multiplied), masks (masks of all pairs built, then "
        "softmaxes), flex (FlexAttention, compiled), sdpa (scaled_dot_product_attention under a "
        "mask), natten (where it is installed)",
    )
    parser.add_argument("--passes", nargs="+", default=list(PASSES), help=", ".join(PASSES))
    parser.add_argument("--backend", help=f"of ours: {', '.join(BACKENDS)}; its own choice if none")
    parser.add_argument(
        "--no-bias",
        action="store_true",
        help="no relative position biases, and zeros as padded tokens",
    )
    parser.add_argument("--batch", type=int, default=1, help="images a step")
    parser.add_argument("--dtype", default="float32", help=", ".join(DTYPES))
    parser.add_argument("--device", help="cuda where there is one, else cpu")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch on the CPU")
    parser.add_argument(
        "--repeats",
        type=int,
        default=20,
        metavar="N",
        help=f"times that each peer has its turn, at least {MIN_ROUNDS}",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=10.0,
        help=f"a shape and pass is left after this time, once {MIN_ROUNDS} turns are taken; a peer "
        "whose step takes as long is left out",
    )
    parser.add_argument(
        "--memory",
        type=float,
        default=2.0,
        metavar="GIB",
        help="peers that would need more by their estimate are left out",
    )
    parser.add_argument("--out", metavar="CSV", help="a new file for the rows")


def run(args: argparse.Namespace) -> None:
    """Time operators, print the table as it grows and write it where `--out` says.

    Raises:
        ValueError: an argument is wrong.
    """
    operators = args.operators or list(OPERATORS)
    check_known("operator", operators, OPERATORS)
    plan = Plan(
        Setup(
            batch=args.batch,
            dtype=args.dtype,
            device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
            threads=args.threads,
        ),
        peers=args.vs,
        passes=args.passes,
        backend=args.backend,
        has_bias=not args.no_bias,
        rounds=args.repeats,
        seconds=args.seconds,
        memory_limit=args.memory,
    )
    plan.check()
    selected = select_shapes(operators, args.shapes)
    if args.fit:
        check_fit(selected)
    if args.list:
        for shapes in selected.values():
            for shape, runs in shapes.items():
                print(f"{shape.name:{COLUMNS[0][1]}}  {' '.join(runs)}")
        return
    with new_file(args.out) as file:
        with limit_threads(args.threads):
            ceilings = measure_ceilings(plan.setup)
        facts = {
            **_describe(plan.setup),
            "memory_kind": "peak of the allocator",
            "matmul_gflops_per_s": round(ceilings.flops / 1e9, 1),
            "copy_gb_per_s": round(ceilings.bytes / 1e9, 1),
            "command": _command(args),
        }
        print(format_heading(facts, selected))
        rows = []
        for operator, shapes in selected.items():
            for group in measure(operator, shapes, plan, ceilings):
                print(format_rows(group), flush=True)
                rows += group
        fits = fit_times(rows) if args.fit else []
        if file is not None:
            writer = csv.DictWriter(file, [*rows[0], *facts], lineterminator="\n")
            writer.writeheader()
            writer.writerows({**row, **facts} for row in rows)
    print(format_summary(rows), *fits, sep="\n")
    if args.out is not None:
        print(f"rows written to {args.out}")


def _describe(setup: Setup) -> dict[str, Any]:
    """Describe machine, versions and what of the setup concerns operators."""
    facts = describe_run(setup)
    return {
        name: fact
        for name, fact in facts.items()
        if name not in ("mode", "features_only", "compiled", "timm")
    }


def format_heading(facts: dict[str, Any], operators: Iterable[str]) -> str:
    """Format the machine, what the columns are, and the table's head."""
    is_cpu = not facts["driver"]
    memory = "PyTorch's allocations on the CPU" if is_cpu else "PyTorch's allocator on the GPU"
    return "\n".join(
        [
            f"{facts['device']}, threads {facts['threads']}, batch {facts['batch']}, "
            f"{facts['dtype']}; measured ceilings: {facts['matmul_gflops_per_s']} GFLOP/s in a "
            f"matrix product, {facts['copy_gb_per_s']} GB/s in a copy",
            f"torch {facts['torch']}, triton {facts['triton'] or 'absent'}, densezoo "
            f"{facts['densezoo']} {facts['commit']}",
            "ms a step: median and percentiles, peers taking turns; x-ours: time over ours; MiB: "
            f"peak of {memory}, results\nincluded; floor-%: share of the speed that the ceilings "
            "allow; fwd: forward, f+b: forward and backward; shape:\n"
            + ", ".join(OPERATORS[name].legend for name in operators),
            _format_line([name for name, _ in COLUMNS]),
        ]
    )


def _command(args: argparse.Namespace) -> str:
    """Write out the command that the arguments come from, defaults included."""
    words = ["densezoo", "bench-kernels", *args.operators]
    for name in ("shapes", "vs", "passes"):
        words += [f"--{name}", *getattr(args, name)] if getattr(args, name) else []
    for name in ("backend", "batch", "dtype", "device", "threads", "repeats", "seconds", "memory"):
        if getattr(args, name) is not None:
            words += [f"--{name}", str(getattr(args, name))]
    return shlex.join(words + ["--no-bias"] * args.no_bias + ["--fit"] * args.fit)


if __name__ == "__main__":
    from .cli import run_module

    run_module("bench-kernels")

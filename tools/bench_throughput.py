"""``densezoo bench``: time and memory of models on images of random values, side by side.

Models are timed in turn in one process: each round times every model once, and each time is also
given as a multiple of timm's resnet50 in the same round, so that a machine that slows down slows
all alike. Weights are random; the settings are PyTorch's defaults but for what the arguments say.

A transcription is a model of the zoo written as its official code computes it, with the weights
of the model that it is compared with; it is timed once both are found to give the same outputs.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..backbones.registry import find_backbone
from ..kernels.runtime import BACKENDS, check_backend, use_backend
from .bench_setup import DTYPES, Setup, describe_run, limit_threads, new_file
from .count_macs import build_model, check_size, count_macs, first_line, input_size
from .model_arguments import freeze, read_model_arguments
from .step_memory import measure_peak, measure_saved
from .tables import format_table
from .transcriptions import TRANSCRIPTIONS, StageMaps, transcribe

EXAMPLE = (
    "densezoo bench cas_vit_xs --fuse --vs timm:mobilenetv3_large_100 --size 224 224 "
    "--size 512 672 --threads 1"
)

YARDSTICK = "resnet50"
MIN_ROUNDS = 20
WARMUP = 5  # steps of a model before it is timed; a compiler works in the first
TURN_MS = 50.0  # a turn is as many steps as take this long
# Largest difference of a transcription's outputs in float64 from those of its model, in standard
# deviations of the latter's: rounding makes some 1e-14, a wrong pixel at an edge 1e-2 and more.
TOLERANCE = 1e-8

# The child process that measures memory; its argument is what `_measure_growth` takes.
_CHILD = (
    "import sys; from densezoo.tools.bench_throughput import _print_growth; "
    "_print_growth(sys.argv[1])"
)


@dataclass(frozen=True)
class Subject:
    """A model to time.

    Attributes:
        name: its name in timm.
        fused: whether its norms are fused.
        backend: of its operators, by name; they choose if None.
        arguments: names and values of arguments that it is built with, as in `model_kwargs`.
        is_transcription: whether it is the transcription of the model.
    """

    name: str
    fused: bool = False
    backend: str | None = None
    arguments: tuple[tuple[str, Any], ...] = ()
    is_transcription: bool = False

    @property
    def model(self) -> str:
        """What it is called without its form."""
        return f"transcription:{self.name}" if self.is_transcription else self.name

    @property
    def label(self) -> str:
        return _label(self.model, self.fused, self.backend or "")

    def build(self, size: tuple[int, int], setup: Setup) -> nn.Module:
        """Build the model for images of `size` (height, width), on the CPU in float32."""
        torch.manual_seed(0)
        arguments = dict(self.arguments)
        if self.is_transcription:
            model = build_model(self.name, size, arguments=arguments)
            transcription = transcribe(self.name, model, arguments)
            return StageMaps(transcription) if setup.features_only else transcription
        model = build_model(self.name, size, features_only=setup.features_only, arguments=arguments)
        return model.eval().fuse() if self.fused else model


def _label(model: str, fused: bool, backend: str) -> str:
    notes = ["fused"] * fused + [backend] * bool(backend)
    return f"{model} ({', '.join(notes)})" if notes else model


@dataclass
class _Runner:
    """A model that is ready to be timed, and what was measured of it."""

    subject: Subject
    size: tuple[int, int]
    step: Callable[[], None]
    num_params: int
    macs: int
    calls: int = 1
    memory_mib: float | None = None
    peak_mib: float | None = None
    saved_mib: float | None = None


def list_subjects(
    names: Sequence[str],
    *,
    fuse: bool = False,
    backends: Sequence[str] = (),
    peers: Sequence[str] = (),
    model_kwargs: Mapping[str, Any] | None = None,
) -> list[Subject]:
    """List what is timed: the models, each followed by its other forms, peers, the yardstick.

    Args:
        names: models of densezoo or timm.
        fuse: time the models of the zoo with fused norms too.
        backends: time the models of the zoo on these backends of their operators too.
        peers: timm's models, as "timm:NAME", and transcriptions, as "transcription:NAME".
        model_kwargs: arguments of the zoo's models and of transcriptions.

    Raises:
        ValueError: a name or backend is unknown, or `fuse`, `backends` or `model_kwargs` finds no
            model of the zoo.
    """
    arguments = tuple((model_kwargs or {}).items())
    options = {"--fuse": fuse, "--backends": backends, "--model-kwargs": arguments}
    for option, is_given in options.items():
        if is_given and not any(find_backbone(name) for name in names):
            raise ValueError(
                f"{option} takes models of densezoo; {', '.join(names)}: none of them is"
            )
    for backend in backends:
        check_backend(backend, "--backends")
    subjects = []
    for name in names:
        input_size(name)
        if find_backbone(name):
            subject = Subject(name, arguments=arguments)
            subjects += [subject] + [replace(subject, fused=True)] * fuse
            subjects += [replace(subject, backend=backend) for backend in backends]
        else:
            subjects.append(Subject(name))
    for peer in peers:
        prefix, _, name = peer.partition(":")
        if prefix == "transcription" and name in TRANSCRIPTIONS:
            subjects.append(Subject(name, arguments=arguments, is_transcription=True))
            continue
        if prefix != "timm" or not name:
            known = ", ".join(TRANSCRIPTIONS)
            raise ValueError(
                f"--vs takes timm:NAME, as in timm:convnext_tiny, and transcription:NAME for "
                f"{known}, not {peer!r}"
            )
        input_size(name)
        subjects.append(Subject(name))
    return list(dict.fromkeys([*subjects, Subject(YARDSTICK)]))


def measure(
    subjects: Sequence[Subject],
    sizes: Sequence[tuple[int, int]],
    setup: Setup,
    *,
    rounds: int = MIN_ROUNDS,
) -> list[dict[str, Any]]:
    """Time models in turn, at each size for itself.

    Args:
        subjects: what to time; the yardstick has to be one of them.
        sizes: heights and widths, pixels.
        setup: how to run them.
        rounds: turns of each model, at least 20.

    Returns:
        A row a model and size. Times are milliseconds a step of the whole batch; the multiple
        of the yardstick is the median over rounds of the ratio within a round.

    Raises:
        ImportError: fvcore is missing.
        ValueError: the setup is wrong, or a model does not run so.
    """
    setup.check()
    sizes = [check_size(size) for size in sizes]
    if rounds < MIN_ROUNDS:
        raise ValueError(f"repeats is {rounds}: at least {MIN_ROUNDS} alternations are taken")
    total = len(sizes) * len(subjects) * (rounds + 2)
    rows = []
    with limit_threads(setup.threads), tqdm(total=total, desc="bench", unit="turn") as progress:
        for size in sizes:
            runners = []
            for subject in subjects:
                progress.set_postfix_str(f"{subject.label} warm-up", refresh=False)
                runners.append(_prepare(subject, size, setup))
                progress.update()
            for runner in runners:
                progress.set_postfix_str(f"{runner.subject.label} memory", refresh=False)
                if torch.device(setup.device).type == "cpu":
                    runner.memory_mib = _measure_growth_in_child(runner.subject, size, setup)
                progress.update()
            times: dict[Subject, list[float]] = {subject: [] for subject in subjects}
            for _ in range(rounds):
                for runner in runners:
                    progress.set_postfix_str(runner.subject.label, refresh=False)
                    times[runner.subject].append(_time(runner.step, runner.calls, setup.device))
                    progress.update()
            yardstick = next(r for r in runners if r.subject == Subject(YARDSTICK))
            rows += [_make_row(runner, yardstick, times, setup) for runner in runners]
    return rows


def _prepare(subject: Subject, size: tuple[int, int], setup: Setup) -> _Runner:
    """Build, count and warm up a model; on a GPU, measure its peak memory too."""
    model = subject.build(size, setup)
    if subject.is_transcription:
        check_transcription(subject, size, setup)
    report = count_macs(model, size)
    is_cuda = torch.device(setup.device).type == "cuda"
    before = torch.cuda.memory_allocated(setup.device) if is_cuda else 0
    runner = _Runner(
        subject, size, _make_step(model, subject, size, setup), report.params, report.macs
    )
    try:
        runner.step()
        if is_cuda:
            torch.cuda.reset_peak_memory_stats(setup.device)
        if setup.train:
            measure = _on_backend(subject, measure_saved)
            runner.saved_mib = measure(model, _make_images(size, setup))
        warm_ms = min(_time(runner.step, 1, setup.device) for _ in range(WARMUP - 1))
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AssertionError) as error:
        raise ValueError(
            f"{subject.label} does not run at batch {setup.batch}, {size[0]}x{size[1]} pixels, "
            f"{setup.dtype} on {setup.device}: {first_line(error)}"
        ) from error
    if is_cuda:
        runner.memory_mib = (torch.cuda.max_memory_allocated(setup.device) - before) / 2**20
    runner.peak_mib = measure_peak(runner.step, torch.device(setup.device))
    runner.calls = max(1, math.ceil(TURN_MS / warm_ms))
    return runner


def check_transcription(subject: Subject, size: tuple[int, int], setup: Setup) -> None:
    """Raise a RuntimeError unless a transcription gives what the zoo's model gives, in float64."""
    images = _make_images(size, setup).double()
    found, wanted = (
        _list_outputs(form.build(size, setup).to(setup.device).double().eval(), images)
        for form in (subject, replace(subject, is_transcription=False))
    )
    errors = [((a - b).abs().max() / b.std()).item() for a, b in zip(found, wanted, strict=True)]
    if not max(errors) <= TOLERANCE:
        raise RuntimeError(
            f"{subject.label} and {subject.name} differ by {max(errors):.1e} standard deviations "
            "in float64: one of them is wrong"
        )


@torch.inference_mode()
def _list_outputs(model: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    outputs = model(images)
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def _make_images(size: tuple[int, int], setup: Setup) -> torch.Tensor:
    """Make a batch of random images, where and as models take them."""
    layout = torch.channels_last if setup.channels_last else torch.contiguous_format
    images = torch.randn(setup.batch, 3, *size, generator=torch.Generator().manual_seed(0))
    return images.to(setup.device, DTYPES[setup.dtype], memory_format=layout)


def _make_step(
    model: nn.Module, subject: Subject, size: tuple[int, int], setup: Setup
) -> Callable[[], None]:
    """Move a model where it is to run; return what runs it once on a batch of random images."""
    layout = torch.channels_last if setup.channels_last else torch.contiguous_format
    target: dict[str, Any] = dict(device=setup.device, dtype=DTYPES[setup.dtype])
    model = model.to(**target, memory_format=layout).train(setup.train)
    images = _make_images(size, setup)
    forward = _compile(model) if setup.compile else model

    def infer() -> None:
        with torch.inference_mode():
            forward(images)

    def train() -> None:
        outputs = forward(images)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
        sum(output.float().mean() for output in outputs).backward()
        model.zero_grad(set_to_none=True)

    return _on_backend(subject, train if setup.train else infer)


def _on_backend(subject: Subject, function: Callable) -> Callable:
    """Let a function run on the backend of a subject, where it names one."""
    return function if subject.backend is None else use_backend(subject.backend)(function)


def _compile(model: nn.Module) -> Callable[[torch.Tensor], Any]:
    """Compile in one graph or not at all: a half compiled model would be timed as a compiled one.

    `forward` becomes a code object of its own, since the compiler serves one a few times alone,
    and all models of a class share theirs.
    """

    def forward(images: torch.Tensor) -> Any:
        return model(images)

    forward.__code__ = forward.__code__.replace(co_name=f"forward_{id(model)}")
    return torch.compile(forward, fullgraph=True, dynamic=False)


def _time(step: Callable[[], None], calls: int, device: str) -> float:
    """Time `calls` steps in a row: milliseconds a step."""
    is_cuda = torch.device(device).type == "cuda"
    if is_cuda:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        step()
    if is_cuda:
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - start) / calls


def _measure_growth_in_child(subject: Subject, size: tuple[int, int], setup: Setup) -> float | None:
    """Measure on the CPU, in a fresh process, how far a model makes resident memory grow, MiB."""
    job = json.dumps(dict(subject=asdict(subject), size=size, setup=asdict(setup)))
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, job], capture_output=True, text=True, check=False
    )
    if child.returncode:
        reason = (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        raise ValueError(f"the memory of {subject.label} could not be measured: {reason}")
    return json.loads(child.stdout.splitlines()[-1])


def _print_growth(job: str) -> None:
    """Print what `_measure_growth` gives for the arguments in `job`, both as JSON."""
    arguments = json.loads(job)
    growth = _measure_growth(
        _read_subject(arguments["subject"]), tuple(arguments["size"]), Setup(**arguments["setup"])
    )
    print(json.dumps(growth))


def _read_subject(fields: dict[str, Any]) -> Subject:
    """Read a subject from what JSON makes of it, whose tuples are lists."""
    arguments = tuple((name, freeze(value)) for name, value in fields["arguments"])
    return Subject(**{**fields, "arguments": arguments})


def _measure_growth(subject: Subject, size: tuple[int, int], setup: Setup) -> float | None:
    """Measure the growth of this process's resident size, MiB: weights, maps and work space.

    From before the model is built to the peak in three steps; the peak of building it is left
    out. With `torch.compile`, the compiler's own memory is in it. None where the system does not
    tell (it takes Linux's /proc).
    """
    torch.set_num_threads(setup.threads)
    try:
        before = _read_resident("VmRSS")
        step = _make_step(subject.build(size, setup), subject, size, setup)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except OSError:
        return None
    for _ in range(3):
        step()
    return (_read_resident("VmHWM") - before) / 1024


def _read_resident(field: str) -> int:
    """Read the resident size (VmRSS) or its peak (VmHWM) of this process, KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def _make_row(
    runner: _Runner, yardstick: _Runner, times: dict[Subject, list[float]], setup: Setup
) -> dict[str, Any]:
    own = np.array(times[runner.subject])
    p20, median, p80 = np.percentile(own, [20, 50, 80])
    ratio = np.median(own / np.array(times[yardstick.subject]))
    transcribed = replace(runner.subject, is_transcription=False)
    x_model = None
    if runner.subject.is_transcription and transcribed in times:
        x_model = round(float(np.median(own / np.array(times[transcribed]))), 4)
    is_cpu = torch.device(setup.device).type == "cpu"
    memory_kind = "growth of resident size" if is_cpu else "peak of the allocator"
    return dict(
        model=runner.subject.model,
        model_kwargs=" ".join(f"{name}={value}" for name, value in runner.subject.arguments),
        fused=runner.subject.fused,
        backend=runner.subject.backend or "",
        height=runner.size[0],
        width=runner.size[1],
        params=runner.num_params,
        macs=runner.macs,
        median_ms=round(float(median), 4),
        p20_ms=round(float(p20), 4),
        p80_ms=round(float(p80), 4),
        images_per_s=round(1000 * setup.batch / float(median), 2),
        x_resnet50=round(float(ratio), 4),
        x_resnet50_macs=round(runner.macs / yardstick.macs, 4),
        x_model=x_model,
        memory_mib=None if runner.memory_mib is None else round(runner.memory_mib, 1),
        memory_kind="" if runner.memory_mib is None else memory_kind,
        peak_mib=round(runner.peak_mib, 1),
        saved_mib=None if runner.saved_mib is None else round(runner.saved_mib, 2),
        rounds=len(own),
        steps_per_round=runner.calls,
        warmup=WARMUP,
    )


def format_rows(rows: Sequence[dict[str, Any]], setup: Setup) -> str:
    """Format rows as text: machine and setup, a table, what its columns are."""
    facts = describe_run(setup)
    kind = rows[0]["memory_kind"] or "not measured on this system"
    cells = [
        [
            _label(row["model"], row["fused"], row["backend"]),
            f"{row['height']}x{row['width']}",
            f"{row['params'] / 1e6:.2f}",
            f"{row['macs'] / 1e9:.2f}",
            f"{row['median_ms']:.2f}",
            f"{row['p20_ms']:.2f}",
            f"{row['p80_ms']:.2f}",
            f"{row['images_per_s']:.1f}",
            f"{row['x_resnet50']:.3f}",
            f"{row['x_resnet50_macs']:.3f}",
            "-" if row["memory_mib"] is None else f"{row['memory_mib']:.0f}",
            f"{row['peak_mib']:.0f}",
            "-" if row["saved_mib"] is None else f"{row['saved_mib']:.1f}",
        ]
        for row in rows
    ]
    header = (
        "model size M-params GMACs ms p20 p80 images/s x-resnet50 by-MACs MiB peak saved".split()
    )
    comparisons = [
        f"{row['model']} takes {row['x_model']:.2f} times as long as its model at "
        f"{row['height']}x{row['width']}."
        for row in rows
        if row["x_model"] is not None
    ]
    return "\n".join(
        [
            f"{facts['device']}, threads {facts['threads']}, {facts['mode']}, batch "
            f"{facts['batch']}, {facts['dtype']}, {facts['layout']}, "
            f"{'compiled' if facts['compiled'] else 'eager'}"
            f"{', stage maps only' if facts['features_only'] else ''}",
            f"torch {facts['torch']}, timm {facts['timm']}, triton {facts['triton'] or 'absent'}, "
            f"densezoo {facts['densezoo']} {facts['commit']}",
            format_table(header, cells),
            f"ms a step: median of {rows[0]['rounds']} alternations after {WARMUP} warm-up steps; "
            "x-resnet50: time over resnet50's,\nby-MACs: what MACs alone would give; MiB: "
            f"{kind};\npeak: MiB that PyTorch allocates in a step; saved: MiB of it that attention "
            "operators keep for backward.",
            *comparisons,
        ]
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``densezoo bench``."""
    parser.add_argument("models", nargs="+", metavar="MODEL", help="names of densezoo or timm")
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        action="append",
        metavar=("H", "W"),
        help="height and width of the images, pixels; repeat it for several sizes; by default "
        "what the weights of the first model are made for",
    )
    parser.add_argument("--batch", type=int, default=1, help="images a step")
    parser.add_argument("--dtype", default="float32", help=", ".join(DTYPES))
    parser.add_argument("--channels-last", action="store_true", help="channels-last memory")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument(
        "--train", action="store_true", help="time forward and backward, not inference"
    )
    parser.add_argument(
        "--fuse", action="store_true", help="time the zoo's models with fused norms as well"
    )
    parser.add_argument(
        "--backends",
        nargs="+",
        default=(),
        metavar="NAME",
        help="time the zoo's models on these backends of their operators as well: "
        + ", ".join(BACKENDS),
    )
    parser.add_argument(
        "--features-only", action="store_true", help="time the stage maps, without norm and head"
    )
    parser.add_argument(
        "--vs",
        nargs="+",
        action="extend",
        metavar="PEER",
        help="what to compare with: timm:NAME, a model of timm (resnet50 is always among them), or "
        "transcription:NAME, a model of densezoo written as its official code computes it, with "
        "its weights: " + ", ".join(TRANSCRIPTIONS),
    )
    parser.add_argument(
        "--model-kwargs",
        nargs="+",
        default=(),
        metavar="KEY=VALUE",
        help="arguments of the zoo's models and of transcriptions, such as num_regions=16",
    )
    parser.add_argument("--device", help="cuda where there is one, else cpu")
    parser.add_argument("--threads", type=int, help="threads of PyTorch on the CPU")
    parser.add_argument(
        "--repeats",
        type=int,
        default=MIN_ROUNDS,
        metavar="N",
        help=f"times that each model has its turn, at least {MIN_ROUNDS}",
    )
    parser.add_argument("--out", metavar="CSV", help="a new file for the rows")


def run(args: argparse.Namespace) -> None:
    """Time models, print the table and write it where `--out` says."""
    if args.train and args.fuse:
        raise ValueError("--fuse is for inference: leave out it or --train")
    subjects = list_subjects(
        args.models,
        fuse=args.fuse,
        backends=args.backends,
        peers=args.vs or (),
        model_kwargs=read_model_arguments(args.model_kwargs),
    )
    sizes = [tuple(size) for size in args.size or [input_size(args.models[0])[1:]]]
    setup = Setup(
        batch=args.batch,
        dtype=args.dtype,
        device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        threads=torch.get_num_threads() if args.threads is None else args.threads,
        channels_last=args.channels_last,
        compile=args.compile,
        train=args.train,
        features_only=args.features_only,
    )
    with new_file(args.out) as file:
        rows = measure(subjects, sizes, setup, rounds=args.repeats)
        if file is not None:
            shared = {**describe_run(setup), "command": _command(args)}
            writer = csv.DictWriter(file, [*rows[0], *shared], lineterminator="\n")
            writer.writeheader()
            writer.writerows({**row, **shared} for row in rows)
    print(format_rows(rows, setup))
    if args.out is not None:
        print(f"rows written to {args.out}")


def _command(args: argparse.Namespace) -> str:
    """Write out the command that the arguments come from, defaults included."""
    words = ["densezoo", "bench", *args.models]
    for name in ("batch", "dtype", "device", "threads", "repeats"):
        if getattr(args, name) is not None:
            words += [f"--{name}", str(getattr(args, name))]
    for height, width in args.size or ():
        words += ["--size", str(height), str(width)]
    for name in ("channels_last", "compile", "train", "fuse", "features_only"):
        words += [f"--{name.replace('_', '-')}"] if getattr(args, name) else []
    for name in ("backends", "vs", "model_kwargs"):
        words += (
            [f"--{name.replace('_', '-')}", *getattr(args, name)] if getattr(args, name) else []
        )
    return shlex.join(words)


if __name__ == "__main__":
    from .cli import run_module

    run_module("bench")

"""The ``densezoo`` command: parses, dispatches, turns user mistakes into one-line errors."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

# name -> (module of this package, what `densezoo --help` says of it). A module offers
# add_arguments(parser), run(args) and EXAMPLE (shown under its --help).
COMMANDS = {
    "list": ("list_models", "print the zoo: sizes, published results, licence, weights"),
    "train": ("train", "train a classifier, detector or segmenter from a config"),
    "test": ("evaluate", "evaluate a checkpoint with a config's metrics"),
    "predict": ("predict", "draw predictions of a checkpoint on images"),
    "macs": ("count_macs", "count parameters, MACs and FLOPs of a model"),
    "bench": ("bench_throughput", "measure time and memory of models, side by side"),
    "data": ("demo_data", "write the embedded data set in the formats of the three tasks"),
    "demo": ("demo", "train and evaluate the three tasks on the embedded data, with a report"),
}


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """Build the parser of ``densezoo``; only `command`'s module (all if None) is imported."""
    parser = argparse.ArgumentParser(
        prog="densezoo", description="Hierarchical vision backbones for dense prediction."
    )
    from .. import __version__

    parser.add_argument("--version", action="version", version=f"densezoo {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module_name, summary) in COMMANDS.items():
        if command in (name, None):
            module = importlib.import_module(f".{module_name}", __package__)
            subparser = subparsers.add_parser(
                name,
                help=summary,
                description=summary[0].upper() + summary[1:] + ".",
                epilog=f"example:\n  {module.EXAMPLE}",
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
            module.add_arguments(subparser)
            subparser.add_argument(
                "--debug", action="store_true", help="show the traceback of an error"
            )
            subparser.set_defaults(run=module.run)
        else:
            subparsers.add_parser(name, help=summary)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command and return the exit code.

    A user's mistake (ValueError, OSError, a missing optional package) becomes one line on
    stderr and exit code 1; ``--debug`` lets the exception through.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in argv if word in COMMANDS), "")
    args = build_parser(command).parse_args(argv)
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        print(f"densezoo {args.command}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        if args.debug:
            raise
        message = " ".join(str(error).split())
        print(f"densezoo {args.command}: error: {message}", file=sys.stderr)
        return 1


def run_module(command: str) -> None:
    """Run ``python -m densezoo.tools.MODULE`` as the sub-command of that module."""
    sys.exit(main([command, *sys.argv[1:]]))


if __name__ == "__main__":
    sys.exit(main())

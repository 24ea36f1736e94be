"""The ``densezoo`` command: parses, dispatches, turns user mistakes into one-line errors."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from .ranks import await_cause, print_error

# name -> (module of this package, what `densezoo --help` says of it). A module offers
# add_arguments(parser), run(args) and EXAMPLE (shown under its --help).
COMMANDS = {
    "list": ("list_models", "print the zoo: sizes, published results, licence, weights"),
    "train": ("train", "train a classifier, detector or segmenter from a config"),
    "test": ("evaluate", "evaluate a checkpoint with a config's metrics"),
    "predict": ("predict", "draw predictions of a checkpoint on images, with JSON"),
    "macs": ("count_macs", "count parameters, MACs and FLOPs of a model"),
    "bench": ("bench_throughput", "measure time and memory of models, side by side"),
    "bench-kernels": ("bench_kernels", "measure time and memory of operators beside their peers"),
    "export": ("export_model", "write a model as ONNX or torch.export, checked against it"),
    "convert": ("convert_checkpoint", "turn a published checkpoint into one of our model"),
    "data": ("demo_data", "write the embedded data set in the formats of the three tasks"),
    "demo": ("demo", "train and evaluate the three tasks on the embedded data, with a report"),
}

# What PyTorch says when memory is short, on a GPU, on the CPU and in a loader's worker.
MEMORY_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "Caught MemoryError")
SAVING_MEMORY = {
    "train": "lower train_dataloader.batch_size or the images' size with --cfg-options, or give "
    "--amp, or model.backbone.with_cp=True for a detector or segmenter",
    "test": "lower test_dataloader.batch_size or the images' size with --cfg-options",
    "predict": "give smaller images, or lower the images' size with --cfg-options (for --show with "
    "--size)",
    "macs": "give a smaller --size",
    "bench": "give a smaller --batch or --size",
    "bench-kernels": "give a smaller --batch or --memory, or other --shapes",
    "export": "give a smaller --batch or --size",
}
SYSTEM_ADVICE = {
    errno.ENOSPC: "free some space there, or write to another disk",
    errno.EDQUOT: "free some of your quota, or write to another disk",
    errno.EFBIG: "the limit on the size of files is reached: raise it (ulimit -f), or write less",
    errno.EACCES: "change its permissions, or name another place",
    errno.EPERM: "change its permissions, or name another place",
    errno.EROFS: "name a place that can be written",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file: check it",
    errno.EISDIR: "name a file in it",
    errno.EEXIST: "name another place",
    errno.EMFILE: "raise the limit on open files (ulimit -n), or lower num_workers",
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and name what is near a misspelled word."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line, and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")

    def option_names(self) -> list[str]:
        """List the options of the parser and of its sub-commands."""
        names = list(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                names += [
                    name for parser in action.choices.values() for name in parser.option_names()
                ]
        return names

    def take_words(self, args: argparse.Namespace, words: Sequence[str]) -> bool:
        """Add words that come after an option to the last argument, where that is a list.

        argparse ends a list of arguments at the first option.

        Returns:
            Whether there is a list, and no option among the words.
        """
        arguments = [a for a in self._actions if not a.option_strings and a.nargs == "+"]
        if not arguments or any(word.startswith("-") for word in words):
            return False
        getattr(args, arguments[-1].dest).extend(words)
        return True

    def refuse_words(self, words: Sequence[str]) -> NoReturn:
        """Exit for words that no argument took."""
        word = words[0].partition("=")[0]
        near = difflib.get_close_matches(word, self.option_names(), n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        self.error(f"unrecognized arguments: {' '.join(words)}{hint}")


def build_parser(command: str | None = None) -> Parser:
    """Build the parser of ``densezoo``; only `command`'s module (all if None) is imported."""
    parser = Parser(
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
            subparser.set_defaults(run=module.run, parser=subparser)
        else:
            subparsers.add_parser(name, help=summary)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the words of a command line; exit with code 2 and one line where they are wrong."""
    command = next((word for word in argv if not word.startswith("-")), "")
    parser = build_parser(command)
    if command and command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=3) or COMMANDS
        parser.error(f"there is no command {command!r}; did you mean {', '.join(near)}?")
    args, unknown = parser.parse_known_args(argv)
    if unknown and not args.parser.take_words(args, unknown):
        args.parser.refuse_words(unknown)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command and return the exit code.

    0 is success, 1 a user's mistake (ValueError, OSError, a missing optional package, too little
    memory: one line on stderr; ``--debug`` lets the exception through), 2 a command line that
    does not parse, 70 a defect (its traceback, then one line), 130 an interruption, 141 a reader
    of the output that went away.
    """
    if argv is None:  # the process is the command's own
        argv = sys.argv[1:]
        logging.raiseExceptions = False  # else a log whose reader goes away fills stderr
    argv = list(argv)
    command, is_debugging, saving = "densezoo", False, ""
    try:
        args = parse(argv)
        command, is_debugging = f"densezoo {args.command}", args.debug
        saving = SAVING_MEMORY.get(args.command, "end other programs")
        code = args.run(args) or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _say(f"{command}: interrupted", 130)
    except BrokenPipeError:
        # As the interpreter flushes its output on exit, it would say so once more.
        with contextlib.suppress(OSError):  # a stream without a file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if is_debugging:
            raise
        if is_out_of_memory(error):
            return _say(f"{command}: error: not enough memory ({_one_line(error)}): {saving}", 1)
        if isinstance(error, (ValueError, OSError, ImportError)):
            return _say(f"{command}: error: {_one_line(error)}", 1)
        await_cause(error)
        return _say(
            f"{traceback.format_exc()}"
            f"{command}: {type(error).__name__}: {_one_line(error)} - no mistake in the command is "
            "known that leads here: unless the traceback above ends in code of your own, this is "
            "a defect of densezoo; please report it with the traceback, the command, the config "
            "and what `densezoo --version` and `pip list` print",
            70,
        )


def _say(text: str, code: int) -> int:
    """Print an error to stderr and return the exit code that goes with it."""
    print_error(text)
    return code


def _one_line(error: BaseException) -> str:
    """Give an error's message as one line; that of the system with the file and what to do."""
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        # A message of our own has no errno.
        where = f"{os.fspath(error.filename)!r}: " if error.filename is not None else ""
        advice = SYSTEM_ADVICE.get(error.errno)
        return f"{where}{error.strerror}" + (f"; {advice}" if advice else "")
    return " ".join(str(error).split()) or type(error).__name__


def is_out_of_memory(error: BaseException | None) -> bool:
    """Say whether an error, or what it came from, is memory that could not be had."""
    if error is None:
        return False
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, RuntimeError) and any(sign in text for sign in MEMORY_SIGNS))
        or is_out_of_memory(error.__cause__)
    )


def run_module(command: str) -> None:
    """Run ``python -m densezoo.tools.MODULE`` as the sub-command of that module."""
    sys.exit(main([command, *sys.argv[1:]]))


if __name__ == "__main__":
    sys.exit(main())

"""An interrupted command ends in one line, also while its packages are being imported."""

from __future__ import annotations

import os
import sys
from types import TracebackType


def end_commands_in_one_line() -> None:
    """Let Ctrl-C end this process with one line and exit code 130 if it is the command.

    Programs that import densezoo are left as they are.
    """
    words = getattr(sys, "orig_argv", [])
    module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
    script = os.path.basename(sys.argv[0]) if getattr(sys, "argv", None) else ""
    if module.split(".")[0] == "densezoo" or script in ("densezoo", "densezoo.exe"):
        sys.excepthook = _end_in_one_line


def _end_in_one_line(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
        return
    print("densezoo: interrupted", file=sys.stderr, flush=True)
    os._exit(130)  # Python itself would end as if killed

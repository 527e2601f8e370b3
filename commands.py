"""How the package behaves where it is a command: as `mome`, and as `python -m mome.anything`.

- A package that is not installed is one line, which names its extra; so is what can't be used or is not there.
- Ctrl-C is one line, and status 130.
- When nobody reads on, as in `mome search … | head`, the command ends quietly, with status 141 like the shell's own.
- What the terminal's encoding lacks is printed as an escape.

`import mome` calls `settle` before it imports anything slow. In a program that only uses the package it does nothing.
"""

import os
import select
import sys
from pathlib import Path
from types import TracebackType

FAILED, INTERRUPTED, UNREAD = 1, 130, 141
# Room of the package → the extra to name first if several install what is missing.
EXTRA_OF_ROOM = {
    "convert": "convert",
    "experiments": "eval",
    "icons": "icons",
    "quickstart": "retrieval",
    "training": "training",
}
# What benchmarks/requirements.txt installs, by the name under which it is imported.
PEERS = ("faiss", "fairscale", "ftfy", "open_clip", "torchscale", "wcwidth")


def running() -> str | None:
    """The command that this process was started as, such as `mome` or `mome.training`; `None` for any other program.

    Known while the package is being imported: only then does `-m` stand in `sys.argv`.
    """
    arguments = getattr(sys, "argv", None) or [""]
    if arguments[0] == "-m":
        module = sys.orig_argv[-len(arguments)].removeprefix("-m").removesuffix(".__main__")
        return module if module.split(".")[0] == "mome" else None
    return "mome" if Path(arguments[0]).name in ("mome", "mome.exe") else None


def settle():
    """Makes this process behave as said above, if it is a command of the package."""
    command = running()
    if command is None:
        return
    if hasattr(sys.stdout, "reconfigure"):
        keeps_bytes = sys.stdout.encoding == "utf-8" and sys.stdout.errors == "surrogateescape"
        # Line by line, so that results come while the next are made, and nothing more is made for a closed pipe.
        sys.stdout.reconfigure(line_buffering=True, errors=None if keeps_bytes else "backslashreplace")
    before = sys.excepthook

    def tell(kind: type[BaseException], error: BaseException, traceback: TracebackType | None):
        status = explain(command, error)
        if status is None:
            before(kind, error, traceback)
        else:
            sys.exit(status)

    sys.excepthook = tell


def explain(command: str, error: BaseException, advice: str = "") -> int | None:
    """Says on stderr in one line what ended a command, if it is no fault of the package's.

    Args:
        command: its name, with which the line begins.
        error: what was raised.
        advice: what to do after an interruption.

    Returns:
        The exit status, or `None`: nothing was said, since the error is of another kind.
    """
    if isinstance(error, BrokenPipeError) and _unread():
        return UNREAD
    if isinstance(error, KeyboardInterrupt):
        print(f"{command}: interrupted{advice}", file=sys.stderr)
        return INTERRUPTED
    if isinstance(error, ModuleNotFoundError) and (error.name or "mome").split(".")[0] != "mome":
        line = _missing(command, error)
    else:
        line = _about_what_was_given(error)
    if line is not None:
        print(f"{command}: {line}", file=sys.stderr)
    return None if line is None else FAILED


def _about_what_was_given(error: BaseException) -> str | None:
    """The line of an error about something that was given; `None` for all others, whose traceback is wanted.

    An OSError without a number is one that transformers puts into words: no such checkpoint.
    """
    from .errors import MomeError, first_line

    in_words = isinstance(error, OSError) and error.errno is None
    return first_line(error) if in_words or isinstance(error, (MomeError, FileNotFoundError)) else None


def _unread() -> bool:
    """Whether nobody reads stdout any more; if so, what is left in its buffer goes nowhere."""
    try:
        stdout, asked = sys.stdout.fileno(), select.poll()
    except (AttributeError, OSError):  # no file behind it, or a system without poll
        return False
    asked.register(stdout, 0)  # 0: tell of errors alone
    if not asked.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return True


def _missing(command: str, error: ModuleNotFoundError) -> str:
    name, room = error.name.split(".")[0], [*command.split("."), ""][1]
    try:
        from .errors import missing_package
    except ModuleNotFoundError:  # torch or transformers
        return f"{name} is not installed: pip install {name}"
    if name in PEERS:
        return f"{name} is not installed: pip install --no-deps -r benchmarks/requirements.txt"
    return missing_package(error, EXTRA_OF_ROOM.get(room, "retrieval"))


__all__ = ["explain", "running", "settle"]

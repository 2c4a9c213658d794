"""Exceptions to one paragraph on standard error and an exit code."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from enum import IntEnum
from typing import TYPE_CHECKING

from .console import print_message

if TYPE_CHECKING:
    from collections.abc import Callable


class ExitCode(IntEnum):
    """What the shell sees."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    MISSED = 3  # done, but a stated target was missed
    INTERRUPTED = 130


def guarded(work: Callable[[], int], verbose: bool) -> int:
    """The exit code of `work`; what it raises is said in words. `verbose` adds the traceback of what should not be."""
    try:
        code = work()
        sys.stdout.flush()
        return int(code)
    except KeyboardInterrupt:
        print_message("interrupted", "nothing was left half-written")
        return ExitCode.INTERRUPTED
    except SystemExit as error:  # rich's answer to a closed pipe
        return error.code if isinstance(error.code, int) else ExitCode.FAILED
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.EPIPE:
            _leave_pipe()
            return ExitCode.FAILED
        message, code = describe(error)
        if verbose and not _is_expected(error):
            traceback.print_exc()
        print_message("error", message)
        return code


def describe(error: Exception) -> tuple[str, int]:
    """One paragraph for a person, and the exit code."""
    if _is_expected(error):
        return _words(error), int(getattr(error, "exit_code", ExitCode.FAILED))
    if isinstance(error, ModuleNotFoundError):
        return (
            f"the Python package '{error.name}' is not installed: 'sparsec doctor' says what is needed",
            ExitCode.FAILED,
        )
    if isinstance(error, MemoryError):
        return f"not enough memory ({error})" if str(error) else "not enough memory", ExitCode.FAILED
    if isinstance(error, OSError) and error.strerror:
        where = f"'{os.fsdecode(error.filename)}': " if isinstance(error.filename, (str, bytes)) else ""
        return f"{where}{error.strerror}", ExitCode.FAILED
    words = f"{type(error).__name__}: {error}".rstrip(": ")
    return (
        f"this is a bug of sparsec ({words}). Run the command again with -v for the traceback, and please report it "
        "together with the output of 'sparsec doctor'.",
        ExitCode.FAILED,
    )


def _is_expected(error: Exception) -> bool:
    """Whether the message was written for users.

    Told by the exit code, which sparsec's errors and typer's carry: typer's have no public class in all its versions.
    """
    return hasattr(error, "exit_code")


def _words(error: Exception) -> str:
    """The message; that of typer's errors (an unknown option, a missing argument) with where to read more."""
    own_words = getattr(error, "format_message", None)
    if own_words is None:
        return str(error)
    context = getattr(error, "ctx", None)
    command = "sparsec" if context is None else context.command_path
    message = str(own_words()).strip()
    return f"{message}{'' if message.endswith(('.', '?')) else '.'} Try '{command} --help'."


def _leave_pipe() -> None:
    """Point standard output elsewhere, so that Python's own flush at exit does not complain."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())

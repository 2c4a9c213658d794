"""The two streams: results go to standard output, everything else to standard error."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from typing import TextIO

# Files and pipes have no width; this one leaves tables in their wide form.
_WIDTH_OF_A_FILE = 140
_STYLES = {"missed": "bold red", "error": "bold red", "warning": "bold yellow", "interrupted": "bold", "note": "bold"}


def output() -> Console:
    """Standard output as it is now."""
    return _console(sys.stdout)


def errors() -> Console:
    """Standard error as it is now."""
    return _console(sys.stderr)


def _console(stream: TextIO) -> Console:
    sized = stream.isatty() or "COLUMNS" in os.environ
    # Names of layers are data: "[bold]", ":smile:" and numbers in them mean nothing.
    return Console(file=stream, width=None if sized else _WIDTH_OF_A_FILE, markup=False, emoji=False, highlight=False)


def print_message(kind: str, message: str) -> None:
    """`error: what went wrong` on standard error."""
    console = errors()
    text = Text.assemble((f"{kind}:", _STYLES[kind]), " ", printable(message))
    console.print(text, soft_wrap=not console.is_terminal)


def printable(text: str) -> str:
    """`text` without control characters: a model's names could otherwise steer the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)

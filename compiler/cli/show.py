"""How a result is shown: as text, as JSON, or not at all."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import output
from .progress import Bars

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

STDOUT = "-"


@dataclass(frozen=True, slots=True)
class Show:
    """The options `--json`, `-v` and `-q`."""

    json: str | None
    verbose: bool
    quiet: bool

    def check(self) -> None:
        """Fail before the work rather than after it.

        Raises:
            UsageError: `--json` names a place where no file can be.
        """
        from ...ir import UsageError

        if self.json is None or self.json == STDOUT:
            return
        path = Path(self.json)
        if path.is_dir():
            raise UsageError(f"--json {self.json}: this is a folder; give a file, or - for standard output")
        if not path.absolute().parent.is_dir():
            raise UsageError(f"--json {self.json}: there is no folder '{path.parent}'")

    def progress(self) -> Bars:
        """What the library reports to while it works."""
        return Bars(self.quiet, self.verbose)

    def result(self, data: dict[str, Any], text: Callable[[Console], None]) -> None:
        """Write `data` where `--json` says, and call `text` to print where a person reads."""
        if self.json == STDOUT:
            sys.stdout.write(_document(data))
        elif not self.quiet:
            text(output())
        if self.json not in (None, STDOUT):
            self._write_file(_document(data))

    def _write_file(self, document: str) -> None:
        from ...ir import SparsecError

        try:
            Path(str(self.json)).write_text(document, encoding="utf-8")
        except OSError as error:
            raise SparsecError(f"--json {self.json}: the file cannot be written ({error.strerror or error})") from None


def _document(data: dict[str, Any]) -> str:
    return json.dumps(_finite(data), indent=2) + "\n"


def _finite(value: Any) -> Any:
    """`value` with null for the numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

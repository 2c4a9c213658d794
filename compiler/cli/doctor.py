"""`sparsec doctor`: what this machine has."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .console import print_message, printable
from .errors import ExitCode
from .options import Json, Quiet, Verbose
from .show import Show
from .text import count

if TYPE_CHECKING:
    from ..doctor import Finding


def doctor_command(json: Json = None, verbose: Verbose = False, quiet: Quiet = False) -> Callable[[], int]:
    """Say what this machine has of what sparsec needs; exit with 1 where something is missing."""
    return lambda: _doctor(Show(json, verbose, quiet))


def _doctor(show: Show) -> int:
    show.check()
    from ..doctor import examine, to_dict

    findings = examine()
    show.result(to_dict(findings), partial(_print, findings))
    problems = [finding for finding in findings if finding.problem]
    for finding in problems:
        print_message("error", f"{finding.name}: {finding.problem}")
    return ExitCode.FAILED if problems else ExitCode.DONE


def _print(findings: "tuple[Finding, ...]", console: Console) -> None:
    table = Table.grid(padding=(0, 2))
    for finding in findings:
        mark = Text("no", "bold red") if finding.problem else Text("ok", "green")
        table.add_row(mark, finding.name, Text(printable(finding.value) or "missing", overflow="fold"))
    problems = sum(bool(finding.problem) for finding in findings)
    summary = f"{count(problems, 'problem')}." if problems else "sparsec has all that it needs."
    console.print(table, "", summary, sep="\n")

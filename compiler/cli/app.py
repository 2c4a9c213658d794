"""The commands put together. Parsing and working are apart: a command returns its work, which runs outside typer."""

import difflib
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ... import __version__
from .bench import bench_command
from .compile import compile_command
from .doctor import doctor_command
from .errors import ExitCode, guarded
from .inspect import inspect_command
from .sensitivity import sensitivity_command
from .serve import serve_command
from .verify import verify_command

_HELP = (
    "Prune ONNX models and compile sparse CPU kernels for exactly their weights.\n\n"
    "[bold]sparsec MODEL -o OUT[/bold] is short for [bold]sparsec compile MODEL -o OUT[/bold], whose options "
    "[bold]sparsec compile --help[/bold] lists. A model whose file is named like a command is reached by its path: "
    "./inspect"
)
_EPILOG = "Exit codes: 0 done, 1 cannot go on, 2 usage, 3 done but a stated target was missed, 130 interrupted."

app = typer.Typer(
    help=_HELP,
    epilog=_EPILOG,
    rich_markup_mode="rich",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS: dict[str, Callable[..., Any]] = {
    "compile": compile_command,
    "inspect": inspect_command,
    "sensitivity": sensitivity_command,
    "bench": bench_command,
    "verify": verify_command,
    "doctor": doctor_command,
    "serve": serve_command,
}
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)
_ROOT_OPTIONS = ("-h", "--help", "--version")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"sparsec {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before any command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return its exit code; nothing is raised."""
    words = list(sys.argv[1:] if argv is None else argv)
    verbose = "-v" in words or "--verbose" in words
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a layer's name may hold what the terminal's encoding does not
            stream.reconfigure(errors="backslashreplace")
    with warnings.catch_warnings():
        if not verbose and not sys.warnoptions:
            warnings.simplefilter("ignore")  # warnings of Python libraries are for their callers
        return guarded(lambda: _dispatch(words), verbose)


def _dispatch(words: list[str]) -> int:
    if not words:
        _parse(["--help"])
        return ExitCode.USAGE
    # Whatever names no command is compiled: a model's file, or an option of `compile`.
    default = [] if words[0] in (*COMMANDS, *_ROOT_OPTIONS) else ["compile"]
    if default:
        _check_for_typo(words[0])
    work = _parse([*default, *words], words)
    return work() if callable(work) else int(work or 0)


def _check_for_typo(word: str) -> None:
    """Raise a `UsageError` for what is no file but nearly a command."""
    near = difflib.get_close_matches(word, COMMANDS, n=1, cutoff=0.7)
    if near and word.isalpha() and not Path(word).exists():
        from ...ir import UsageError

        raise UsageError(f"'{word}' is neither a command nor a file. Did you mean 'sparsec {near[0]}'?")


def _parse(words: list[str], typed: Sequence[str] = ()) -> Callable[[], int] | int | None:
    """The work that the command line asks for; an exit code where typer has done it all (--help)."""
    command: Any = typer.main.get_command(app)
    work: Callable[[], int] | int | None = command.main(
        args=words, prog_name="sparsec", standalone_mode=False, obj=tuple(typed)
    )
    return work

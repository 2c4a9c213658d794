"""`sparsec sensitivity MODEL --calib DATA`: the table that budgets are spent by."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.text import Text

from .cells import Name, lines, plain_table
from .console import print_message, printable
from .errors import ExitCode
from .options import (
    AlonePattern,
    AloneSamples,
    Batch,
    Calib,
    Dim,
    Inputs,
    Json,
    Method,
    Model,
    Quiet,
    Target,
    Threads,
    Tune,
    Verbose,
    make_config,
)
from .show import Show
from .text import factor, percent

if TYPE_CHECKING:
    from ..sensitivity import OptionSummary, Sensitivity


def sensitivity_command(
    context: typer.Context,
    model: Model,
    calib: Calib = None,
    samples: AloneSamples = None,
    pattern: AlonePattern = "auto",
    method: Method = "auto",
    target: Target = "auto",
    tune: Tune = "quick",
    batch: Batch = None,
    dim: Dim = None,
    threads: Threads = None,
    inputs: Inputs = None,
    json: Json = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> Callable[[], int]:
    """Prune each layer of MODEL alone, at several sparsities: how far the outputs move, and how fast it gets."""
    options = {
        "calib": calib,
        "samples": samples,
        "pattern": pattern,
        "method": method,
        "target": target,
        "tune": tune,
        "batch": batch,
        "dim": dim,
        "threads": threads,
        "inputs": inputs,
    }
    return lambda: _sensitivity(model, options, Show(json, verbose, quiet))


def _sensitivity(model: str, options: dict[str, Any], show: Show) -> int:
    config = make_config(**options)
    show.check()
    from ..sensitivity import sensitivity

    with show.progress() as progress:
        progress.start("reading the model", None)
        table = sensitivity(Path(model), config, progress)
    show.result(table.to_dict(), partial(_print, table, show.verbose))
    for note in table.notes:
        print_message("warning", note)
    return ExitCode.DONE


def _print(table: "Sensitivity", full: bool, console: Console) -> None:
    columns = {(option.pattern, round(option.zeros, 2)): None for layer in table.layers for option in layer.options}
    heads = sorted(columns, key=lambda column: (column[0], column[1]))
    for pattern in dict.fromkeys(pattern for pattern, _ in heads):
        shares = [share for name, share in heads if name == pattern]
        console.print(Text(f"{printable(table.model) or 'the model'}, {pattern}", "bold"))
        grid = plain_table(("<", "layer"), *((">", percent(share)) for share in shares))
        grid.columns[0].no_wrap = False
        for layer in table.layers:
            found = {round(option.zeros, 2): option for option in layer.options if option.pattern == pattern}
            cells = [_cell(found.get(share)) for share in shares]
            grid.add_row(Name(layer.name, full=full), *cells)
        console.print(grid, "", sep="\n")
    console.print(
        "Each layer alone at these zeros: relative error of the model's outputs (root mean square) on "
        f"{table.samples} samples of {table.source}"
        + (f"; below it the layer's speedup at batch {', '.join(map(str, table.batch))}." if table.batch else ".")
    )


def _cell(option: "OptionSummary | None") -> Any:
    if option is None:
        return ""
    error = Text(f"{100 * option.error:.2g} %")
    return lines([error, *([Text(factor(min(option.speedups)), "dim")] if option.speedups else [])])

"""`sparsec inspect MODEL`: what is in it, and what could be done with it."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .cells import WIDE, Name, facts, plain_table
from .console import printable
from .errors import ExitCode
from .options import Json, Model, Quiet, Verbose
from .show import Show
from .text import count, percent, size

if TYPE_CHECKING:
    from ..inspect import LayerSummary, ModelSummary, TensorSummary


def inspect_command(
    model: Model, json: Json = None, verbose: Verbose = False, quiet: Quiet = False
) -> Callable[[], int]:
    """List the layers of MODEL, the zeros in them, and what sparsec could do; nothing is compiled or measured."""
    return lambda: _inspect(model, Show(json, verbose, quiet))


def _inspect(model: str, show: Show) -> int:
    show.check()
    from ..inspect import inspect

    with show.progress() as progress:
        progress.start("reading the model", None)
        summary = inspect(model)
    show.result(summary.to_dict(), partial(_print, summary, show.verbose))
    return ExitCode.DONE


def _print(summary: "ModelSummary", full: bool, console: Console) -> None:
    opsets = ", ".join(f"{domain} {version}" for domain, version in summary.opsets.items())
    rows = [
        ("size", f"{size(summary.bytes)}, {summary.parameters:,} parameters, {count(summary.nodes, 'node')}"),
        ("format", f"opset {opsets}; IR version {summary.ir_version}"),
        ("made by", summary.producer or "unknown"),
        *(("input", _tensor(tensor)) for tensor in summary.inputs),
        *(("output", _tensor(tensor)) for tensor in summary.outputs),
    ]
    console.print(Text(printable(summary.file), "bold"), facts(rows), "", sep="\n")
    if summary.layers:
        console.print(_layer_table(summary.layers, console.width >= WIDE, full), "", sep="\n")
    console.print(_conclusion(summary.layers))


def _tensor(tensor: "TensorSummary") -> str:
    shape = "of any shape" if tensor.shape is None else f"[{', '.join(map(str, tensor.shape))}]"
    return f"{tensor.name} {tensor.dtype} {shape}"


def _layer_table(layers: "tuple[LayerSummary, ...]", wide: bool, full: bool) -> Table:
    """A row a layer; what could be done stands in a column of its own where there is room, else below the name."""
    table = plain_table(("<", "layer"), ("<", "op"), (">", "weight"), (">", "zeros"), ("<", "blocks"))
    table.columns[0].no_wrap = False
    if wide:
        table.add_column("what could be done")
    for layer in layers:
        outlook = Text.assemble((layer.outlook, _STYLES.get(layer.outlook, "")), ": ", printable(layer.reason))
        cells = (layer.op_type, f"{layer.shape[0]}x{layer.shape[1]}", percent(layer.zeros), layer.block)
        if wide:
            table.add_row(Name(layer.name, full=full), *cells, outlook)
        else:
            table.add_row(Name(layer.name, (outlook,), full), *cells)
    return table


_STYLES = {"zeros": "bold green", "prune": "bold"}


def _conclusion(layers: "tuple[LayerSummary, ...]") -> str:
    if not layers:
        return "No layer with a constant weight was found in the main graph: there is nothing to compile."
    ways = [layer.outlook for layer in layers]
    zeros, prune = ways.count("zeros"), ways.count("prune")
    return (
        f"{count(len(layers), 'layer')}: {zeros} to be compiled for the zeros they have, {prune} after pruning "
        f"(--sparsity), {len(layers) - zeros - prune} left dense. Which are faster is measured when compiling."
    )

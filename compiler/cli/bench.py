"""`sparsec bench OUT --against MODEL`: dense and sparse in turn."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.console import Console

from .errors import ExitCode
from .options import Against, Dim, Inputs, Json, MadeBatch, Out, Pairs, Quiet, Seed, Threads, Verbose, make_config
from .result import timing_table
from .show import Show
from .text import count

if TYPE_CHECKING:
    from ..bench import Benchmark


def bench_command(
    out: Out,
    against: Against,
    batch: MadeBatch = None,
    dim: Dim = None,
    threads: Threads = None,
    seed: Seed = 0,
    inputs: Inputs = None,
    pairs: Pairs = 15,
    json: Json = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> Callable[[], int]:
    """Time OUT against the dense MODEL, alternately, in one process."""
    options = {"batch": batch, "dim": dim, "threads": threads, "seed": seed, "inputs": inputs}
    return lambda: _bench(out, against, options, pairs, Show(json, verbose, quiet))


def _bench(out: str, against: str, options: dict[str, Any], pairs: int, show: Show) -> int:
    config = make_config(**options)
    show.check()
    from ..bench import bench
    from ..pair import open_pair

    with show.progress() as progress:
        result = bench(open_pair(out, against, config, progress), pairs, progress)
    show.result(result.to_dict(), partial(_print, result))
    return ExitCode.DONE


def _print(result: "Benchmark", console: Console) -> None:
    console.print(f"{result.artifact} against {result.model}", style="bold")
    where = f"{result.machine}, {count(result.threads, 'thread')}" if result.machine == "CPU" else result.machine
    how = f"{where}, {result.pairs} pairs of runs, inputs: {result.inputs}"
    console.print(how, "", timing_table(result.timings), sep="\n")

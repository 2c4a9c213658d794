"""`sparsec verify OUT --against MODEL`: whether both compute the same."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.console import Console

from .cells import Name, plain_table
from .errors import ExitCode
from .options import (
    Against,
    Dim,
    Inputs,
    Json,
    MadeBatch,
    Out,
    Quiet,
    Seed,
    Threads,
    Tolerance,
    Verbose,
    make_config,
)
from .show import Show
from .text import count

if TYPE_CHECKING:
    from ..verify import Verdict


def verify_command(
    out: Out,
    against: Against,
    tolerance: Tolerance = 1e-4,
    batch: MadeBatch = None,
    dim: Dim = None,
    threads: Threads = None,
    seed: Seed = 0,
    inputs: Inputs = None,
    json: Json = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> Callable[[], int]:
    """Compare OUT's outputs with the dense MODEL's; exit with 3 where they differ by more than the tolerance."""
    options = {"batch": batch, "dim": dim, "threads": threads, "seed": seed, "inputs": inputs}
    return lambda: _verify(out, against, options, tolerance, Show(json, verbose, quiet))


def _verify(out: str, against: str, options: dict[str, Any], tolerance: float, show: Show) -> int:
    config = make_config(**options)
    show.check()
    from ..pair import open_pair
    from ..verify import verify

    with show.progress() as progress:
        verdict = verify(open_pair(out, against, config, progress), progress)
    passed = verdict.error <= tolerance
    data = {**verdict.to_dict(), "tolerance": tolerance, "passed": passed}
    show.result(data, partial(_print, verdict, tolerance))
    return ExitCode.DONE if passed else ExitCode.MISSED


def _print(verdict: "Verdict", tolerance: float, console: Console) -> None:
    console.print(f"{verdict.artifact} against {verdict.model}", style="bold")
    console.print(f"inputs: {verdict.inputs}, batch {', '.join(map(str, verdict.batch))}", "", sep="\n")
    table = plain_table(("<", "output"), (">", "largest error"), (">", "of its largest value"))
    table.columns[0].no_wrap = False
    for output in verdict.outputs:
        if output.mismatch:
            table.add_row(Name(output.name), output.mismatch, "")
        else:
            table.add_row(Name(output.name), f"{output.absolute:.3g}", f"{output.relative:.3g}")
    console.print(table, "", *_conclusion(verdict, tolerance), sep="\n")


def _conclusion(verdict: "Verdict", tolerance: float) -> list[str]:
    """Whether they agree, and what it means where they do not."""
    if verdict.error <= tolerance:
        words = f"Within the tolerance: no output differs by more than {tolerance:g} of its largest value."
    else:
        error = f"{verdict.error:.3g} of its largest value, more than {tolerance:g}"
        words = f"Not within the tolerance: an output differs by {error}."
    if verdict.pruned:
        words += (
            f" sparsec pruned {count(len(verdict.pruned), 'layer')} of this artifact, so a difference from the dense "
            "original is expected: it is what pruning does on these inputs, not an error of the kernels."
        )
        if verdict.kernel_error is not None:
            words += (
                f" Against the dense model with the same pruned weights it was {verdict.kernel_error:.1e} when made."
            )
    elif verdict.error > tolerance:
        words += (
            " Nothing was pruned, so only rounding should differ: is this the model that the artifact was made from?"
        )
    return [words]

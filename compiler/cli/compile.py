"""`sparsec MODEL -o OUT`: the main command."""

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import typer

from .console import print_message
from .errors import ExitCode
from .options import (
    Activations,
    Batch,
    Calib,
    DenseBaseline,
    Dim,
    Eval,
    EvalLabels,
    Force,
    Heal,
    HealOn,
    Inputs,
    Json,
    Labels,
    MaxDrop,
    Method,
    MetricName,
    Model,
    NoPermute,
    NoSurvey,
    Output,
    Pattern,
    Pick,
    PruneAll,
    Quiet,
    Ranges,
    Samples,
    Seed,
    Sparsity,
    Speedup,
    Target,
    Tf32,
    Threads,
    Tune,
    TuneOn,
    Values,
    Verbose,
    make_config,
)
from .result import Result
from .show import Show


def compile_command(
    context: typer.Context,
    model: Model,
    output: Output,
    sparsity: Sparsity = None,
    speedup: Speedup = None,
    max_drop: MaxDrop = None,
    pattern: Pattern = "auto",
    values: Values = "fp32",
    activations: Activations = "auto",
    ranges: Ranges = "mse",
    prune_all: PruneAll = False,
    calib: Calib = None,
    samples: Samples = None,
    labels: Labels = None,
    metric: MetricName = None,
    eval_data: Eval = None,
    eval_labels: EvalLabels = None,
    heal: Heal = None,
    heal_on: HealOn = None,
    no_permute: NoPermute = False,
    pick: Pick = None,
    method: Method = "auto",
    dense_baseline: DenseBaseline = "fp32",
    target: Target = "auto",
    tf32: Tf32 = False,
    tune: Tune = "quick",
    tune_on: TuneOn = None,
    no_survey: NoSurvey = False,
    force: Force = False,
    batch: Batch = None,
    dim: Dim = None,
    threads: Threads = None,
    seed: Seed = 0,
    inputs: Inputs = None,
    json: Json = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> Callable[[], int]:
    """Compile MODEL into the folder OUT, which any ONNX Runtime program loads.

    Without --sparsity no weight changes; for dense layers it is then measured what pruning would bring.
    """
    options = {
        "sparsity": sparsity,
        "speedup": speedup,
        "max_drop": max_drop,
        "pattern": pattern,
        "values": values,
        "activations": activations,
        "ranges": ranges,
        "prune_all": prune_all,
        "calib": calib,
        "samples": samples,
        "labels": labels,
        "metric": metric,
        "eval_data": eval_data,
        "eval_labels": eval_labels,
        "heal": heal,
        "heal_on": heal_on,
        "permute": not no_permute,
        "pick": pick,
        "method": method,
        "dense_baseline": dense_baseline,
        "target": target,
        "tf32": tf32,
        "tune": tune,
        "tune_on": tune_on,
        "survey": not no_survey,
        "batch": batch,
        "dim": dim,
        "threads": threads,
        "seed": seed,
        "inputs": inputs,
    }
    return lambda: _compile(model, output, force, options, Show(json, verbose, quiet), context.obj or ())


def _compile(model: str, out: str, force: bool, options: dict[str, Any], show: Show, typed: Sequence[str]) -> int:
    # Step 1. Whatever can be wrong with the command is said before any work.
    from ..artifact import SOLUTIONS

    kept = any(options[name] is not None for name in ("speedup", "max_drop", "heal"))
    config = make_config(**options, solutions=str(Path(out, SOLUTIONS)) if kept else None)
    show.check()
    from ..artifact import check_output

    check_output(Path(out), force)
    # Step 2. The work.
    from ..driver import compile as compile_model

    with show.progress() as progress:
        progress.start("reading the model", None)
        with closing(compile_model(Path(model), config, progress)) as compiled:
            compiled.save(out, force)
            report = compiled.report
    # Step 3. The result.
    result = Result(report, typed, out, full=show.verbose)
    show.result(report.to_dict(), result.print)
    for note in report.notes:
        print_message("warning", note)
    if report.missed:
        print_message("missed", report.missed)
        return ExitCode.MISSED
    return ExitCode.DONE

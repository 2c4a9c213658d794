"""What sparsec keeps of five real models' accuracy: patterns, sparsities, and what each step of it brings.

    python benchmarks/accuracy/run.py TASK [--pattern P] [--sparsity S,S,...] [--steps NAME,...] [--json FILE]

All weights that `weights.py` counts are pruned, the first and the last layer too, as the baseline's are; the result is
the dense model with zeros, run by ONNX Runtime, so nothing here depends on kernels. The steps, each with all before it:

| step | |
|---|---|
| magnitude | norms, the same share of zeros in every layer |
| solved | masks and weights by `--method auto`, each layer by itself, the same share in every layer |
| repaired | fitted once more to what the pruned model gives each layer |
| permuted | channels reordered before blocks are cut (patterns with blocks only) |
| allocated | layers' shares of zeros chosen by their errors, the same total |

Rows have the model, method (the step), pattern, sparsity asked and measured, metric and dense metric; several seeds
give their mean. Results are added to the JSON file, and rows of the same task, pattern and step in it are replaced.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
from tables import tables
from tasks import REPOSITORY, TASKS, Feeds, Run, Task
from weights import sparsity as measured

from sparsec import CompileConfig
from sparsec.compiler.budget import Fitting
from sparsec.compiler.budget.options import shares_masks
from sparsec.compiler.calibration import Weights, has_rows
from sparsec.compiler.context import Silent, make_context
from sparsec.compiler.exporter import export
from sparsec.compiler.frontend import read
from sparsec.compiler.plan import Plan, Pruned
from sparsec.compiler.probe import Workload
from sparsec.ir import Program, parse_pattern
from sparsec.passes.prune import prune_by_norm

RESULTS = REPOSITORY / "benchmarks" / "results" / "accuracy.json"
SPARSITIES = (0.5, 0.6, 0.7, 0.8)
STEPS = ("magnitude", "solved", "repaired", "permuted", "allocated")
Row = dict[str, Any]


def runner(program: Program, weights: dict[str, Weights]) -> tuple[Run, float]:
    """The dense model with these weights, and the share of zeros in it."""
    matrices = {name: new.matrix for name, new in weights.items()}
    biases = {name: new.bias for name, new in weights.items() if new.bias is not None}
    proto = onnx_ir.to_proto(export(program, {}, matrices, biases))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda feeds: list(session.run(None, feeds)), measured(onnx.ModelProto.FromString(proto.SerializeToString()))


def fitting(
    task: Task, feeds: Feeds, pattern: str, levels: list[float], permute: bool, folder: Path, **more: Any
) -> Fitting:
    """All layers of the task's model solved at all levels, on these inputs; `more` options as `CompileConfig` has."""
    path = folder / "calibration.npz"
    np.savez(path, **feeds)
    config = CompileConfig(calib=path, pattern=pattern, permute=permute, **{"threads": 2} | more)
    program = read(task.model)
    layers = [layer for layer in program.layers if has_rows(layer) and layer.weight.size]
    plan = Plan({}, {}, {layer.name: Pruned(layer, 0.0, layer.weight) for layer in layers})
    context = make_context(config, folder, Silent())
    return Fitting(program, plan, Workload({}, {}, ""), context, timed=False, levels=levels)


def made(fit: Fitting, step: str, share: float) -> dict[str, Weights]:
    """The weights of one step."""
    if step == "allocated":
        return fit.at_sparsity(share).weights
    uniform = {name: [option.level for option in found].index(share) for name, found in fit.options.items()}
    return fit.solved(uniform) if step == "solved" else fit.make(uniform).weights


def points(task: Task, seed: int, pattern: str, shares: list[float], steps: list[str]) -> Iterator[Row]:
    """A row a step and share of zeros, of one seed."""
    program = read(task.model)
    dense = task.score(runner(program, {})[0], seed)

    def row(step: str, share: float, source: Program, weights: dict[str, Weights], start: float) -> Row:
        run, zeros = runner(source, weights)
        found = {"model": task.name, "method": step, "pattern": pattern, "sparsity_asked": share, "sparsity": zeros}
        seconds = round(time.perf_counter() - start, 1)
        result: Row = {**found, "metric": task.score(run, seed), "dense": dense, "seed": seed, "seconds": seconds}
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}, flush=True)
        return result

    if "magnitude" in steps:
        for share in shares:
            start = time.perf_counter()
            masked = {
                layer.name: Weights(prune_by_norm(layer.weight, parse_pattern(pattern), share))
                for layer in program.layers
                if has_rows(layer) and layer.weight.size
            }
            yield row("magnitude", share, program, masked, start)
    blocks = shares_masks(parse_pattern(pattern))
    for permute in (False, True):
        # Allocation comes last: on reordered channels where there are blocks.
        names = {"permuted", "allocated"} if permute else {"solved", "repaired"} | (set() if blocks else {"allocated"})
        wanted = [step for step in STEPS if step in steps and step in names]
        if not wanted or (permute and not blocks):
            continue
        with tempfile.TemporaryDirectory() as folder:
            levels = sorted({*shares, *(LEVELS if "allocated" in wanted else ())})
            start = time.perf_counter()
            feeds = task.calibration(seed)
            fit = fitting(task, feeds, pattern, levels, permute, Path(folder), samples=10_000)
            for share in shares:
                for step in wanted:
                    yield row(step, share, fit.program, made(fit, step, share), start)
                    start = time.perf_counter()


# Sparsities that layers can get when they are allocated, besides those asked for.
LEVELS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def mean(rows: list[Row]) -> list[Row]:
    """Rows that differ by their seed only, as one."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["sparsity_asked"]), []).append(row)
    return [
        {**group[0], **{key: float(np.mean([row[key] for row in group])) for key in ("metric", "dense", "sparsity")}}
        | {"seed": [row["seed"] for row in group], "seconds": sum(row["seconds"] for row in group)}
        for group in groups.values()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--pattern", default="unstructured")
    parser.add_argument("--sparsity", default=",".join(map(str, SPARSITIES)))
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    task, shares = TASKS[options.task], [float(share) for share in options.sparsity.split(",")]
    steps = options.steps.split(",")
    rows = mean([row for seed in task.seeds for row in points(task, seed, options.pattern, shares, steps)])
    old = json.loads(options.json.read_text()) if options.json.exists() else {"rows": []}
    key = {(row["model"], row["pattern"], row["method"], row["sparsity_asked"]) for row in rows}
    kept = [r for r in old["rows"] if (r["model"], r["pattern"], r["method"], r["sparsity_asked"]) not in key]
    versions = {"sparsec": version("sparsec"), "onnxruntime": onnxruntime.__version__, "numpy": np.__version__}
    data = {"date": date.today().isoformat(), "versions": versions, "rows": [*kept, *rows]}
    options.json.write_text(json.dumps(data, indent=1) + "\n")
    print(tables(rows))


if __name__ == "__main__":
    main()

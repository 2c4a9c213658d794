"""Channels left out: what is kept of the accuracy, how fast what is left is, that it is exact, and what cannot go.

    python benchmarks/structured.py accuracy TASK ... [--heal 5m] # tasks of accuracy/tasks.py
    python benchmarks/structured.py models MODEL.onnx ... [--builders]
    python benchmarks/structured.py tables                        # of what the JSON file has

`accuracy` leaves 30 and 50 % of the weights of the layers that can get smaller out, by norms without data (about the
same share of every dimension, no weight changes) and by OBS with data (shares by the error of the outputs, the layers
fitted again), and scores both on the test data; with `--heal` the latter are trained, without labels, on the inputs of
`accuracy/heal.py` (`cpu_seconds` of all threads, which do not depend on what else the machine does). `models` leaves
half of them out by norms and compares the smaller model with the one that has zeros there, on random inputs. Both time
the smaller model in ONNX Runtime against the one that came, alternately, batch 1 and 16.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime

sys.path.insert(0, str(Path(__file__).parent / "accuracy"))
from tasks import TASKS, Run

from sparsec import CompileConfig, SparsecError
from sparsec.compiler.context import Silent, make_context
from sparsec.compiler.decide import STEADY
from sparsec.compiler.driver import relative_error
from sparsec.compiler.exporter import session_source
from sparsec.compiler.frontend import read
from sparsec.compiler.machine import Cpu
from sparsec.compiler.probe import probe
from sparsec.compiler.removal import Removal, Smaller
from sparsec.ir import Program
from sparsec.models import BUILDERS

RESULTS = Path(__file__).parent / "results" / "structured.json"
SHARES = (0.3, 0.5)
BATCHES = (1, 16)
PAIRS = 11
Row = dict[str, Any]


def runner(model: onnx_ir.Model) -> Run:
    session = onnxruntime.InferenceSession(
        onnx_ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return lambda feeds: list(session.run(None, feeds))


def timed(program: Program, smaller: Smaller, folder: Path) -> Row:
    """The largest difference from the model with zeros, and at each batch size the speedup with its quartiles."""
    config = CompileConfig(batch=BATCHES)
    machine = Cpu(config.thread_count)
    try:
        workload = probe(program, config, folder, machine)
    except SparsecError:
        workload = probe(program, CompileConfig(), folder, machine)  # the model's batch is fixed
    if not workload.feeds:
        return {"not_run": workload.failure}
    models = (program.model, smaller.program.model, smaller.masked)
    before, after, masked = (machine.open(session_source(model, folder)) for model in models)
    row: Row = {"error": 0.0}
    for batch, feeds in workload.feeds.items():
        pairs = zip(masked.run(None, feeds), after.run(None, feeds), strict=True)
        row["error"] = max(row["error"], *(relative_error(expected, found) for expected, found in pairs))
        result = machine.compare(before, after, feeds, PAIRS)
        row[f"batch {batch}"] = [round(value, 3) for value in (result.speedup, *result.spread)]
    return row


def accuracy(name: str, limit: str | None) -> list[Row]:
    """Rows of one task."""
    task, rows = TASKS[name], []
    program = read(task.model)
    dense = task.score(runner(program.model))
    with tempfile.TemporaryDirectory() as folder:
        calib, train = Path(folder) / "calib.npz", Path(folder) / "train.npz"
        np.savez(calib, **task.calibration())
        for method in ("norm", "obs, fitted") if limit is None else ("healed",):
            start, begun = time.perf_counter(), time.process_time()
            config = CompileConfig(calib=None if method == "norm" else calib, samples=10_000, pattern="structured")
            if method == "healed":
                np.savez(train, **task.training())
                config = CompileConfig(calib=train, sparsity=SHARES[0], heal=limit, pattern="structured")
            removal = Removal(program, make_context(config, Path(folder), Silent()))
            weights = removal.weights()
            for share in SHARES:
                smaller = removal.make(removal.at(share, weights))
                found = {"model": name, "method": method, "asked": share, "gone": weights.gone(smaller.kept)}
                if config.heal_limit is not None:
                    smaller = removal.heal(smaller, config.heal_limit)
                    record = smaller.healing
                    assert record is not None, "it was asked for"
                    found |= {"heal": limit, "steps": record.steps, "samples": record.samples, "note": record.note}
                    found["cpu_seconds"] = round(time.process_time() - begun, 1)
                found |= {"metric": task.score(runner(smaller.program.model)), "dense": dense}
                found["seconds"] = round(time.perf_counter() - start, 1)
                rows.append(found | timed(program, smaller, Path(folder)))
                print(rows[-1], flush=True)
                start, begun = time.perf_counter(), time.process_time()
    return rows


def model(path: Path) -> Row:
    """Half of what can get smaller is left out by norms, and what cannot go says why."""
    program = read(path)
    with tempfile.TemporaryDirectory() as folder:
        config = CompileConfig(pattern="structured")
        removal = Removal(program, make_context(config, Path(folder), Silent()))
        row: Row = {"model": path.stem, "method": "exact", "layers": len(program.layers)}
        row["dimensions"] = len(removal.cuts)
        row["declined"] = dict(Counter(removal.declined.values()))
        if not removal.cuts:
            return row
        weights = removal.weights()
        smaller = removal.make(removal.at(0.5, weights))
        row |= {"asked": 0.5, "gone": weights.gone(smaller.kept)}
        row["share"] = weights.whole / max(sum(layer.weight.size for layer in program.layers), 1)
        return row | timed(program, smaller, Path(folder))


def tables(rows: list[Row]) -> str:
    """Markdown of all rows."""
    text = [
        "| model, dense | removed | by | metric | batch 1 | batch 16 |",
        "|---|---|---|---|---|---|",
    ]
    for row in (row for row in rows if row["method"] != "exact"):
        speeds = " | ".join(_speed(row, batch) for batch in BATCHES)
        name = f"{row['model']}, {100 * row['dense']:.1f}"
        text.append(f"| {name} | {row['gone']:.0%} | {row['method']} | {100 * row['metric']:.1f} | {speeds} |")
    text += [
        "",
        "| model | dimensions | removed | batch 1 | batch 16 | difference | layers whose outputs stay |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in (row for row in rows if row["method"] == "exact"):
        speeds = " | ".join(_speed(row, batch) for batch in BATCHES)
        gone = f"{row['gone']:.0%}" if "gone" in row else "-"
        error = f"{row['error']:.0e}" if "error" in row else "-"
        stay = f"{sum(row['declined'].values())} of {row['layers']}"
        text.append(f"| {row['model']} | {row['dimensions']} | {gone} | {speeds} | {error} | {stay} |")
    return "\n".join(text)


def _speed(row: Row, batch: int) -> str:
    """The speedup; quartiles as far apart as decisions do not keep them say how busy the machine was, not how fast."""
    found = row.get(f"batch {batch}")
    if found is None:
        return "-"
    return f"{found[0]:.2f}x" if found[2] < STEADY * found[1] else "unsteady"


def store(path: Path, rows: list[Row]) -> list[Row]:
    """Add rows to the file; they take the places of older ones of the same."""
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    new = {(row["model"], row["method"], row.get("asked")) for row in rows}
    kept = [row for row in old if (row["model"], row["method"], row.get("asked")) not in new]
    versions = {"sparsec": version("sparsec"), "onnxruntime": onnxruntime.__version__, "numpy": np.__version__}
    data = {"date": date.today().isoformat(), "versions": versions, "rows": [*kept, *rows]}
    path.write_text(json.dumps(data, indent=1) + "\n")
    return [*kept, *rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("accuracy", "models", "tables"))
    parser.add_argument("names", nargs="*")
    parser.add_argument("--heal", help="of accuracy: train, by so much time or so many steps")
    parser.add_argument("--builders", action="store_true", help="also the models of models/")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows: list[Row] = store(options.json, [])
    with tempfile.TemporaryDirectory() as folder:
        if options.what == "accuracy":
            for name in options.names:
                rows = store(options.json, accuracy(name, options.heal))
        elif options.what == "models":
            paths = [Path(name) for name in options.names]
            for name, build in BUILDERS.items() if options.builders else ():
                paths.append(Path(folder) / f"{name}.onnx")
                paths[-1].write_bytes(build().SerializeToString())
            for path in paths:
                rows = store(options.json, [model(path)])
                print(rows[-1], flush=True)
    print(tables(rows))


if __name__ == "__main__":
    main()

"""What short training brings back of a pruned model's accuracy, from the ONNX file and inputs without labels.

    python benchmarks/accuracy/heal.py TASK [--pattern P] [--sparsity S,S,...] [--heal TIME|STEPS] [--json FILE]

All weights are pruned as in `run.py`, shares of zeros allocated over layers, channels reordered; then the kept weights
are trained against the dense model on the task's training inputs, of which a fifth is held back to choose the best
state. No test sample and no label takes part. Rows have the metric on the test samples before and after, what training
took, and the machine's load beside it; rows of the same task, pattern and sparsity in the JSON file are replaced.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from run import LEVELS, REPOSITORY, fitting, runner
from tasks import TASKS, Task

from sparsec.compiler.frontend import read

RESULTS = REPOSITORY / "benchmarks" / "results" / "heal.json"
Row = dict[str, Any]


def points(task: Task, pattern: str, shares: list[float], limit: str, threads: int) -> Iterator[Row]:
    """A row a share of zeros."""
    dense = task.score(runner(read(task.model), {})[0])
    with tempfile.TemporaryDirectory() as folder:
        levels = sorted({*shares, *LEVELS})
        fit = fitting(task, task.training(), pattern, levels, True, Path(folder), heal=limit, threads=threads)
        for share in shares:
            chosen = fit.at_sparsity(share)
            before = fit.make(chosen.allocation)
            run, zeros = runner(chosen.program, chosen.weights)
            assert chosen.healing is not None, "it was asked for"
            row = {
                "model": task.name,
                "pattern": pattern,
                "sparsity_asked": share,
                "sparsity": zeros,
                "metric": task.metric,
                "dense": dense,
                "pruned": task.score(runner(before.program, before.weights)[0]),
                "healed": task.score(run),
                "held_back": [chosen.healing.before, chosen.healing.after],
                "heal": limit,
                "steps": chosen.healing.steps,
                "seconds": round(chosen.healing.seconds, 1),
                "samples": chosen.healing.samples,
                "note": chosen.healing.note,
                "load": round(os.getloadavg()[1], 1),
            }
            print(row, flush=True)
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--pattern", default="group:16")
    parser.add_argument("--sparsity", default="0.5,0.7")
    parser.add_argument("--heal", default="10m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    shares = [float(share) for share in options.sparsity.split(",")]
    rows = list(points(TASKS[options.task], options.pattern, shares, options.heal, options.threads))
    old = json.loads(options.json.read_text())["rows"] if options.json.exists() else []
    key = {(row["model"], row["pattern"], row["sparsity_asked"]) for row in rows}
    kept = [row for row in old if (row["model"], row["pattern"], row["sparsity_asked"]) not in key]
    versions = {"sparsec": version("sparsec"), "onnxruntime": onnxruntime.__version__, "torch": torch.__version__}
    data = {"date": date.today().isoformat(), "versions": versions, "rows": [*kept, *rows]}
    options.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What short training brings back of a pruned model's accuracy, from the ONNX file and inputs without labels.

    python benchmarks/accuracy/heal.py TASK [--pattern P] [--sparsity S,S,...] [--heal TIME|STEPS] [--json FILE]

All weights are pruned as in `run.py`, shares of zeros allocated over layers, channels reordered; then the kept weights
are trained against the dense model on the task's training inputs, of which a fifth is held back to choose the best
state. No test sample and no label takes part. Rows are those of `run.py`, before training (`allocated`) and after
(`healed`), with what training took and the machine's load beside it: a time means little without. `cpu_seconds` are of
all threads, repair and judging included, and do not depend on the load: ten minutes on two cores are 1,200 of them.
Several seeds give their mean. Rows of the same task, pattern and sparsity in the JSON file are replaced.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from run import LEVELS, fitting, mean, runner
from tasks import REPOSITORY, TASKS, Task

from sparsec.compiler.frontend import read

RESULTS = REPOSITORY / "benchmarks" / "results" / "heal.json"
Row = dict[str, Any]


def points(task: Task, seed: int, pattern: str, shares: list[float], limit: str, threads: int) -> Iterator[Row]:
    """Two rows a share of zeros, before and after training, of one seed."""
    dense = task.score(runner(read(task.model), {})[0], seed)
    with tempfile.TemporaryDirectory() as folder:
        levels = sorted({*shares, *LEVELS})
        fit = fitting(task, task.training(seed), pattern, levels, True, Path(folder), heal=limit, threads=threads)
        for share in shares:
            start = time.process_time()
            healed = fit.at_sparsity(share)
            used = time.process_time() - start
            record = healed.healing
            assert record is not None, "it was asked for"
            common = {"model": task.name, "pattern": pattern, "sparsity_asked": share, "dense": dense, "seed": seed}
            for method, chosen in (("allocated", fit.make(healed.allocation)), ("healed", healed)):
                run, zeros = runner(chosen.program, chosen.weights)
                row: Row = {**common, "method": method, "sparsity": zeros, "metric": task.score(run, seed)}
                row["seconds"] = round(record.seconds, 1) if method == "healed" else 0.0
                if method == "healed":
                    row |= {"heal": limit, "steps": record.steps, "samples": record.samples, "note": record.note}
                    row |= {"held_back": [record.before, record.after], "load": round(os.getloadavg()[1], 1)}
                    row["cpu_seconds"] = round(used, 1)
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
    task, limit = TASKS[options.task], options.heal
    rows = mean(
        [row for seed in task.seeds for row in points(task, seed, options.pattern, shares, limit, options.threads)]
    )
    old = json.loads(options.json.read_text())["rows"] if options.json.exists() else []
    key = {(row["model"], row["pattern"], row["sparsity_asked"]) for row in rows}
    kept = [row for row in old if (row["model"], row["pattern"], row["sparsity_asked"]) not in key]
    versions = {"sparsec": version("sparsec"), "onnxruntime": onnxruntime.__version__, "torch": torch.__version__}
    data = {"date": date.today().isoformat(), "versions": versions, "rows": [*kept, *rows]}
    options.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()

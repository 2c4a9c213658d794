"""Dense time / sparse time of whole models at several sparsities: never below 0.97, the noise.

    python benchmarks/never_slower.py MODEL.onnx ... [--builders] [--json FILE]

Every model is pruned in `group:16` by norm at each sparsity and compiled for batch 1 and 16; then the artifact is read
and timed against the model as it came, alternately, in one process. Where no layer became sparse the artifact is the
model itself, and the ratio shows the noise. Builders are those of `models/`, at their real shapes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import onnxruntime

import sparsec
from sparsec.compiler.config import CompileConfig
from sparsec.compiler.frontend import read
from sparsec.compiler.probe import probe
from sparsec.compiler.runtime import Runner, compare, open_session
from sparsec.models import BUILDERS

SPARSITIES = (0.3, 0.5, 0.8, 0.9)
BATCHES = (1, 16)
# Pairs of runs: for models under 50 ms 11 to 15 pairs left up to 4 % between two sessions of one and the same model, 41
# leave 1 to 2 %.
PAIRS, PAIRS_SHORT, SHORT_US = 11, 41, 50_000.0


def measure(model: Path, sparsity: float, dims: dict[str, int]) -> list[dict[str, Any]]:
    """One row a batch size, or one that says why there is none."""
    config = CompileConfig(sparsity=sparsity, batch=BATCHES, dims=dims)
    try:
        result = sparsec.compile(model, config)
    except sparsec.UsageError:
        config = config.model_copy(update={"batch": ()})  # the model's batch is fixed
        result = sparsec.compile(model, config)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        result.save(out)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = config.thread_count
        sparse, dense = sparsec.load(out, options), open_session(model, config.thread_count)
        workload = probe(read(model), config, Path(folder))
        for batch, feeds in workload.feeds.items():
            sides = Runner(dense, feeds), Runner(sparse, feeds)
            short = compare(*sides, pairs=3).dense_us < SHORT_US
            pair = compare(*sides, pairs=PAIRS_SHORT if short else PAIRS)
            rows.append(
                {
                    "model": model.stem,
                    "dims": dims,
                    "sparsity": sparsity,
                    "batch": batch,
                    "sparse_layers": result.report.sparse_layers,
                    "layers": len(result.report.decisions),
                    "dense_us": round(pair.dense_us, 1),
                    "sparse_us": round(pair.sparse_us, 1),
                    "ratio": round(pair.speedup, 3),
                    "quartiles": [round(q, 3) for q in pair.spread],
                    "compile_s": round(result.report.seconds, 1),
                }
            )
        if not workload.feeds:
            rows.append({"model": model.stem, "sparsity": sparsity, "not_run": workload.failure})
    result.close()
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line a model, one column a sparsity, "batch 1 / batch 16" in the cells."""
    sparsities = sorted({row["sparsity"] for row in rows})
    text = [
        f"| model | sparse layers | {' | '.join(f'{s:.0%}' for s in sparsities)} |",
        "|---|---|" + "---|" * len(sparsities),
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model and "ratio" in row]
        cells = (" / ".join(f"{row['ratio']:.2f}" for row in mine if row["sparsity"] == s) for s in sparsities)
        layers = sorted({row["sparse_layers"] for row in mine})
        of = f"{' or '.join(map(str, layers))} of {mine[0]['layers']}" if mine else "did not run"
        text.append(f"| {model} | {of} | {' | '.join(cells)} |")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--builders", action="store_true", help="also the models of models/")
    parser.add_argument("--dim", action="append", default=[], metavar="NAME=SIZE")
    parser.add_argument("--sparsity", type=float, action="append", help="instead of 0.3, 0.5, 0.8 and 0.9")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    dims = {name: int(size) for name, size in (text.split("=") for text in arguments.dim)}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        models = list(arguments.models)
        if arguments.builders:
            for name, build in BUILDERS.items():
                models.append(Path(folder) / f"{name}.onnx")
                models[-1].write_bytes(build().SerializeToString())
        for model in models:
            for sparsity in arguments.sparsity or SPARSITIES:
                for row in measure(model, sparsity, dims):
                    rows.append(row)
                    print(*(f"{value}" for value in row.values()), sep="\t", flush=True)
                    if arguments.json:
                        record = {"date": time.strftime("%Y-%m-%d"), "rows": rows}
                        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()

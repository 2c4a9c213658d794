"""A feed-forward block 1024-4096-1024 (bias, ReLU), sparse against dense, through ONNX Runtime on both sides.

    python benchmarks/ffn.py [--json FILE] [--quick]

Random weights pruned by norm, float32, two threads, every pair of sides alternately in one process; a cell is the
median of dense time / sparse time with its quartiles. The sparse side is the artifact as a user would load it. ONNX
Runtime's static int8 (QDQ) and, where OpenVINO is installed, its bfloat16 and int8 stand beside it: dense forms that a
user could pick instead. The crossover is the share of zeros from which the two layers together are faster.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

import sparsec
from sparsec.compiler.config import Tune
from sparsec.compiler.dense_int8 import statically_quantized
from sparsec.compiler.runtime import Comparison, Runner, compare, open_session
from sparsec.models import build

BATCHES = (1, 16, 128)
THREADS = 2
MAIN = [
    ("group:32", 0.9),
    ("group:16", 0.9),
    ("block:32x32", 0.9),
    ("group:32", 0.8),
    ("group:16", 0.8),
    ("block:32x32", 0.8),
]
CROSSOVER = (0.0, 0.2, 0.4, 0.6)

Feeds = dict[str, np.ndarray[Any, Any]]


def inputs(batch: int, seed: int = 0) -> Feeds:
    """Standard normal activations."""
    return {"input": np.random.default_rng(seed).standard_normal((batch, 1024)).astype(np.float32)}


def compiled(model: onnx.ModelProto, pattern: str, sparsity: float) -> sparsec.CompiledModel:
    """Both layers pruned; the second is named because a model's last layer is not pruned unasked."""
    config = sparsec.CompileConfig(
        layer_sparsity=(("*", sparsity),), pattern=pattern, batch=BATCHES, threads=THREADS, tune=Tune.QUICK
    )
    return sparsec.compile(model, config)


def sparse_table(model: onnx.ModelProto, folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of the main table."""
    dense = open_session(model.SerializeToString(), THREADS)
    for pattern, sparsity in MAIN:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            result = compiled(model, pattern, sparsity)
            result.save(Path(scratch) / "out")
            result.close()
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = THREADS
            sparse = sparsec.load(Path(scratch) / "out", options)
            for batch in BATCHES:
                pair = compare(Runner(dense, inputs(batch)), Runner(sparse, inputs(batch)), pairs=15)
                layers = f"{result.report.sparse_layers} of 2 sparse"
                yield row(f"{pattern} {sparsity:.0%}", batch, pair, layers)


def row(name: str, batch: int, pair: Comparison, note: str = "") -> dict[str, Any]:
    """One measurement as plain data."""
    return {
        "side": name,
        "batch": batch,
        "dense_us": round(pair.dense_us, 1),
        "other_us": round(pair.sparse_us, 1),
        "speedup": round(pair.speedup, 2),
        "quartiles": [round(q, 2) for q in pair.spread],
        "note": note,
    }


def int8_model(model: onnx.ModelProto, folder: Path) -> Path:
    """ONNX Runtime's own static quantisation, calibrated on eight batches of the benchmark's own distribution."""
    source = folder / "float.onnx"
    onnx.save(model, source)
    return Path(statically_quantized(str(source), [inputs(16, seed) for seed in range(8)], folder))


def dense_forms(model: onnx.ModelProto, folder: Path) -> Iterator[dict[str, Any]]:
    """Rows for the dense forms that need no pruning."""
    dense = open_session(model.SerializeToString(), THREADS)
    path = int8_model(model, folder)
    int8 = open_session(path, THREADS)
    for batch in BATCHES:
        yield row("ONNX Runtime int8", batch, compare(Runner(dense, inputs(batch)), Runner(int8, inputs(batch)), 15))
    try:
        import openvino
    except ImportError:
        print("OpenVINO is not installed: its rows are left out")
        return
    for name, source, precision in (("OpenVINO bf16", folder / "float.onnx", "bf16"), ("OpenVINO int8", path, "f32")):
        for batch in BATCHES:
            run = openvino_runner(openvino, source, precision, inputs(batch))
            yield row(name, batch, compare(Runner(dense, inputs(batch)), run, 15))


def openvino_runner(openvino: Any, path: Path, precision: str, feeds: Feeds) -> Callable[[], None]:
    """OpenVINO's latency mode on the same inputs."""
    core = openvino.Core()
    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(core.read_model(path), "CPU", options).create_infer_request()
    request.infer(feeds)
    return lambda: request.infer(share_inputs=True, inputs=feeds)


def crossover(model: onnx.ModelProto) -> Iterator[dict[str, Any]]:
    """The share of zeros from which both layers together are faster, by the layers' own timings, interpolated."""
    for pattern in ("group:32", "group:16", "block:32x32"):
        speedups: dict[int, list[float]] = {batch: [] for batch in BATCHES}
        for sparsity in CROSSOVER:
            result = compiled(model, pattern, sparsity or 0.001)
            for i, batch in enumerate(BATCHES):
                timings = [decision.timings[i] for decision in result.report.decisions]
                speedups[batch].append(sum(t.dense_us for t in timings) / sum(t.sparse_us for t in timings))
            result.close()
        for batch in BATCHES:
            yield {
                "pattern": pattern,
                "batch": batch,
                "zeros": round(crossing(speedups[batch]), 2),
                "speedups": speedups[batch],
            }


def crossing(speedups: list[float]) -> float:
    """Where the speedup passes 1: between the last point below it and the next, linear."""
    below = [i for i, speedup in enumerate(speedups) if speedup < 1]
    if not below:
        return CROSSOVER[0]
    i = below[-1]
    if i == len(speedups) - 1:
        return 1.0
    share = (1 - speedups[i]) / (speedups[i + 1] - speedups[i])
    return CROSSOVER[i] + share * (CROSSOVER[i + 1] - CROSSOVER[i])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--quick", action="store_true", help="only the sparse rows")
    arguments = parser.parse_args()
    model = build("ffn")
    rows: list[dict[str, Any]] = []
    points: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        print(f"{'against dense float32':24} {'batch':>5} {'dense us':>9} {'us':>9} {'ratio':>7}  quartiles")
        tables = [sparse_table(model, Path(name))] + ([] if arguments.quick else [dense_forms(model, Path(name))])
        for table in tables:
            for r in table:
                rows.append(r)
                low, high = r["quartiles"]
                print(
                    f"{r['side']:24} {r['batch']:5} {r['dense_us']:9.1f} {r['other_us']:9.1f} {r['speedup']:6.2f}x  "
                    f"{low:.2f}-{high:.2f}  {r['note']}",
                    flush=True,
                )
        for point in () if arguments.quick else crossover(model):
            points.append(point)
            print(f"crossover {point['pattern']:12} batch {point['batch']:3}: {point['zeros']:.0%} zeros", flush=True)
    if arguments.json:
        versions = {"sparsec": sparsec.__version__, "onnxruntime": onnxruntime.__version__}
        record = {
            "date": time.strftime("%Y-%m-%d"), "cpu": cpu_name(), "threads": THREADS, "versions": versions,
            "rows": rows, "crossover": points,
        }  # fmt: skip
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


def cpu_name() -> str:
    """The processor's own name for itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()

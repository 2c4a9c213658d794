"""MiniLM with few bits and zeros: loss of metric against speed, beside what dense int8 gives.

    python benchmarks/minilm_low_precision.py [--json FILE] [--picture FILE.png]

Speed: batch 8, sequence 128, two threads, all forms in turn in one process, the median of dense float32 over each, run
by run. Metric: Spearman on SICK dev (`accuracy/tasks.py`); everything is calibrated on the same 256 sentences of SICK
train. Sparse forms are points of the frontier that one command finds, by `--pick`: with values of int8 and products of
integers, X rounded by rows (dynamic) or by scales of the calibration (static), and in float32.

Dense int8 is what ONNX Runtime's own tools make of the model, by the recipe that loses least and the one that is
fastest: `quantize_dynamic`, and `quantize_static` in QDQ form of all operators and of the products with weights alone,
whose ranges leave out what lies beyond the 99.999th percentile (of all operators OpenVINO refuses the model, so that it
runs the latter). OpenVINO is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from ffn import cpu_name
from ffn_low_precision import ratio
from onnxruntime.quantization import CalibrationDataReader

import sparsec
from sparsec.compiler.config import Tune
from sparsec.compiler.dense_int8 import statically_quantized
from sparsec.compiler.runtime import Runner, open_session

sys.path.insert(0, str(Path(__file__).parent / "accuracy"))
from tasks import TASKS, Feeds, Run

TASK = TASKS["minilm"]
BATCH, SEQUENCE, THREADS = 8, 128, 2
ROUNDS, REST = 21, 0.04
# Values, how X is multiplied, and which points of the frontier are made: the last is the fastest.
FORMS = (
    ("int8", "dynamic", (3, 5, 6, 7)),
    ("int8", "static", (3, 5, 6, 7)),
    ("fp32", "auto", (2, 4, 5)),
)
# Per cent up to which the picture goes.
MOST_LOSS = 3.0
# Calibration samples of ONNX Runtime's tool in one run.
RUN = 16


def timing_feeds() -> Feeds:
    """Random tokens, none masked."""
    ids = np.random.default_rng(0).integers(1000, 30000, (BATCH, SEQUENCE))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def dense_forms(folder: Path) -> Iterator[tuple[str, Callable[[], Any], Run]]:
    """Name, a run of the timed inputs, and a run of any."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    source, feeds = str(TASK.model), timing_feeds()
    quantize_dynamic(source, folder / "dynamic.onnx", weight_type=QuantType.QInt8, per_channel=True)
    quantize_products(source, str(folder / "products.onnx"))
    paths = {
        "float32, ONNX Runtime": source,
        "int8 dynamic, ONNX Runtime": str(folder / "dynamic.onnx"),
        "int8 static, ONNX Runtime": statically_quantized(source, run_batches(), folder),
        "int8 static of MatMul, ONNX Runtime": str(folder / "products.onnx"),
    }
    for name, path in paths.items():
        session = open_session(path, THREADS)
        yield name, Runner(session, feeds), lambda x, session=session: session.run(None, x)
    try:
        import openvino
    except ImportError:
        print("OpenVINO is not installed: its row is left out")
        return
    core = openvino.Core()
    options = {"INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(paths["int8 static of MatMul, ONNX Runtime"]), "CPU", options)
    request = compiled.create_infer_request()
    yield (
        "int8 static of MatMul, OpenVINO",
        lambda: request.infer(feeds, share_inputs=True),
        lambda x: [request.infer(x)[0].copy()],
    )


def run_batches() -> list[Feeds]:
    """The calibration data in runs."""
    data = TASK.calibration()
    count = len(data["input_ids"])
    return [{name: array[i : i + RUN] for name, array in data.items()} for i in range(0, count, RUN)]


class Once(CalibrationDataReader):  # type: ignore[misc]
    """Some runs, one time."""

    def __init__(self, runs: list[Feeds]) -> None:
        self._left = iter(runs)

    def get_next(self) -> Feeds | None:
        return next(self._left, None)


def quantize_products(source: str, target: str, form: str = "QDQ") -> None:
    """`quantize_static` of MatMul alone, weights by output, activations as uint8 whose ranges are percentiles."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    logging.disable(logging.WARNING)
    try:
        quantize_static(
            source,
            target,
            Once(run_batches()),
            quant_format=QuantFormat[form],
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.Percentile,
        )
    finally:
        logging.disable(logging.NOTSET)


def sparse_forms(folder: Path) -> Iterator[tuple[str, float, Callable[[], Any], Run]]:
    """Name, share of zeros, and runs as of the dense forms: points of frontiers, each solved once."""
    np.savez(folder / "calibration.npz", **TASK.calibration())
    for values, activations, picks in FORMS:
        name = f"{values} {activations}" if values == "int8" else values
        for pick in picks:
            # A folder for each: a library that a session holds is not loaded again from the same path.
            out = folder / f"{name} {pick}"
            config = sparsec.CompileConfig(
                calib=folder / "calibration.npz",
                values=values,
                activations=activations,
                speedup=1.2,
                pick=pick,
                solutions=folder / f"{name} {picks[0]}" / "cache",
                batch=(BATCH,),
                dims={"sequence": SEQUENCE},
                threads=THREADS,
                tune=Tune.QUICK,
            )
            result = sparsec.compile(TASK.model, config)
            result.save(out)
            layers = {decision.layer: decision for decision in result.report.decisions if decision.choice == "sparse"}
            zeros = sum(d.zeros_after * d.shape[0] * d.shape[1] for d in layers.values())
            total = sum(d.shape[0] * d.shape[1] for d in result.report.decisions)
            result.close()
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = THREADS
            session = sparsec.load(out, options)
            yield (
                f"{name}, point {pick}, {len(layers)} layers",
                zeros / total,
                Runner(session, timing_feeds()),
                lambda x, session=session: session.run(None, x),
            )


def race(runs: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Milliseconds of every form in every round."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            time.sleep(REST)
            start = time.perf_counter()
            run()
            taken[name].append(1e3 * (time.perf_counter() - start))
    return taken


def overtaking(rows: list[dict[str, Any]], kind: str) -> tuple[float, str]:
    """The loss at which the points of `kind` are as fast as the fastest dense int8, and that one's name.

    Between two points by straight lines, from the dense model on.
    """
    best = max((row for row in rows if not row["zeros"] and "int8" in row["form"]), key=lambda row: row["speedup"][0])
    points = sorted((row["speedup"][0], row["loss"]) for row in rows if row["form"].startswith(f"{kind}, "))
    for (slow, less), (fast, more) in itertools.pairwise([(1.0, 0.0), *points]):
        if slow <= best["speedup"][0] <= fast:
            return less + (more - less) * (best["speedup"][0] - slow) / (fast - slow), best["form"]
    return float("nan"), best["form"]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss against speed; what loses more than `MOST_LOSS` is left out."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for kind, marker in (("int8 dynamic", "o"), ("int8 static", "s"), ("fp32", "^")):
        points = sorted((r["speedup"][0], 100 * r["loss"]) for r in rows if r["form"].startswith(f"{kind}, point"))
        if points:
            axes.plot(*zip(*points, strict=True), marker=marker, label=f"sparsec, {kind}")
    for row in rows:
        at = row["speedup"][0], 100 * row["loss"]
        if "point" not in row["form"] and at[1] <= MOST_LOSS:
            axes.plot(*at, "k*", markersize=10)
            axes.annotate(row["form"], at, (0, 8), textcoords="offset points", ha="center")
    axes.set(
        xlabel="times as fast as dense float32 in ONNX Runtime",
        ylabel="loss of Spearman's coefficient, %",
        ylim=(-0.5, MOST_LOSS),
    )
    axes.margins(x=0.12)
    axes.axhline(1, color="grey", linewidth=0.8, linestyle="--")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--picture", type=Path, help="also draw them")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, runs, found = Path(name), {}, []
        forms = ((form, 0.0, run, any_run) for form, run, any_run in dense_forms(folder))
        for form, zeros, run, any_run in (*forms, *sparse_forms(folder)):
            runs[form] = run
            found.append((form, zeros, TASK.score(any_run)))
            print(f"{form:40} zeros {zeros:5.1%}  Spearman {found[-1][2]:.4f}", flush=True)
        taken = race(runs)
    dense, reference = taken["float32, ONNX Runtime"], found[0][2]
    rows = [
        {
            "form": form,
            "zeros": round(zeros, 4),
            "spearman": round(score, 4),
            "loss": round(1 - score / reference, 4),
            "ms": round(statistics.median(taken[form]), 1),
            "speedup": ratio(dense, taken[form]),
        }
        for form, zeros, score in found
    ]
    print(f"{'form':40} {'zeros':>6} {'Spearman':>9} {'loss':>6} {'ms':>7} {'speedup':>8}")
    for row in rows:
        numbers = f"{row['zeros']:6.1%} {row['spearman']:9.4f} {row['loss']:6.1%} {row['ms']:7.1f}"
        print(f"{row['form']:40} {numbers} {row['speedup'][0]:7.2f}x")
    for kind in ("int8 dynamic", "int8 static", "fp32"):
        loss, best = overtaking(rows, kind)
        print(f"sparsec's {kind} is as fast as {best} at a loss of {loss:.2%}")
    if arguments.picture:
        draw(rows, arguments.picture)
    if arguments.json:
        record = {
            "date": time.strftime("%Y-%m-%d"),
            "cpu": cpu_name(),
            "threads": THREADS,
            "batch": BATCH,
            "sequence": SEQUENCE,
            "versions": {"sparsec": sparsec.__version__, "onnxruntime": onnxruntime.__version__},
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

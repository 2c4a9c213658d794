"""A feed-forward block 1024-4096-1024 with few zeros left out and few bits: sparse forms against dense ones.

    python benchmarks/ffn_low_precision.py [--json FILE]

Random weights pruned by norm, two threads. Of each sparse form, at 80 and 90 % zeros in blocks of 32x4 and 32x32:
products of int8 (X rounded by scales from calibration data, codes handed from the first layer to the second), int8,
bfloat16 and 16-entry codebooks as stored weights only. Against them: ONNX Runtime float32 and int8 (QDQ, static, per
channel) and, where OpenVINO is installed, its bfloat16 and int8. All runs alternate in one process, form by form; a
cell is the median of one form's time over another's, run by run, with quartiles. `best_int8` is the dense int8 that is
faster at that batch size, by medians. OpenVINO's bfloat16 is run only where the processor has it: emulated, it took 20
ms at batch 1 and 171 ms at batch 16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from ffn import BATCHES, THREADS, Feeds, cpu_name, inputs, int8_model, openvino_runner

import sparsec
from sparsec.compiler.config import Tune
from sparsec.compiler.runtime import Runner, open_session
from sparsec.models import build

PATTERNS = ("block:32x4", "block:32x32")
ZEROS = (0.8, 0.9)
# Values, and how X is multiplied.
FORMS = (("fp32", "auto"), ("int8", "static"), ("int8", "float"), ("bf16", "auto"), ("codebook16", "auto"))
ROUNDS = 41
# Sessions spin for tens of milliseconds after a run: each turn waits until the others' threads sleep.
REST = 0.04
# Seconds of a turn: short runs are repeated.
TURN = 0.002


def sparse_form(model: Any, folder: Path, pattern: str, zeros: float, values: str, activations: str) -> Any:
    """The artifact as a user would load it, and the bytes of its weights over those of the dense float32 ones."""
    static = activations == "static"
    config = sparsec.CompileConfig(
        layer_sparsity=(("*", zeros),),
        pattern=pattern,
        values=values,
        activations=activations,
        calib=str(folder / "calibration.npz") if static else None,
        method="magnitude" if static else "auto",
        permute=False,
        batch=BATCHES,
        threads=THREADS,
        tune=Tune.QUICK,
    )
    result = sparsec.compile(model, config)
    out = folder / f"{values}-{activations}-{zeros}-{pattern.replace(':', '')}"
    result.save(out)
    decisions = result.report.decisions
    result.close()
    assert all(decision.choice == "sparse" for decision in decisions), "a layer stayed dense"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    size = sum(d.bytes_sparse for d in decisions) / sum(d.bytes_dense for d in decisions)
    return sparsec.load(out, options), size


def dense_forms(model: Any, folder: Path) -> Iterator[tuple[str, Callable[[Feeds], Callable[[], Any]]]]:
    """Names, and what makes a run of inputs."""
    path = int8_model(model, folder)
    for name, source in (("dense fp32", folder / "float.onnx"), ("dense int8, ONNX Runtime", path)):
        session = open_session(source, THREADS)
        yield name, lambda feeds, session=session: Runner(session, feeds)
    try:
        import openvino
    except ImportError:
        print("OpenVINO is not installed: its rows are left out")
        return
    forms = [("dense int8, OpenVINO", path, "f32")]
    if {"avx512_bf16", "amx_bf16"} & cpu_flags():
        forms.append(("dense bf16, OpenVINO", folder / "float.onnx", "bf16"))
    for name, source, precision in forms:
        yield name, lambda feeds, s=source, p=precision: openvino_runner(openvino, s, p, feeds)


def cpu_flags() -> set[str]:
    """What the processor has, in Linux's words; nothing where there is none to ask."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def race(runs: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Microseconds of every form in every round."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            time.sleep(REST)
            once = _seconds(run, 3)
            taken[name].append(1e6 * _seconds(run, max(1, round(TURN / once))))
    return taken


def _seconds(run: Callable[[], Any], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - start) / times


def ratio(slow: list[float], fast: list[float]) -> tuple[float, float, float]:
    """Median and quartiles of slow / fast, round by round."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(slow, fast, strict=True)], n=4)
    return round(middle, 2), round(low, 2), round(high, 2)


def show(row: dict[str, Any]) -> None:
    """One line."""
    what = f"{row['form']}, {row['pattern']} {row['zeros']:.0%}" if row["pattern"] else row["form"]
    ratios = f"{row['over_dense_fp32'][0]:9.2f}x {row['over_best_int8'][0]:14.2f}x"
    print(f"{what:34} {row['batch']:5} {row['us']:9.1f} {ratios}  {row['bytes'] or ''}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    model, rows = build("ffn"), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.savez(folder / "calibration.npz", input=np.concatenate([inputs(16, seed)["input"] for seed in range(16)]))
        dense = dict(dense_forms(model, folder))
        print(f"{'form':34} {'batch':>5} {'us':>9} {'over fp32':>10} {'over best int8':>15}  bytes")
        for zeros in ZEROS:
            for pattern in PATTERNS:
                made = {}
                for values, activations in FORMS:
                    label = f"{values} products" if activations == "static" else values
                    made[label] = sparse_form(model, folder, pattern, zeros, values, activations)
                for batch in BATCHES:
                    feeds = inputs(batch)
                    runs: dict[str, Callable[[], Any]] = {key: make(feeds) for key, make in dense.items()}
                    runs |= {key: Runner(session, feeds) for key, (session, _) in made.items()}
                    taken = race(runs)
                    best = min((key for key in dense if "int8" in key), key=lambda key: statistics.median(taken[key]))
                    for key, times in taken.items():
                        sparse = key in made
                        row = {
                            "form": key,
                            "zeros": zeros if sparse else 0.0,
                            "pattern": pattern if sparse else "",
                            "batch": batch,
                            "us": round(statistics.median(times), 1),
                            "over_dense_fp32": ratio(taken["dense fp32"], times),
                            "best_int8": best,
                            "over_best_int8": ratio(taken[best], times),
                            "over_sparse_fp32": ratio(taken["fp32"], times),
                            "bytes": round(made[key][1], 4) if sparse else None,
                        }
                        rows.append(row)
                        show(row)
    if arguments.json:
        versions = {"sparsec": sparsec.__version__, "onnxruntime": onnxruntime.__version__}
        record = {
            "date": time.strftime("%Y-%m-%d"),
            "cpu": cpu_name(),
            "threads": THREADS,
            "versions": versions,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""The plain command on quantised models: metric before and after, layers that multiply only the codes that are left.

    python benchmarks/keep_quantized.py [--json FILE]

ResNet-20 and SqueezeNet come as QDQ models (`../shared/assets`). MiniLM is quantised here by ONNX Runtime's own tool,
in three forms: QDQ (`quantize_static` of MatMul), operators of integers (QOperator), and `quantize_dynamic`; once as it
is, and once with 80 % of each layer's weights set to zero by norm in blocks of 16x4, which costs it its metric: what
matters is that `keep` changes neither. Speed: batch 8 and sequence 128 of MiniLM, batch 1 of the others, two threads.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from ffn import cpu_name
from minilm_low_precision import quantize_products, timing_feeds

import sparsec
from sparsec.compiler.config import Tune
from sparsec.compiler.runtime import Runner, compare, open_session
from sparsec.ir import parse_pattern
from sparsec.passes.prune import prune_by_norm

sys.path.insert(0, str(Path(__file__).parent / "accuracy"))
from tasks import MODELS, TASKS, Feeds, Task

THREADS = 2
ZEROS = 0.8


def models(folder: Path) -> Iterator[tuple[str, Path, Task]]:
    """Name, file and task."""
    for task, name in (("resnet20", "resnet20_cifar10_int8_qdq"), ("squeezenet", "squeezenet_dc_sparse_int8_qdq")):
        yield name, MODELS / f"{name}.onnx", TASKS[task]
    task = TASKS["minilm"]
    pruned = folder / "pruned.onnx"
    prune(task.model, pruned)
    for zeros, source in (("", task.model), (f", {ZEROS:.0%} zeros", pruned)):
        for form in ("QDQ", "QOperator", "dynamic"):
            path = folder / f"{form}{len(zeros)}.onnx"
            quantise(source, path, form)
            yield f"minilm {form}{zeros}", path, task


def prune(source: Path, target: Path) -> None:
    """Zeros in blocks of 16 outputs by 4 inputs in every matrix that a MatMul reads."""
    model = onnx.load(source)
    read = {name for node in model.graph.node if node.op_type == "MatMul" for name in node.input}
    for tensor in model.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if tensor.name in read and array.ndim == 2:
            sparse = prune_by_norm(array.T.copy(), parse_pattern("block:16x4"), ZEROS).T
            tensor.CopyFrom(onnx.numpy_helper.from_array(sparse.copy(), tensor.name))
    onnx.save(model, target)


def quantise(source: Path, target: Path, form: str) -> None:
    """By ONNX Runtime's tool: weights by output where the form can have that, activations as uint8."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    if form != "dynamic":
        quantize_products(str(source), str(target), form)
        return
    logging.disable(logging.WARNING)
    try:
        quantize_dynamic(source, target, weight_type=QuantType.QInt8, per_channel=True)
    finally:
        logging.disable(logging.NOTSET)


def measure(name: str, path: Path, task: Task, folder: Path) -> dict[str, Any]:
    """One row: what `keep` made of the model."""
    minilm = task.name == "minilm"
    dims = {"sequence": 128} if minilm else {}
    batch = (8,) if minilm else (1,)
    config = sparsec.CompileConfig(batch=batch, dims=dims, threads=THREADS, tune=Tune.QUICK, survey=False)
    result = sparsec.compile(path, config)
    result.save(folder / "out", force=True)
    sparse = sum(decision.choice == "sparse" for decision in result.report.decisions)
    layers = len(result.report.decisions)
    result.close()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    before, after = open_session(str(path), THREADS), sparsec.load(folder / "out", options)
    scores = [task.score(lambda feeds, session=s: session.run(None, feeds)) for s in (before, after)]
    feeds: Feeds = timing_feeds() if minilm else {k: v[:1] for k, v in task.calibration().items()}
    pair = compare(Runner(before, feeds), Runner(after, feeds), 15)
    row = {
        "model": name,
        "metric": task.metric,
        "before": round(scores[0], 4),
        "after": round(scores[1], 4),
        "sparse": sparse,
        "layers": layers,
        "ms": [round(pair.dense_us / 1e3, 2), round(pair.sparse_us / 1e3, 2)],
        "speedup": round(pair.speedup, 2),
        "quartiles": [round(one, 2) for one in pair.spread],
    }
    print(
        f"{name:32} {scores[0]:.4f} -> {scores[1]:.4f}  {sparse:2} of {layers} layers sparse  {pair.speedup:.2f}x "
        f"({pair.spread[0]:.2f} to {pair.spread[1]:.2f})",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(name, path, task, Path(folder)) for name, path, task in models(Path(folder))]
    if arguments.json:
        versions = {"sparsec": sparsec.__version__, "onnxruntime": onnxruntime.__version__}
        record = {"date": time.strftime("%Y-%m-%d"), "cpu": cpu_name(), "threads": THREADS, "versions": versions}
        arguments.json.write_text(json.dumps({**record, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

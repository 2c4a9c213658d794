"""What `onnxsim` reaches: magnitude, Wanda and SparseGPT, one shot, unstructured, on the five tasks.

    python -m venv onnxsim && onnxsim/bin/pip install onnxsim==0.8.1 onnxruntime pillow
    onnxsim/bin/python benchmarks/accuracy/baseline.py [--task NAME] [--method NAME] [--sparsity S] [--keep FOLDER]

Every call gets the calibration samples that our own tables use, and all its defaults: one density for all layers, each
pruned on the dense model's activations (`apply_*_pruning` of onnxsim). It prunes every constant Conv, Gemm and MatMul
weight, the first and the last layer included, and no embedding table: what `weights.py` counts.

Its Wanda takes no norms from activations that are not of rank 2, and prunes those layers by magnitude. To be fair to it
each such MatMul is wrapped before the call (for all three methods; only Wanda's masks depend on it),

    y = MatMul(x, w)    ->    y = Reshape(MatMul(Reshape(x, [-1, in]), w), [..., out])

and the pruned weights are put back into the model as it came, which is what is scored. The row `wanda, unwrapped` is
the call as a user would make it, where that differs.

Two more things to know when reading the rows. SqueezeNet is two thirds zeros already, but unevenly: asking for 50 % of
every filter prunes its dense layers too and gives 71 % in all, so its rows are to be compared by the measured
`sparsity`. And MiniLM's sentences are padded to one length, as in an .npz; fed one by one and unpadded, Wanda scores
.788 instead of .785 at 50 %. `seconds` are wall time of one call, samples included, on the machine as it was: those of
2026-11-21 are from two busy cores and up to ten times what quiet ones take.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import onnxsim
from tasks import REPOSITORY, TASKS, Feeds, Run, Task, slices
from weights import LAYERS, sparsity, weights

RESULTS = REPOSITORY / "benchmarks" / "results" / "accuracy-onnxsim.json"
SPARSITIES = (0.5, 0.6, 0.7, 0.8)
THREADS = 2
# Samples of a calibration run. onnxsim keeps all activations of a run in memory, and the sums do not depend on it.
BATCH = {"squeezenet": 5, "magika": 1}

# From a model, calibration runs and a sparsity to the pruned model.
Method = Callable[[onnx.ModelProto, list[Feeds], float], onnx.ModelProto]
METHODS: dict[str, Method] = {
    "magnitude": lambda model, runs, share: onnxsim.apply_magnitude_pruning(model, sparsity=share),
    "wanda": lambda model, runs, share: onnxsim.apply_wanda_pruning(model, runs, sparsity=share),
    "sparsegpt": lambda model, runs, share: onnxsim.apply_sparsegpt_pruning(model, runs, sparsity=share),
}
UNWRAPPED = "wanda, unwrapped"


def runner(model: onnx.ModelProto | Path) -> Run:
    """ONNX Runtime on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return lambda feeds: list(session.run(None, feeds))


def runs(task: Task, seed: int) -> list[Feeds]:
    """The calibration samples, a few a run."""
    stacked = task.calibration(seed)
    count = len(next(iter(stacked.values())))
    return [{name: array[part] for name, array in stacked.items()} for part in slices(count, BATCH.get(task.name, 32))]


def wrapped(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which every MatMul by a constant matrix has an activation of rank 2.

    y = MatMul(x, w)  ->  y = Reshape(MatMul(Reshape(x, [-1, in]), w), Concat(Shape(x)[:-1], [out]))
    """
    ranks = activation_ranks(model)
    matrices = {name: array.shape for name, array in weights(model).items() if array.ndim == 2}
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.node[:]
    constants = {"rank2_0": [0], "rank2_last": [-1]}
    for i, node in enumerate(model.graph.node):
        if node.op_type != "MatMul" or node.input[1] not in matrices or ranks.get(node.input[0]) == 2:
            copy.graph.node.append(node)
            continue
        rows, columns = matrices[node.input[1]]
        flat, x = f"rank2_{i}", node.input[0]
        constants |= {f"{flat}_in": [-1, rows], f"{flat}_out": [columns]}
        copy.graph.node.extend(
            [
                onnx.helper.make_node("Reshape", [x, f"{flat}_in"], [f"{flat}_x"]),
                onnx.helper.make_node("MatMul", [f"{flat}_x", node.input[1]], [f"{flat}_y"], node.name),
                onnx.helper.make_node("Shape", [x], [f"{flat}_s"]),
                onnx.helper.make_node("Slice", [f"{flat}_s", "rank2_0", "rank2_last"], [f"{flat}_lead"]),
                onnx.helper.make_node("Concat", [f"{flat}_lead", f"{flat}_out"], [f"{flat}_shape"], axis=0),
                onnx.helper.make_node("Reshape", [f"{flat}_y", f"{flat}_shape"], list(node.output)),
            ]
        )
    if len(copy.graph.node) == len(model.graph.node):
        return model
    tensors = [onnx.numpy_helper.from_array(np.array(value, np.int64), name) for name, value in constants.items()]
    copy.graph.initializer.extend(tensors)
    onnx.checker.check_model(copy)
    return copy


def activation_ranks(model: onnx.ModelProto) -> dict[str, int]:
    """The rank of every tensor whose shape ONNX can infer."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = [*graph.input, *graph.value_info]
    return {v.name: len(v.type.tensor_type.shape.dim) for v in values if v.type.tensor_type.HasField("shape")}


def with_weights(model: onnx.ModelProto, source: onnx.ModelProto, pruned: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with the layers' weights of `pruned`, which onnxsim made of `source`, a wrapped `model`.

    Layers are matched by their outputs: the magnitude pass gives its weights new names (and leaves the dense ones in
    the file).
    """
    arrays = weights(pruned)
    inputs = {node.output[0]: node.input[1] for node in pruned.graph.node if node.op_type in LAYERS}
    names = weights(source).keys()
    new = {
        node.input[1]: arrays[inputs[node.output[0]]]
        for node in source.graph.node
        if node.op_type in LAYERS and node.input[1] in names
    }
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for tensor in result.graph.initializer:
        if tensor.name in new:
            tensor.CopyFrom(onnx.numpy_helper.from_array(new[tensor.name], tensor.name))
    return result


def measure(task: Task, method: str, share: float, dense: float, keep: Path | None) -> dict[str, Any]:
    """One row: means over the task's splits."""
    model = onnx.load(task.model)
    source = model if method == UNWRAPPED else wrapped(model)
    scores, zeros, seconds = [], [], []
    for seed in task.seeds:
        samples = runs(task, seed)
        start = time.perf_counter()
        pruned = METHODS[method.split(",")[0]](source, samples, share)
        seconds.append(time.perf_counter() - start)
        result = with_weights(model, source, pruned)
        scores.append(task.score(runner(result), seed))
        zeros.append(sparsity(result))
        if keep:
            onnx.save(result, keep / f"{task.name}-{method.replace(', ', '-')}-{share:.0%}-{seed}.onnx")
    return {
        "model": task.name,
        "method": method,
        "pattern": "unstructured",
        "sparsity_asked": share,
        "sparsity": round(float(np.mean(zeros)), 4),
        "metric": round(float(np.mean(scores)), 4),
        "metric_by_seed": [round(score, 4) for score in scores],
        "dense": dense,
        "seconds": round(float(np.mean(seconds)), 2),
        "date": time.strftime("%Y-%m-%d"),
    }


def rows(names: list[str], methods: list[str], shares: list[float], keep: Path | None) -> Iterator[dict[str, Any]]:
    for name in names:
        task = TASKS[name]
        run = runner(task.model)
        dense = round(float(np.mean([task.score(run, seed) for seed in task.seeds])), 4)
        needs_wrapping = wrapped(model := onnx.load(task.model)) is not model
        for share in shares:
            for method in methods:
                if method != UNWRAPPED or needs_wrapping:
                    yield measure(task, method, share, dense, keep)


def key(row: dict[str, Any]) -> tuple[int, int, float]:
    """The order of the file, and what makes two rows the same measurement."""
    return [*TASKS].index(row["model"]), [*METHODS, UNWRAPPED].index(row["method"]), row["sparsity_asked"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", action="append", choices=TASKS, help="instead of all five")
    parser.add_argument("--method", action="append", choices=[*METHODS, UNWRAPPED], help="instead of all")
    parser.add_argument("--sparsity", action="append", type=float, help="instead of 0.5, 0.6, 0.7 and 0.8")
    parser.add_argument("--json", type=Path, default=RESULTS, help="rows replace those of the same name in this file")
    parser.add_argument("--keep", type=Path, help="also save the pruned models in this folder")
    arguments = parser.parse_args()
    if arguments.keep:
        arguments.keep.mkdir(parents=True, exist_ok=True)
    tasks, methods = arguments.task or [*TASKS], arguments.method or [*METHODS, UNWRAPPED]
    for row in rows(tasks, methods, arguments.sparsity or [*SPARSITIES], arguments.keep):
        print(*(f"{value}" for value in row.values()), sep="\t", flush=True)
        old = json.loads(arguments.json.read_text())["rows"] if arguments.json.exists() else []
        merged = {key(r): r for r in [*old, row]}
        record = {
            "metrics": {name: task.metric for name, task in TASKS.items()},
            "versions": {name: version(name) for name in ("onnxsim", "onnxruntime", "onnx", "numpy")},
            "rows": [merged[k] for k in sorted(merged)],
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

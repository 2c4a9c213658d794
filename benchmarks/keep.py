"""The plain command on weights that are already sparse: no weight changes, and what was found is said.

    python benchmarks/keep.py MODEL.onnx|MATRICES.npz ...

An .npz holds matrices [out, in] by name; each becomes a model of one MatMul. For every layer the line says what became
of it, and for the whole model that all weights in the artifact, unpacked, equal those that came.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import sparsec
from sparsec.ir import SparseMatrix, parse_pattern
from sparsec.models.mlp import stack


def models(path: Path) -> Iterator[tuple[str, onnx.ModelProto]]:
    """The model in the file, or one for each matrix."""
    if path.suffix != ".npz":
        yield path.name, onnx.load(path)
        return
    with np.load(path) as arrays:
        for name in arrays.files:
            if arrays[name].ndim == 2:
                weight = arrays[name].astype(np.float32)
                yield f"{path.stem}/{name}", stack([(weight, np.zeros(len(weight), dtype=np.float32))])


def weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """All float32 weights by name; packed ones unpacked to [out, in]."""
    arrays = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if t.data_type == TensorProto.FLOAT}
    every = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "SparseLinear":
            continue
        a = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        parts = [every[name] for name in node.input[1:4]]
        shape = (a["out_features"], a["in_features"])
        matrix = SparseMatrix(parse_pattern(a["pattern"].decode()), shape, *parts)
        arrays[node.input[1].removesuffix(".values")] = matrix.to_dense()
        del arrays[node.input[1]]
    return arrays


def same(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> bool:
    """Every weight that is left equals the one that came, either way round."""
    return all(
        np.array_equal(array, before[name]) or np.array_equal(array.T, before[name])
        for name, array in after.items()
        if name in before
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    for path in parser.parse_args().files:
        for name, model in models(path):
            result = sparsec.compile(model, sparsec.CompileConfig(batch=(1,), survey=False))
            with tempfile.TemporaryDirectory() as folder:
                result.save(Path(folder) / "out")
                out = onnx.load(Path(folder) / "out" / "model.onnx")
            unchanged = same(weights(model), weights(out)) and len(weights(model)) == len(weights(out))
            print(f"{name}: weights {'unchanged' if unchanged else 'CHANGED'}")
            for d in result.report.decisions:
                speed = ", ".join(f"{t.speedup:.1f}x at batch {t.batch}" for t in d.timings)
                print(f"  {d.layer}: {d.choice}: {d.reason}{f' ({speed})' if speed else ''}")
            result.close()


if __name__ == "__main__":
    main()

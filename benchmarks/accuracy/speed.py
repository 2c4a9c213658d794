"""How long fitting takes: an MLP of 9.4 M weights, single weights at 50 %, full reconstruction, 256 samples.

    python benchmarks/accuracy/speed.py

1024-4096-1024-1024 with ReLU and seeded weights. The time is that of solving all three layers (`--method auto`) and of
fitting them to each other, statistics included, kernels not. onnxsim's Python path takes 364 s for the same layers on
two such cores (SparseGPT, measured in August 2026).
"""

from __future__ import annotations

import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from sparsec import CompileConfig
from sparsec.compiler.budget import Fitting
from sparsec.compiler.context import Silent, make_context
from sparsec.compiler.frontend import read
from sparsec.compiler.plan import make_plan
from sparsec.compiler.probe import Workload

SIZES = (1024, 4096, 1024, 1024)
SAMPLES = 256


def model(rng: np.random.Generator) -> onnx.ModelProto:
    """The MLP, He's weights, no biases."""
    body = " ".join(
        f"h{i} = MatMul(x{i}, w{i}) x{i + 1} = Relu(h{i})" if i < 2 else f"x{i + 1} = MatMul(x{i}, w{i})"
        for i in range(3)
    )
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> mlp '
        f"(float[n, {SIZES[0]}] x0) => (float[n, {SIZES[-1]}] x3) {{ {body} }}"
    )
    for i, (inputs, outputs) in enumerate(pairwise(SIZES)):
        weight = rng.standard_normal((inputs, outputs)).astype(np.float32) * np.float32((2 / inputs) ** 0.5)
        proto.graph.initializer.append(numpy_helper.from_array(weight, f"w{i}"))
    return proto


def main() -> None:
    rng = np.random.default_rng(0)
    program = read(model(rng))
    # Correlated inputs, as activations are.
    mixed = rng.standard_normal((SAMPLES, 64)) @ rng.standard_normal((64, SIZES[0])) + rng.standard_normal(SIZES[0])
    with tempfile.TemporaryDirectory() as folder:
        samples = [{"x0": part.astype(np.float32)} for part in np.split(mixed, 8)]
        fixed = tuple((layer.name, 0.5) for layer in program.layers)
        config = CompileConfig(calib=samples, layer_sparsity=fixed, pattern="unstructured", threads=2)
        start = time.perf_counter()
        context = make_context(config, Path(folder), Silent())
        plan = make_plan(program, config, context.target)
        fitting = Fitting(program, plan, Workload({}, {}, ""), context, timed=False)
        fitting.at_sparsity(None)
    print(f"{time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()

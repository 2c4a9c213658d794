"""Models in QDQ form for tests: built from a body, described in words, and run."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from sparsec.compiler.chains import chained
from sparsec.compiler.config import CompileConfig
from sparsec.compiler.exporter import SparseOp, export
from sparsec.compiler.formats import Form, kinds_of, pack
from sparsec.compiler.frontend import read
from sparsec.compiler.plan import Candidate
from sparsec.ir import BlockPattern, Grid, Layer, Program, SparseMatrix
from sparsec.ir.sparse_matrix import DOT_INPUTS
from sparsec.ir.values import Floats, Int8

# ---- Graphs ----

RNG = np.random.default_rng(0)
KEEP = ((np.arange(8)[:, None] // 4 + np.arange(12)[None, :] // 4) % 2).astype(bool)
CODES = np.where(KEEP, RNG.integers(-127, 128, (8, 12)), 0)
SCALES = np.linspace(0.01, 0.03, 8, dtype=np.float32)


def i8(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int8) if len(values) > 1 else np.array(values[0], dtype=np.int8)


CONSTANTS: dict[str, np.ndarray] = {
    "W": CODES.astype(np.int8),  # [out, in]
    "Wt": CODES.T.astype(np.int8),
    "Wu": (CODES + 128).astype(np.uint8),
    "Wa": (CODES + 100).clip(0, 255).astype(np.uint8),
    "Wat": (CODES + 100).clip(0, 255).astype(np.uint8).T.copy(),
    "W2": np.where(KEEP.T, RNG.integers(-127, 128, (12, 8)), 0).astype(np.int8),  # [12, 8]
    "Wf": (CODES * SCALES[:, None]).astype(np.float32),
    "ws": SCALES,
    "ws1": np.float32(0.02),
    "ws_small": np.float32(0.0005),  # so that a step before moves the result by less than one
    "ws2": np.linspace(0.01, 0.03, 12, dtype=np.float32),
    "wsb": np.full((8, 3), 0.02, np.float32),
    "ws_zero": np.array([0.0, *SCALES[1:]], np.float32),
    "z8": np.zeros(8, np.int8),
    "z12": np.zeros(12, np.int8),
    "z0": i8(0),
    "z7": i8(7),
    "u128": np.uint8(128),
    "u100": np.uint8(100),
    "u0": np.uint8(0),
    "xs": np.float32(0.05),
    "xs_zero": np.float32(0),
    "xs_inf": np.float32(np.inf),
    "xs_of_one": np.array([0.05], np.float32),
    "xs12": np.full(12, 0.05, np.float32),
    "ys": np.float32(0.1),
    "b": np.linspace(-1, 1, 8, dtype=np.float32),
    "bq": RNG.integers(-1000, 1000, 8).astype(np.int32),
    "bs": SCALES * np.float32(0.05),
}
NAMES = {"u": "uint8", "i": "int8", "f": "float"}


def build(body: str, inputs: str = "uint8[n,12] x", outputs: str = "uint8[n,8] y", opset: int = 19) -> onnx.ModelProto:
    """A model from ONNX text, with those of `CONSTANTS` that it reads as initialisers."""
    head = f'<ir_version: 9, opset_import: ["": {opset}, "com.microsoft": 1]>\ng ({inputs}) => ({outputs})'
    model = onnx.parser.parse_model(f"{head} {{ {body} }}")
    used = {name for node in model.graph.node for name in node.input}
    for name, array in CONSTANTS.items():
        if name in used:
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    return model


WEIGHT = "w = DequantizeLinear<axis: int = 0>(W, ws, z8)"
X = "a = DequantizeLinear(x, xs, u128)"
GEMM = "h = Gemm<transB: int = 1>(a, w, b)"
Y = "y = QuantizeLinear(h, ys, u100)"
PLAIN = f"{X} {WEIGHT} {GEMM} {Y}"
SIGNED = (
    f"q = QuantizeLinear(x, xs, z7) a = DequantizeLinear(q, xs, z7) {WEIGHT} {GEMM} "
    "p = QuantizeLinear(h, ys, z0) y = DequantizeLinear(p, ys, z0)"
)
FLOATS = ("float[n,12] x", "float[n,8] y")


def layers_of(model: onnx.ModelProto) -> tuple[Layer, ...]:
    return read(model.SerializeToString()).layers


def described(layer: Layer) -> str:
    """As `describe`, and whether X is rounded when the model runs."""
    head, sign, obstacle = describe(layer).partition(" ! ")
    return head + (", x when it runs" if layer.dynamic and not obstacle else "") + sign + obstacle


def describe(layer: Layer) -> str:
    """A layer as one line; a grid in brackets is one of codes that stay outside."""
    parts = [f"{layer.nodes[-1].outputs[0].name} = {layer.stored or layer.dtype}"]
    parts += [f"as {layer.values}"] if layer.values is not None else []
    for side, grid, codes in (("x", layer.x_grid, layer.x_codes), ("y", layer.y_grid, layer.y_codes)):
        if grid is not None:
            numbers = f"{grid.scale:.4g} {grid.zero_point}"
            parts.append(f"{side} ({numbers})" if codes is None else f"{side} {codes.name} {numbers}")
    return ", ".join(parts) + (f" ! {layer.obstacle}" if layer.obstacle else "")


FOUND = {
    "all of it": (PLAIN, "y = int8, as int8, x x 0.05 128, y y 0.1 100"),
    "one scale": (
        PLAIN.replace("<axis: int = 0>(W, ws, z8)", "(W, ws1, z0)"),
        "y = int8, as int8, x x 0.05 128, y y 0.1 100",
    ),
    "no zero points": (
        f"a = DequantizeLinear(x, xs) w = DequantizeLinear<axis: int = 0>(W, ws) {GEMM} y = QuantizeLinear(h, ys)",
        "y = int8, as int8, x x 0.05 0, y y 0.1 0",
    ),
    "scales of one element": (PLAIN.replace("xs", "xs_of_one"), "y = int8, as int8, x x 0.05 128, y y 0.1 100"),
    "MatMul": (
        f"{X} w = DequantizeLinear<axis: int = 1>(Wt, ws, z8) h = MatMul(a, w) {Y}",
        "y = int8, as int8, x x 0.05 128, y y 0.1 100",
    ),
    "axis from the end": (
        f"{X} w = DequantizeLinear<axis: int = -1>(Wt, ws, z8) h = MatMul(a, w) {Y}",
        "y = int8, as int8, x x 0.05 128, y y 0.1 100",
    ),
    "turned after": (
        f"{X} {WEIGHT} t = Transpose(w) h = MatMul(a, t) {Y}",
        "y = int8, as int8, x x 0.05 128, y y 0.1 100",
    ),
    "turned before": (
        f"{X} t = Transpose(W) w = DequantizeLinear(t, ws, z8) h = MatMul(a, w) {Y}",
        "y = int8, as int8, x x 0.05 128, y y 0.1 100",
    ),
    "quantised in the graph": (
        f"{X} q = QuantizeLinear<axis: int = 0>(Wf, ws, z8) w = DequantizeLinear<axis: int = 0>(q, ws, z8) {GEMM} {Y}",
        "y = int8, as int8, x x 0.05 128, y y 0.1 100",
    ),
    "uint8 around 128": (
        f"{X} w = DequantizeLinear(Wu, ws1, u128) {GEMM} {Y}",
        "y = uint8, as int8, x x 0.05 128, y y 0.1 100",
    ),
    "asymmetric": (
        f"{X} w = DequantizeLinear(Wa, ws1, u0) {GEMM} {Y}",
        "y = uint8, x x 0.05 128, y y 0.1 100",
    ),
    "a bias of codes": (
        f"{X} {WEIGHT} b2 = DequantizeLinear<axis: int = 0>(bq, bs) h = Gemm<transB: int = 1>(a, w, b2) {Y}",
        "y = int8, as int8, x x 0.05 128, y y 0.1 100",
    ),
    "an activation": (
        f"{X} {WEIGHT} {GEMM} r = Relu(h) y = QuantizeLinear(r, ys, u100)",
        "y = int8, as int8, x x 0.05 128, y y 0.1 100",
    ),
}
NOT_ALL = {
    "X of floats": ("float[n,12] a", f"{WEIGHT} {GEMM} {Y}", "y = int8, as int8, y y 0.1 100"),
    "X by channel": (
        "uint8[n,12] x",
        f"a = DequantizeLinear<axis: int = 1>(x, xs12) {WEIGHT} {GEMM} {Y}",
        "y = int8, as int8, y y 0.1 100",
    ),
    "signed X from outside": (
        "int8[n,12] x",
        f"a = DequantizeLinear(x, xs, z7) {WEIGHT} {GEMM} {Y}",
        "y = int8, as int8, x (0.05 135), y y 0.1 100",
    ),
    "signed X that something else reads": (
        "float[n,12] f",
        f"x = QuantizeLinear(f, xs, z7) a = DequantizeLinear(x, xs, z7) o = Identity(x) {WEIGHT} {GEMM} {Y}",
        "y = int8, as int8, x (0.05 135), y y 0.1 100",
    ),
    "signed Y returned": (
        "uint8[n,12] x",
        f"{X} {WEIGHT} {GEMM} y = QuantizeLinear(h, ys, z0)",
        "h = int8, as int8, x x 0.05 128, y (0.1 128)",
    ),
    "Y read twice": ("uint8[n,12] x", f"{PLAIN} o = Relu(h)", "h = int8, as int8, x x 0.05 128"),
    "Y by channel": (
        "uint8[n,12] x",
        f"{X} {WEIGHT} {GEMM} y = QuantizeLinear<axis: int = 1>(h, ws)",
        "h = int8, as int8, x x 0.05 128",
    ),
    "a residual": (
        "uint8[n,12] x, float[n,8] r",
        f"{X} {WEIGHT} {GEMM} s = Add(h, r) y = QuantizeLinear(s, ys, u100)",
        "s = int8, as int8, x x 0.05 128",
    ),
    "alpha": (
        "uint8[n,12] x",
        f"{X} {WEIGHT} h = Gemm<alpha: float = 0.3, transB: int = 1>(a, w, b) {Y}",
        "y = int8, x x 0.05 128, y y 0.1 100",
    ),
    "a power of two": (
        "uint8[n,12] x",
        f"{X} {WEIGHT} h = Gemm<alpha: float = 0.5, transB: int = 1>(a, w, b) {Y}",
        "y = int8, as int8, x x 0.05 128, y y 0.1 100",
    ),
    "a float weight": ("uint8[n,12] x", f"{X} h = Gemm<transB: int = 1>(a, Wf, b) {Y}", "h = float32"),
}


# ---- Rewriting ----


class _Sparse(OpRun):  # type: ignore[misc]
    """The operators by their definition: in codes of 8 bits where the node says so."""

    op_domain = "ai.sparsec"

    def _run(self, *inputs: Any, **a: Any) -> Any:
        x, values, indices, indptr, bias, residual, table, sums = (*inputs, None, None, None, None)[:8]
        shape, pattern = (a["out_features"], a["in_features"]), BlockPattern(a["block_rows"], a["block_cols"])
        together = DOT_INPUTS if a.get("products") else 1
        kind, shared = (Floats(), np.zeros(0)) if table is None else (Int8(), table.reshape(-1, 1))
        matrix = SparseMatrix(pattern, shape, values, indices, indptr, kind, shared, together=together)
        if a.get("products"):
            assert x.dtype == (np.uint8 if a["x"] == "uint8" else np.float32)
            whole = np.rint(matrix.to_dense().astype(np.float64) / matrix.table)
            np.testing.assert_array_equal(sums, whole.sum(axis=1))

            def product(x: np.ndarray, grid: Grid) -> np.ndarray:
                codes = x if a["x"] == "uint8" else np.rint(grid.round(x) / np.float32(grid.scale)) + grid.zero_point
                exact = codes.astype(np.int64) @ whole.T.astype(np.int64) - sums * grid.zero_point
                return exact.astype(np.float32) * (matrix.table[:, 0] * np.float32(grid.scale))

            if a["x"] == "dynamic":
                y = np.concatenate([product(row[None], Grid.spanning(row.min(), row.max())) for row in x])
            else:
                y = product(x, Grid(a["x_scale"], a["x_zero_point"]))
        else:
            y = x @ matrix.to_dense().T
        y = y if bias is None else y + bias
        y = np.maximum(y, 0) if a["activation"] == "relu" else y
        y = y if residual is None else y + residual
        if "y_scale" not in a:
            return (y.astype(np.float32),)
        return (np.clip(np.rint(y / np.float32(a["y_scale"])) + a["y_zero_point"], 0, 255).astype(np.uint8),)


class SparseLinear(_Sparse):
    pass


class QSparseLinear(_Sparse):
    pass


def sparse(program: Program, *names: str, pattern: str = "block:4x4") -> dict[str, SparseOp]:
    """Every layer that can be, or those named, as the compiler would have it."""
    candidates = {}
    for layer in program.layers:
        if not layer.obstacle and (not names or layer.name in names):
            form = Form(pattern, kinds_of(layer, CompileConfig())[0])
            matrix, x = pack(layer, layer.weight, form, CompileConfig())
            candidates[layer.name] = Candidate(layer, matrix, pruned=False, x=x)
    return {name: op(one) for name, one in chained(candidates).items()}


def op(one: Candidate) -> SparseOp:
    x_grid = one.layer.x_grid if one.x != "float" else None
    y_grid = one.y_grid if one.layer.y_codes is None else one.layer.y_grid
    return SparseOp(one.matrix, "kernel", 1, one.x, x_grid, y_grid)


def nodes(model: onnx_ir.Model) -> list[str]:
    """One line a node, without attributes and without what a packed weight is made of."""
    return [
        f"{', '.join(v.name or '' for v in node.outputs)} = {node.op_type}"
        f"({', '.join('' if v is None else v.name or '' for v in node.inputs[: 1 if node.domain else None])})"
        for node in model.graph
    ]


def run(model: onnx_ir.Model | onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    proto = onnx_ir.to_proto(model) if isinstance(model, onnx_ir.Model) else model
    onnx.checker.check_model(proto)
    return list(ReferenceEvaluator(proto, new_ops=[SparseLinear, QSparseLinear]).run(None, feeds))


def run_dense(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def feeds_of(model: onnx.ModelProto | onnx_ir.Model) -> dict[str, np.ndarray]:
    proto = onnx_ir.to_proto(model) if isinstance(model, onnx_ir.Model) else model
    # Of each test the same: a code that rounds the other way in one layer can move the next one's by two.
    feeds, rng = {}, np.random.default_rng(0)
    for value in proto.graph.input:
        kind = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        shape = [d.dim_value or 3 for d in value.type.tensor_type.shape.dim]
        floats = rng.standard_normal(shape).astype(np.float32)
        limits = None if kind == np.float32 else np.iinfo(kind)
        feeds[value.name] = floats if limits is None else rng.integers(limits.min, limits.max + 1, shape).astype(kind)
    return feeds


def assert_close(actual: np.ndarray, expected: np.ndarray, step: float = 0.1) -> None:
    """Within one code, or where codes are turned back one step of their grid."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    most = 1 if actual.dtype.kind in "iu" else step * 1.001
    assert np.abs(actual.astype(np.float64) - expected.astype(np.float64)).max() <= most


def check(model: onnx.ModelProto) -> onnx_ir.Model:
    """Rewrite all layers; the outputs stay within a step, and the program untouched. The rewritten model."""
    program = read(model)
    before = onnx_ir.to_proto(program.model).SerializeToString()
    result = export(program, sparse(program))
    assert onnx_ir.to_proto(program.model).SerializeToString() == before
    feeds = feeds_of(model)
    for actual, expected in zip(run(result, feeds), run_dense(model, feeds), strict=True):
        assert_close(actual, expected)
    return result


def initializers(model: onnx_ir.Model) -> dict[str, Any]:
    return {name: value.const_value.numpy() for name, value in model.graph.initializers.items() if value.const_value}

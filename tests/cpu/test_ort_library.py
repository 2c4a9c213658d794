"""The custom-op library inside ONNX Runtime: right results, one sentence for each thing that can be wrong, no crash."""

from __future__ import annotations

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from sparsec.codegen.kernel import ANY_ROWS, CpuVariant, Kernel
from sparsec.codegen.ort.library import build_library, find_compiler
from sparsec.ir import Activation, BlockPattern, Epilogue, SparsecError, SparseMatrix

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Array = NDArray[Any]
    Library = Callable[["Case"], Path]

RNG = np.random.default_rng(0)

# ---- Kernels ----

# A call marks the outputs that it was asked for with the corner of its range, so that Y shows how the work was split.
MARK = """
#include <stdint.h>
typedef struct { int64_t type; union { int64_t integer; void *pointer; } as; } Value;
int __tvm_ffi_mark(void *self, const Value *a, int32_t count, Value *result) {
    float *y = a[8].as.pointer;
    for (int64_t row = a[11].as.integer; row < a[12].as.integer; row++)
        for (int64_t i = a[13].as.integer * PANEL; i < a[14].as.integer * PANEL && i < N; i++)
            y[row * N + i] = 1000 * a[11].as.integer + a[13].as.integer;
    return 0;
}
"""

FAIL = """
#include <stdint.h>
void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count);
int __tvm_ffi_fail(void *self, const void *a, int32_t count, void *result) {
    const char *parts[] = {"x is ", 0, "odd"};
    TVMFFIErrorSetRaisedFromCStrParts("ValueError", parts, 3);
    return -1;
}
"""


def c_object(source: str, folder: Path, **defines: int) -> bytes:
    flags = [f"-D{name}={value}" for name, value in defines.items()]
    command = [*find_compiler(), "-c", "-O1", "-fPIC", *flags, "-x", "c", "-", "-o", str(folder / "kernel.o")]
    subprocess.run(command, input=source, text=True, check=True)
    return (folder / "kernel.o").read_bytes()


@cache
def tvm_object(
    symbol: str, k: int, n: int, block: tuple[int, int], panel: int, bias: bool, residual: bool, scratch: bool
) -> bytes:
    """`relu(x @ W.T + bias) + residual`, one output at a time; with `scratch`, from a copy of the row of X."""
    import tempfile

    import tvm
    from tvm.script import tirx as T

    rows, cols = block
    panels = -(-rows // panel)
    block_rows = -(-n // rows)

    @T.prim_func(s_tir=True)
    def plain(
        x_: T.handle("float32"),
        values_: T.handle("float32"),
        indices_: T.handle("int32"),
        indptr_: T.handle("int32"),
        table_: T.handle("float32"),
        sums_: T.handle("int32"),
        bias_: T.handle("float32"),
        residual_: T.handle("float32"),
        y_: T.handle("float32"),
        workspace_: T.handle("float32"),
        parameters_: T.handle("float32"),
        row_begin: T.int64,
        row_end: T.int64,
        panel_begin: T.int64,
        panel_end: T.int64,
    ):
        T.func_attr({"global_symbol": symbol, "tirx.noalias": True})
        x = T.decl_buffer((row_end * k,), "float32", data=x_, align=4)
        values = T.decl_buffer((1 << 30,), "float32", data=values_, align=4)
        indices = T.decl_buffer((1 << 30,), "int32", data=indices_, align=4)
        indptr = T.decl_buffer((block_rows + 1,), "int32", data=indptr_, align=4)
        biases = T.decl_buffer((n,), "float32", data=bias_, align=4)
        residuals = T.decl_buffer((row_end * n,), "float32", data=residual_, align=4)
        y = T.decl_buffer((row_end * n,), "float32", data=y_, align=4)
        workspace = T.decl_buffer((k,), "float32", data=workspace_, align=64)
        for row in T.serial(row_begin, row_end):
            if scratch:
                for i in T.serial(k):
                    workspace[i] = x[row * k + i]
            for p in T.serial(panel_begin, panel_end):
                for v in T.serial(panel):
                    out = T.meta_var(p // panels * rows + p % panels * panel + v)
                    first = T.meta_var(T.cast(indptr[p // panels], "int64"))
                    count = T.meta_var(T.cast(indptr[p // panels + 1], "int64") - first)
                    base = T.meta_var((first * panels + p % panels * count) * cols * panel)
                    if p % panels * panel + v < rows and out < n:
                        y[row * n + out] = biases[out] if bias else T.float32(0)
                        for t in T.serial(count):
                            for c in T.serial(cols):
                                i = T.meta_var(T.cast(indices[first + t], "int64") + c)
                                value = T.meta_var(values[base + (t * cols + c) * panel + v])
                                y[row * n + out] += (workspace[i] if scratch else x[row * k + i]) * value
                        y[row * n + out] = T.max(y[row * n + out], T.float32(0))
                        if residual:
                            y[row * n + out] += residuals[row * n + out]

    module = tvm.compile(tvm.IRModule({"plain": plain}), target={"kind": "llvm"})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.o"
        module.mod.write_to_file(str(path), "o")
        return path.read_bytes()


# ---- One-node models ----


@dataclass
class Case:
    """A weight, its epilogue, and the node that computes it; tests change a part to make it wrong.

    Attributes:
        matrix: [N, K] packed.
        inputs: constants by the node's input name; None leaves the input out.
        attributes: of the node.
    """

    matrix: SparseMatrix
    bias: Array | None = None
    residual: bool = False
    scratch: bool = False
    inputs: dict[str, Array | None] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    node_name: str = "fc1"

    def __post_init__(self) -> None:
        self.inputs = {
            "values": self.matrix.values,
            "indices": self.matrix.indices,
            "indptr": self.matrix.indptr,
            "bias": self.bias,
        }
        out, inputs = self.matrix.shape
        rows, cols = self.matrix.block
        self.attributes = {"kernel": "plain", "in_features": inputs, "out_features": out, "block_rows": rows}
        self.attributes |= {"block_cols": cols, "threads": 2, "pattern": str(self.matrix.pattern), "alpha": 0.5}

    @property
    def kernel(self) -> Kernel:
        m = self.matrix
        shape = (m.shape[1], m.shape[0], m.block, m.panel, self.bias is not None, self.residual, self.scratch)
        symbol = "plain_" + "_".join(str(int(part)) for part in np.concatenate([np.ravel(part) for part in shape]))
        code = tvm_object(symbol, *shape)
        epilogue = Epilogue(Activation.RELU, bias=self.bias is not None, residual=self.residual)
        variants = tuple(
            CpuVariant(symbol, limit, grain, m.shape[1] if self.scratch else 0, 2, code)
            for limit, grain in ((4, 1), (ANY_ROWS, 8))
        )
        return Kernel("plain", m.shape[1], m.shape[0], m.block, m.panel, epilogue, variants)

    def product(self, x: Array) -> Array:
        y = x.astype(np.float64) @ self.matrix.to_dense().T.astype(np.float64)
        return np.maximum(y if self.bias is None else y + self.bias, 0)

    def model(self, x_type: int = TensorProto.FLOAT, x_shape: Sequence[str | int] | None = None) -> onnx.ModelProto:
        k, n = self.matrix.shape[1], self.matrix.shape[0]
        names = ["x", *(name if value is not None else "" for name, value in self.inputs.items())]
        names += ["residual"] if self.residual else []
        node = helper.make_node(
            "SparseLinear", names, ["y"], name=self.node_name, domain="ai.sparsec", **self.attributes
        )
        feeds = [helper.make_tensor_value_info("x", x_type, x_shape)]
        if self.residual:
            shape = [*x_shape[:-1], n] if x_shape and x_shape[-1] == k else None
            feeds.append(helper.make_tensor_value_info("residual", TensorProto.FLOAT, shape))
        constants = [numpy_helper.from_array(value, name) for name, value in self.inputs.items() if value is not None]
        outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
        graph = helper.make_graph([node], "test", feeds, outputs, constants)
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.sparsec", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def make_case(
    k: int = 40,
    n: int = 50,
    block: tuple[int, int] = (8, 3),
    bias: bool = False,
    residual: bool = False,
    scratch: bool = False,
    density: float = 0.4,
) -> Case:
    rng = np.random.default_rng([k, n, *block])
    pattern = BlockPattern(*block)
    mask = pattern.project(rng.random((n, k)), density)
    matrix = pattern.pack((rng.standard_normal((n, k)) * mask).astype(np.float32))
    return Case(matrix, rng.standard_normal(n).astype(np.float32) if bias else None, residual, scratch)


def open_session(model: onnx.ModelProto, library: Path, threads: int = 1) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def check(case: Case, session: ort.InferenceSession, x: Array, residual: Array | None = None) -> None:
    feed = {"x": x} if residual is None else {"x": x, "residual": residual}
    expected = case.product(x) if residual is None else case.product(x) + residual
    got = session.run(None, feed)[0]
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    """Builds each case's library once."""
    built: dict[Kernel, Path] = {}

    def build(case: Case) -> Path:
        kernel = case.kernel
        if kernel not in built:
            built[kernel] = tmp_path_factory.mktemp("ops") / "libsparsec_ops.so"
            build_library([kernel], built[kernel])
        return built[kernel]

    return build


# ---- Results ----


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("block", "bias"), [((8, 3), True), ((1, 1), False), ((20, 7), False), ((64, 64), True)])
def test_ranks(library: Library, block: tuple[int, int], bias: bool, threads: int) -> None:
    case = make_case(block=block, bias=bias)
    session = open_session(case.model(), library(case), threads)
    for shape in [(), (1,), (7,), (2, 3), (2, 2, 30), (0,), (3, 0), (0, 4, 5)]:
        check(case, session, RNG.standard_normal((*shape, 40)).astype(np.float32))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("rows", [1, 3, 5, 9, 33, 400])
def test_large_enough_for_threads(library: Library, rows: int, threads: int) -> None:
    case = make_case(k=250, n=500, block=(16, 2), bias=True, scratch=True)
    case.attributes["threads"] = threads
    session = open_session(case.model(), library(case), threads)
    check(case, session, RNG.standard_normal((rows, 250)).astype(np.float32))


def test_weight_of_zeros(library: Library) -> None:
    pattern = BlockPattern(8, 1)
    case = Case(pattern.pack(np.zeros((20, 10), np.float32)), bias=np.ones(20, np.float32))
    check(case, open_session(case.model(), library(case)), np.ones((3, 10), np.float32))


@pytest.mark.parametrize("empty", [False, True])
def test_bias_left_out(library: Library, empty: bool) -> None:
    case = make_case(residual=True)
    case.inputs["bias"] = np.zeros(0, np.float32) if empty else None
    session = open_session(case.model(), library(case))
    check(case, session, *(RNG.standard_normal((3, size)).astype(np.float32) for size in (40, 50)))


@pytest.mark.parametrize(
    ("x", "residual"),
    [
        ((3,), (3, 50)),
        ((2, 3), (2, 3, 50)),
        ((), (50,)),
        # The residual is the smaller one.
        ((3,), (50,)),
        ((3,), ()),
        ((3,), (1,)),
        ((2, 3), (3, 1)),
        ((2, 3), (2, 1, 50)),
        ((3,), (1, 1, 50)),
        ((2, 3), (1, 2, 3, 50)),
        # The product is the smaller one, or each in a dimension.
        ((), (4, 50)),
        ((1,), (4, 50)),
        ((3,), (2, 3, 50)),
        ((2, 1), (1, 4, 50)),
        ((2, 1), (5, 1, 4, 1)),
        # Nothing to add to, or nothing to add.
        ((0,), (0, 50)),
        ((0,), (50,)),
        ((1,), (0, 50)),
        ((2, 1), (0, 1)),
    ],
)
def test_residual_broadcasts(library: Library, x: tuple[int, ...], residual: tuple[int, ...]) -> None:
    case = make_case(bias=True, residual=True)
    session = open_session(case.model(), library(case), 2)
    check(case, session, RNG.standard_normal((*x, 40)).astype("f"), RNG.standard_normal(residual).astype("f"))


def test_sessions_and_runs_at_once(library: Library) -> None:
    case = make_case(k=250, n=500, block=(16, 2), bias=True, scratch=True)
    sessions = [open_session(case.model(), library(case), 2) for _ in range(2)]

    def runs(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(8):
            check(case, sessions[seed % 2], rng.standard_normal((rng.integers(1, 20), 250)).astype(np.float32))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(runs, range(6)))


def test_two_libraries_in_one_process(library: Library) -> None:
    """The same kernel name and the same symbols of the operator, but other code."""
    cases = [make_case(bias=True), make_case(n=30, bias=True)]
    sessions = [open_session(case.model(), library(case)) for case in cases]
    x = RNG.standard_normal((3, 40)).astype(np.float32)
    for _ in range(2):
        for case, session in zip(cases, sessions, strict=True):
            check(case, session, x)


def test_library_can_be_loaded_again(library: Library) -> None:
    """ONNX Runtime unloads it with its last session."""
    case = make_case(bias=True)
    for _ in range(5):
        check(case, open_session(case.model(), library(case)), np.ones((2, 40), np.float32))


def test_shape_inference(library: Library) -> None:
    case = make_case(residual=True)
    for x_shape, expected in [
        (["batch", 3, 40], ["batch", 3, 50]),
        ([7, 40], [7, 50]),
        (["batch", None], []),
        ([None, 40], []),
        (None, []),
    ]:
        session = open_session(case.model(x_shape=x_shape), library(case))
        # Before 1.24 the operator must not offer to infer shapes (see sparse_linear.c).
        known = tuple(map(int, ort.__version__.split(".")[:2])) >= (1, 24)
        assert session.get_outputs()[0].shape == (expected if known else [])


# ---- How the work is split ----


@pytest.fixture(scope="module")
def marks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library whose kernel, for 32 panels of 16 outputs, shows how the work was split."""
    folder = tmp_path_factory.mktemp("marks")
    code = c_object(MARK, folder, PANEL=16, N=512)
    kernel = Kernel("mark", 1024, 512, (16, 1), 16, Epilogue(), (CpuVariant("mark", ANY_ROWS, 8, 0, 2, code),))
    build_library([kernel], folder / "ops.so")
    return folder / "ops.so"


@pytest.mark.parametrize(
    ("rows", "inputs", "threads", "row_parts", "panel_parts"),
    [
        (1, 256, 1, 1, 1),
        (64, 256, 1, 1, 1),
        (1, 256, 2, 1, 4),
        (8, 256, 2, 1, 4),
        (9, 256, 2, 2, 2),
        (24, 256, 2, 3, 2),
        (32, 256, 2, 4, 1),
        (1000, 256, 2, 4, 1),
        # More threads than are worth waking, or than there is work for.
        (1, 1, 8, 1, 1),
        (16, 1, 8, 2, 3),
        (128, 1, 8, 16, 1),
        (1, 1024, 64, 1, 32),
    ],
)
def test_split(marks: Path, rows: int, inputs: int, threads: int, row_parts: int, panel_parts: int) -> None:
    """Two parts a thread. The last of the 32 panels holds all 1,024 inputs, each other `inputs` of them."""
    weight = np.zeros((512, 1024), np.float32)
    weight[:, :inputs] = 1
    weight[-16:] = 1
    case = Case(BlockPattern(16, 1).pack(weight))
    case.attributes |= {"threads": threads, "kernel": "mark"}
    session = open_session(case.model(), marks, min(threads, 2))
    marked = session.run(None, {"x": np.ones((rows, 1024), np.float32)})[0].astype(np.int64)
    first_rows, first_panels = np.divmod(marked, 1000)
    # Every output was computed by the part that its row and its panel belong to.
    assert (first_rows == first_rows[:, :1]).all()
    assert (first_panels == first_panels[:1]).all()
    tiles = -(-rows // 8)
    assert sorted(set(first_rows[:, 0])) == [8 * (i * tiles // row_parts) for i in range(row_parts)]
    starts = sorted(set(first_panels[0]))
    work = [inputs] * 31 + [1024]
    shares = [sum(work[a:b]) for a, b in zip(starts, [*starts[1:], 32], strict=True)]
    assert len(starts) == panel_parts
    # The panels at a share's ends are not cut.
    assert max(shares) < sum(work) / panel_parts + 1024


# ---- What is wrong is said ----


def corrupt(name: str, change: Callable[[Array], Array]) -> Callable[[Case], None]:
    def apply(case: Case) -> None:
        value = case.inputs[name]
        assert value is not None
        case.inputs[name] = change(value.copy())

    return apply


def put(at: int, value: int) -> Callable[[Array], Array]:
    def change(array: Array) -> Array:
        array[at] = value
        return array

    return change


def attribute(name: str, value: object) -> Callable[[Case], None]:
    def apply(case: Case) -> None:
        case.attributes[name] = value

    return apply


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (corrupt("indices", put(2, -1)), r"'fc1': indices\[2\] is -1, expected 0 to 37; the model is damaged"),
        (corrupt("indices", put(0, 38)), r"indices\[0\] is 38, expected 0 to 37"),
        (corrupt("indices", put(0, -(2**31))), r"indices\[0\] is -2147483648, expected 0 to 37"),
        (corrupt("indices", lambda a: a[:-1]), r"values has \d+ elements, expected \d+ blocks of 24"),
        (corrupt("indices", lambda a: a[:0]), r"values has \d+ elements, expected 0 blocks of 24"),
        (corrupt("indptr", put(0, 1)), r"indptr\[0\] is 1, expected 0"),
        (corrupt("indptr", put(2, -5)), r"indptr\[2\] is -5, expected at least \d+ as before it"),
        (corrupt("indptr", put(1, 2**31 - 1)), r"indptr\[2\] is \d+, expected at least 2147483647"),
        (corrupt("indptr", put(-1, 2**31 - 1)), r"indptr ends at 2147483647, expected \d+, the number of indices"),
        (corrupt("indptr", lambda a: a[:-1]), r"indptr has 7 elements, expected 8"),
        (corrupt("indptr", lambda a: a[:0]), r"indptr has 0 elements, expected 8"),
        (corrupt("indptr", lambda a: a.astype(np.int64)), r"'tensor\(int64\)'.*is invalid"),
        (corrupt("values", lambda a: a[:-1]), r"values has \d+ elements, expected \d+ blocks of 24"),
        (corrupt("values", lambda a: a[:-24]), r"values has \d+ elements, expected \d+ blocks of 24"),
        (corrupt("values", lambda a: a[:0]), r"values has 0 elements, expected \d+ blocks of 24"),
        (corrupt("values", lambda a: a.astype(np.float16)), r"'tensor\(float16\)'.*is invalid"),
        (corrupt("bias", lambda a: a[:-1]), r"bias has 49 elements, expected 50"),
        (corrupt("bias", lambda a: a[:0]), r"bias is missing, but kernel 'plain' was compiled for it"),
        (
            attribute("kernel", "other"),
            r"'fc1': this library has no kernel 'other'; the model and the library come from",
        ),
        (attribute("kernel", "x" * 300), r"attribute 'kernel' is missing or no short string"),
        (attribute("kernel", 3), r"attribute 'kernel' is missing or no short string"),
        (attribute("in_features", 41), r"attribute 'in_features' is 41, expected 40 of kernel 'plain'"),
        (attribute("out_features", -1), r"attribute 'out_features' is -1, expected 50"),
        (attribute("block_rows", 4), r"attribute 'block_rows' is 4, expected 8"),
        (attribute("block_cols", 1), r"attribute 'block_cols' is 1, expected 3"),
        (attribute("block_cols", 3.0), r"attribute 'block_cols' is missing or no integer"),
        (attribute("threads", 0), r"attribute 'threads' is 0, expected 1 to 4096"),
        (attribute("threads", 2**62), r"attribute 'threads' is \d+, expected 1 to 4096"),
    ],
)
def test_damage_is_named(library: Library, break_it: Callable[[Case], None], sentence: str) -> None:
    case = make_case(bias=True)
    path = library(case)
    break_it(case)
    with pytest.raises(Exception, match=sentence):
        open_session(case.model(), path)


@pytest.mark.parametrize("name", ["kernel", "in_features", "out_features", "block_rows", "block_cols", "threads"])
def test_missing_attribute(library: Library, name: str) -> None:
    case = make_case(bias=True)
    path = library(case)
    del case.attributes[name]
    with pytest.raises(Exception, match=f"attribute '{name}' is missing"):
        open_session(case.model(), path)


@pytest.mark.parametrize("name", ["values", "indices", "indptr", "bias"])
def test_constants_must_be_constant(library: Library, name: str) -> None:
    case = make_case(bias=True)
    model = case.model()
    [constant] = [tensor for tensor in model.graph.initializer if tensor.name == name]
    # An initializer that is also an input can be overridden, and so is not constant.
    model.graph.input.append(helper.make_tensor_value_info(name, constant.data_type, constant.dims))
    with pytest.raises(Exception, match=f"'fc1': {name} is computed or fed, expected an initializer"):
        open_session(model, library(case))


def test_epilogue_must_match(library: Library) -> None:
    plain, full = make_case(), make_case(bias=True, residual=True)
    with pytest.raises(Exception, match="residual is missing, but kernel 'plain' was compiled for it"):
        open_session(plain.model(), library(full))
    with pytest.raises(Exception, match="residual is given, but kernel 'plain' was compiled without it"):
        open_session(full.model(), library(plain))
    with pytest.raises(Exception, match="bias is given, but kernel 'plain' was compiled without it"):
        open_session(make_case(bias=True).model(), library(plain))


def test_wrong_x(library: Library) -> None:
    case = make_case(residual=True)
    session = open_session(case.model(), library(case))
    good = np.zeros((2, 50), np.float32)
    for shape, printed in [((2, 41), r"\[2, 41\]"), ((), r"\[\]"), ((0,), r"\[0\]"), ((3, 40, 1), r"\[3, 40, 1\]")]:
        with pytest.raises(Exception, match=rf"'fc1': X has shape {printed}, expected \[..., 40\]"):
            session.run(None, {"x": np.zeros(shape, np.float32), "residual": good})
    with pytest.raises(Exception, match="X has 33 dimensions, expected at most 32"):
        session.run(None, {"x": np.zeros((1,) * 32 + (40,), np.float32), "residual": good})
    with pytest.raises(Exception, match=r"residual has shape \[2, 49\], expected .* with the product's \[2, 50\]"):
        session.run(None, {"x": np.zeros((2, 40), np.float32), "residual": good[:, 1:]})
    long = rf"\[{'1, ' * 25}"
    with pytest.raises(Exception, match=rf"residual has shape {long}"):
        session.run(None, {"x": np.zeros((2, 40), np.float32), "residual": np.zeros((1,) * 30 + (3,), np.float32)})
    check(case, session, np.ones((2, 40), np.float32), good)
    with pytest.raises(Exception, match=r"'tensor\(double\)'.*is invalid"):
        open_session(case.model(TensorProto.DOUBLE), library(case))


def test_node_without_a_name(library: Library) -> None:
    case = make_case(bias=True)
    case.node_name = ""
    case.attributes["threads"] = 0
    with pytest.raises(Exception, match="SparseLinear 'plain': attribute 'threads'"):
        open_session(case.model(), library(case))


def test_kernel_that_fails(tmp_path: Path) -> None:
    case = make_case()
    code = c_object(FAIL, tmp_path)
    build_library([replace(case.kernel, cpu=(CpuVariant("fail", ANY_ROWS, 1, 8, 2, code),))], tmp_path / "ops.so")
    session = open_session(case.model(), tmp_path / "ops.so")
    with pytest.raises(Exception, match="'fc1': kernel 'plain' failed: ValueError: x is odd"):
        session.run(None, {"x": np.zeros((5, 40), np.float32)})


def test_out_of_memory(tmp_path: Path) -> None:
    case = make_case()
    code = c_object(FAIL, tmp_path)
    variant = CpuVariant("fail", ANY_ROWS, 1, 2**58, 2, code)
    build_library([replace(case.kernel, cpu=(variant,))], tmp_path / "ops.so")
    session = open_session(case.model(), tmp_path / "ops.so")
    with pytest.raises(Exception, match="'fc1': kernel 'plain' failed: out of memory for its workspace"):
        session.run(None, {"x": np.zeros((5, 40), np.float32)})


INT32 = st.integers(-(2**31), 2**31 - 1) | st.integers(-2, 45)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["indices", "indptr"]), st.integers(0, 60), INT32), min_size=1, max_size=3))
def test_damaged_weights_are_refused_or_harmless(library: Library, changes: list[tuple[str, int, int]]) -> None:
    """Any change of the index arrays is an error, or another matrix whose product is right."""
    case = make_case(k=12, n=30, block=(8, 3), bias=True, density=0.5)
    path = library(case)
    for name, at, value in changes:
        array = case.inputs[name]
        assert array is not None
        case.inputs[name] = put(at % array.size, value)(array.copy())
    try:
        session = open_session(case.model(), path)
    except Exception as error:
        refusal = str(error)
    else:
        indices, indptr = case.inputs["indices"], case.inputs["indptr"]
        assert indices is not None
        assert indptr is not None
        case.matrix = replace(case.matrix, indices=indices, indptr=indptr)
        check(case, session, RNG.standard_normal((3, 12)).astype(np.float32))
        return
    assert re.search(r"SparseLinear 'fc1': ind(ices|ptr)\S* (is|ends at) \S+, expected ", refusal)


# ---- The file ----


def dynamic_symbols(path: Path, *flags: str) -> list[str]:
    run = subprocess.run(["nm", "--dynamic", *flags, str(path)], capture_output=True, text=True, check=True)
    return run.stdout.splitlines()


def test_library_needs_only_libc(library: Library) -> None:
    path = library(make_case(bias=True))
    exported = [line.split()[-1] for line in dynamic_symbols(path, "--defined-only")]
    assert exported == ["RegisterCustomOps"]
    needed = [line.split() for line in dynamic_symbols(path, "--undefined-only")]
    versions = [name.partition("@GLIBC_")[2] for kind, name in needed if kind == "U"]
    # ONNX Runtime's own packages ask for glibc 2.28 (manylinux_2_28), so the library may not ask for a later one.
    assert versions and all(version and [int(part) for part in version.split(".")] <= [2, 28] for version in versions)


def test_library_without_kernels(tmp_path: Path) -> None:
    build_library([], tmp_path / "ops.so")
    with pytest.raises(Exception, match="this library has no kernel 'plain'"):
        open_session(make_case().model(), tmp_path / "ops.so")


def test_same_kernels_same_bytes(tmp_path: Path) -> None:
    first, second = make_case(bias=True).kernel, make_case(n=30).kernel
    kernels = [first, replace(second, name='"quoted" and ünicode')]
    paths = [tmp_path / "a" / "ops.so", tmp_path / "b" / "other.so"]
    for path in paths:
        path.parent.mkdir()
        build_library(kernels, path)
    content = paths[0].read_bytes()
    assert content == paths[1].read_bytes()
    assert [file.name for file in paths[0].parent.iterdir()] == ["ops.so"]
    for folder in (tmp_path, Path(ort.__file__).parent, Path.cwd(), Path(build_library.__code__.co_filename).parent):
        assert str(folder).encode() not in content


def test_library_in_use_is_replaced_not_overwritten(tmp_path: Path) -> None:
    case = make_case(bias=True)
    build_library([case.kernel], tmp_path / "ops.so")
    session = open_session(case.model(), tmp_path / "ops.so")
    build_library([], tmp_path / "ops.so")
    check(case, session, np.ones((2, 40), np.float32))


def test_shared_code_is_linked_once(tmp_path: Path) -> None:
    kernel = make_case(bias=True).kernel
    kernels = [kernel, replace(kernel, name="again")]
    build_library(kernels, tmp_path / "two.so")
    build_library([kernel], tmp_path / "one.so")
    assert (tmp_path / "two.so").stat().st_size - (tmp_path / "one.so").stat().st_size < 4096
    variants = tuple(replace(variant, code=b"") for variant in kernel.cpu)
    with pytest.raises(ValueError, match=r"'again': symbol 'plain_.*' stands for two different codes"):
        build_library([kernel, Kernel("again", 40, 50, (8, 3), 8, kernel.epilogue, variants)], tmp_path / "bad.so")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"cpu": ()}, "has no variants for CPUs"),
        ({"block": (51, 1)}, "blocks of 51x1 do not fit"),
        ({"panel": 0}, "do not fit"),
    ],
)
def test_impossible_kernels(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        build_library([replace(make_case().kernel, **change)], tmp_path / "ops.so")


def test_duplicate_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="same name"):
        build_library([make_case().kernel] * 2, tmp_path / "ops.so")


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs to know this processor")
def test_processor_is_asked(tmp_path: Path) -> None:
    case = make_case()
    build_library([case.kernel], tmp_path / "ops.so", requires=("sse3",))
    check(case, open_session(case.model(), tmp_path / "ops.so"), np.ones((2, 40), np.float32))
    # Only AMD's processors of 2011 to 2015 had FMA4.
    build_library([case.kernel], tmp_path / "other.so", requires=("sse3", "fma4"))
    with pytest.raises(Exception, match="compiled for processors with fma4, which this one lacks"):
        open_session(case.model(), tmp_path / "other.so")


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(SparsecError, match=r"no C compiler was found.*apt install gcc.*dnf install gcc.*xcode-select"):
        build_library([], tmp_path / "ops.so")
    monkeypatch.setenv("CC", "no-such-compiler -O3")
    with pytest.raises(SparsecError, match="CC names 'no-such-compiler', which is not an installed program"):
        find_compiler()


def test_compiler_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "cc -m64")
    assert find_compiler() == ("cc", "-m64")


def test_compiler_fails(tmp_path: Path) -> None:
    kernel = make_case().kernel
    broken = replace(kernel, cpu=tuple(replace(variant, code=b"no object") for variant in kernel.cpu))
    with pytest.raises(SparsecError, match=r"could not make the operator library \(exit code \d+\); its last lines:\n"):
        build_library([broken], tmp_path / "ops.so")
    assert list(tmp_path.iterdir()) == []

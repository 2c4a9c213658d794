"""Weights and activations of fewer bits inside ONNX Runtime: right results, and a sentence for what can be wrong."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from test_integers import quantized
from test_ort_library import attribute, corrupt, open_session, put

from sparsec.codegen.generate.cpu import generate
from sparsec.codegen.kernel import ANY_ROWS, CpuVariant, Kernel
from sparsec.codegen.kernels.cpu.schedule import Schedule
from sparsec.codegen.ort.library import build_library
from sparsec.codegen.problem import Problem
from sparsec.codegen.target import Target, parse_cpu
from sparsec.codegen.tune.database import Database
from sparsec.codegen.tune.gpu.measure import activated
from sparsec.codegen.tune.tuner import Tuner
from sparsec.ir import Activation, BlockPattern, Epilogue, Grid, SparseMatrix
from sparsec.ir.sparse_matrix import DOT_INPUTS
from sparsec.ir.values import Floats, parse_values

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from sparsec.codegen.target import CpuTarget

    Array = NDArray[Any]
    Library = Callable[..., Path]

RNG = np.random.default_rng(0)
# Before 1.24 the operator must not offer to infer types and shapes (see sparse_linear.c).
INFERS = tuple(map(int, ort.__version__.split(".")[:2])) >= (1, 24)
# How values are stored, X given and Y returned: every combination that the library knows.
FORMATS = [
    ("fp32", "float", "float"),
    ("bf16", "float", "float"),
    ("fp16", "float", "float"),
    ("int8", "float", "float"),
    ("int8:8", "float", "float"),
    ("codebook16", "float", "float"),
    ("codebook256", "float", "float"),
    ("int8", "uint8", "float"),
    ("int8", "static", "float"),
    ("int8", "dynamic", "float"),
    ("codebook16", "float", "uint8"),
    ("int8", "uint8", "uint8"),
    ("int8", "static", "uint8"),
    ("int8", "dynamic", "uint8"),
]
# That with the most inputs and attributes.
INTEGERS = ("int8", "static", "uint8")


@cache
def host() -> CpuTarget:
    return parse_cpu()


# ---- One-node models ----


@dataclass
class Case:
    """A weight, how it is multiplied, and the node that does it; tests change a part to make it wrong.

    Attributes:
        matrix: [N, K] packed.
        problem: its.
        name: of the kernel.
        inputs: constants by the node's input name, in the node's order; None leaves the input out.
        attributes: of the node.
    """

    matrix: SparseMatrix
    problem: Problem
    bias: Array | None
    x_grid: Grid
    y_grid: Grid
    name: str = "plain"
    inputs: dict[str, Array | None] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        m, p = self.matrix, self.problem
        table = m.kind.laid_out(m.table, m.panels * m.panel)
        self.inputs = {
            "values": m.values,
            "indices": m.indices,
            "indptr": m.indptr,
            "bias": self.bias,
            "residual": None,
        }
        self.inputs |= {"table": table if table.size else None, "sums": m.sums if p.integers else None}
        (out, inputs), (rows, cols) = m.shape, m.block
        self.attributes = {"kernel": self.name, "in_features": inputs, "out_features": out, "block_rows": rows}
        self.attributes |= {"block_cols": cols, "threads": 2}
        if p.x in ("uint8", "static"):
            self.attributes |= {"x_scale": self.x_grid.scale, "x_zero_point": self.x_grid.zero_point}
        if p.y == "uint8":
            self.attributes |= {"y_scale": self.y_grid.scale, "y_zero_point": self.y_grid.zero_point}

    @property
    def op_type(self) -> str:
        return "QSparseLinear" if self.problem.y == "uint8" else "SparseLinear"

    @property
    def kernel(self) -> Kernel:
        p = self.problem
        schedule = Schedule("dots" if p.integers else "rows", 4)
        code = generate(p, schedule, host())
        variants = (CpuVariant(code.symbol, ANY_ROWS, schedule.tile_rows, code.workspace, 2, code.elf),)
        k, n, e = p.in_features, p.out_features, p.epilogue
        return Kernel(self.name, k, n, p.block, p.panel, e, variants, kind=p.kind, x=p.x, y=p.y)

    def node(self, x: str = "x", y: str = "y") -> onnx.NodeProto:
        names = [x, *(f"{self.name}.{key}" if value is not None else "" for key, value in self.inputs.items())]
        if self.problem.epilogue.residual:
            names[5] = "residual"
        while not names[-1]:
            names.pop()
        return helper.make_node(self.op_type, names, [y], name="fc1", domain="ai.sparsec", **self.attributes)

    def constants(self) -> list[onnx.TensorProto]:
        given = {key: value for key, value in self.inputs.items() if value is not None}
        return [numpy_helper.from_array(value, f"{self.name}.{key}") for key, value in given.items()]

    def model(self, x_shape: Sequence[str | int | None] | None = None) -> onnx.ModelProto:
        x_type, y_type = (
            TensorProto.UINT8 if name == "uint8" else TensorProto.FLOAT for name in (self.problem.x, self.problem.y)
        )
        feeds = [helper.make_tensor_value_info("x", x_type, x_shape)]
        if self.problem.epilogue.residual:
            feeds.append(helper.make_tensor_value_info("residual", TensorProto.FLOAT, None))
        outputs = [helper.make_tensor_value_info("y", y_type, None)]
        return make_model([self.node()], feeds, outputs, self.constants())

    def x(self, *shape: int) -> Array:
        """Random X, of which numbers below and above what its grid holds, too."""
        if self.problem.x == "uint8":
            return RNG.integers(0, 256, (*shape, self.matrix.shape[1]), dtype=np.uint8)
        return RNG.standard_normal((*shape, self.matrix.shape[1])).astype(np.float32)

    def exact(self, x: Array) -> Array:
        """X as it is multiplied."""
        if self.problem.x == "float":
            return x.astype(np.float64)
        if self.problem.x == "dynamic":
            low, high = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
            scale = np.maximum((high - low) / np.float32(255), np.float32(1e-30))
            zero_point = np.rint(-low * (np.float32(1) / scale))
        else:
            scale, zero_point = np.float32(self.x_grid.scale), np.float32(self.x_grid.zero_point)
        codes = x if x.dtype == np.uint8 else quantized(x, np.float32(1) / scale, zero_point)
        return (codes.astype(np.float64) - zero_point) * scale

    def product(self, x: Array, residual: Array | None = None) -> Array:
        """Y before it is rounded, [..., N] float64."""
        y = self.exact(x) @ self.matrix.to_dense().T.astype(np.float64)
        y = activated(y if self.bias is None else y + self.bias, self.problem.epilogue)
        return y if residual is None else y + residual


def make_model(
    nodes: list[onnx.NodeProto],
    feeds: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    constants: list[onnx.TensorProto],
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "test", feeds, outputs, constants)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.sparsec", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def make_case(
    kind: str = "int8",
    x: str = "float",
    y: str = "float",
    k: int = 40,
    n: int = 50,
    block: tuple[int, int] = (8, 4),
    activation: Activation = Activation.RELU,
    bias: bool = True,
    residual: bool = False,
    name: str = "plain",
    seed: int = 0,
) -> Case:
    rng = np.random.default_rng([seed, k, n, *block])
    pattern = BlockPattern(*block)
    weight = (rng.standard_normal((n, k)) * pattern.project(rng.random((n, k)), 0.4)).astype(np.float32)
    matrix = pattern.pack(weight, "float32", parse_values(kind), together=DOT_INPUTS if x != "float" else 1)
    problem = Problem.of(matrix, Epilogue(activation, bias=bias, residual=residual), x, y)
    b = rng.standard_normal(n).astype(np.float32) if bias else None
    y_grid = Grid.spanning(0, 8) if activation is Activation.RELU else Grid.spanning(-8, 8)
    if x == "uint8":
        y_grid = replace(y_grid, scale=y_grid.scale * 2)
    return Case(matrix, problem, b, Grid(0.015, 100), y_grid, name)


def check(case: Case, session: ort.InferenceSession, x: Array, residual: Array | None = None) -> None:
    [got] = session.run(None, {"x": x} if residual is None else {"x": x, "residual": residual})
    right = case.product(x, residual)
    assert got.shape == right.shape
    if case.problem.y == "float":
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-5)
        return
    assert got.dtype == np.uint8
    grid = case.y_grid
    codes = np.clip(right / grid.scale + grid.zero_point, 0, 255)
    assert (np.abs(got - codes) <= 0.501).all()
    assert got.size < 100 or len(np.unique(got)) > 20, "nothing was seen of the codes"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """Builds the library of some cases, once for those whose kernels are the same."""
    built: dict[tuple[Kernel, ...], Path] = {}

    def build(*cases: Case) -> Path:
        kernels = tuple(case.kernel for case in cases)
        if kernels not in built:
            built[kernels] = tmp_path_factory.mktemp("ops") / "libsparsec_ops.so"
            build_library(kernels, built[kernels])
        return built[kernels]

    return build


# ---- Results ----


def every_case() -> list[Case]:
    return [make_case(*one, name=f"kernel{i}") for i, one in enumerate(FORMATS)]


@pytest.mark.parametrize("number", range(len(FORMATS)), ids=["-".join(one) for one in FORMATS])
def test_every_format(library: Library, number: int) -> None:
    """All of them in one library, where ONNX Runtime has to tell operators of one name apart."""
    cases = every_case()
    for threads in (1, 2):
        session = open_session(cases[number].model(), library(*cases), threads)
        for shape in [(), (1,), (7,), (2, 3), (2, 2, 30), (0,), (3, 0)]:
            check(cases[number], session, cases[number].x(*shape))


@pytest.mark.parametrize(("x", "y"), [("uint8", "uint8"), ("static", "float"), ("dynamic", "float")])
def test_large_enough_for_threads(library: Library, x: str, y: str) -> None:
    case = make_case("int8", x, y, k=512, n=500, block=(16, 4))
    # A grid that holds sums of so many.
    case = replace(case, y_grid=Grid(0.3, 5))
    session = open_session(case.model(), library(case), 2)
    for rows in (1, 3, 33, 300):
        check(case, session, case.x(rows))


@pytest.mark.parametrize("residual", [(3, 50), (50,), (2, 1, 50), ()])
def test_residual_broadcasts(library: Library, residual: tuple[int, ...]) -> None:
    formats = (("codebook16", "float"), ("int8", "uint8"), ("int8", "dynamic"))
    cases = [
        make_case(*one, residual=True, activation=Activation.SILU, name=f"kernel{i}") for i, one in enumerate(formats)
    ]
    for case in cases:
        session = open_session(case.model(), library(*cases))
        check(case, session, case.x(3), RNG.standard_normal(residual).astype(np.float32))


def test_weight_of_zeros(library: Library) -> None:
    """Nothing is stored; Y is the activation of the bias."""
    pattern, n = BlockPattern(8, 4), 20
    cases = []
    for kind, x, y in (("int8", "uint8", "uint8"), ("codebook16", "float", "float"), ("int8", "dynamic", "float")):
        together = DOT_INPUTS if x != "float" else 1
        matrix = pattern.pack(np.zeros((n, 16), np.float32), "float32", parse_values(kind), together=together)
        problem = Problem.of(matrix, Epilogue(bias=True), x, y)
        bias = np.linspace(0, 9, n).astype(np.float32)
        cases.append(Case(matrix, problem, bias, Grid(1.0, 3), Grid(0.1, 9), f"kernel{len(cases)}"))
    for case in cases:
        check(case, open_session(case.model(), library(*cases)), case.x(3))


def test_kernel_of_the_tuner(tmp_path: Path) -> None:
    """With a variant for every class of rows."""
    tuner = Tuner(Target(host()), 2, "off", Database(tmp_path / "tuning.sqlite"))
    case = make_case(*INTEGERS, k=64, n=64, block=(32, 4))
    tuned = tuner.kernel(case.problem, (1, 8, 100))
    assert len(tuned.kernel.cpu) > 2
    build_library([tuned.kernel], tmp_path / "ops.so", host().requires)
    case = replace(case, name=tuned.kernel.name)
    session = open_session(case.model(), tmp_path / "ops.so", 2)
    for rows in (1, 2, 4, 20, 48, 100):
        check(case, session, case.x(rows))


def test_same_bytes(tmp_path: Path) -> None:
    kernels = [make_case(*one, name=f"k{i}").kernel for i, one in enumerate(FORMATS[-3:])]
    for name in ("a.so", "b.so"):
        build_library(kernels, tmp_path / name)
    assert (tmp_path / "a.so").read_bytes() == (tmp_path / "b.so").read_bytes()


# ---- Several in one process, library, model ----


def test_two_libraries_in_one_process(library: Library) -> None:
    """The same kernel name, but other types and other code."""
    cases = [make_case("int8", "uint8", "uint8"), make_case("codebook16"), make_case("int8", "uint8")]
    sessions = [open_session(case.model(), library(case)) for case in cases]
    for _ in range(2):
        for case, session in zip(cases, sessions, strict=True):
            check(case, session, case.x(5))


def test_layers_hand_over_codes(library: Library) -> None:
    """Floats, codes, codes, floats: four formats in one model, and no type is written between its nodes."""
    grids = [Grid(0.02, 120), Grid(0.03, 7), Grid(0.05, 9)]  # of x, h1 and h2
    cases = [
        make_case("int8", "static", "uint8", k=40, n=48, name="first"),
        make_case("int8", "uint8", "uint8", k=48, n=44, name="second", seed=1),
        make_case("int8", "uint8", "float", k=44, n=52, name="third", seed=2),
        make_case("codebook16", "float", "float", k=52, n=8, name="fourth", seed=3),
    ]
    for i in range(3):
        cases[i] = replace(cases[i], x_grid=grids[i], y_grid=grids[i + 1] if i < 2 else cases[i].y_grid)
    path = library(*cases)
    names = ["x", "h1", "h2", "h3", "y"]
    nodes = [case.node(*ends) for case, ends in zip(cases, pairwise(names), strict=True)]
    for i, node in enumerate(nodes):
        node.name = f"fc{i}"
    model = make_model(
        nodes,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 40])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [constant for case in cases for constant in case.constants()],
    )
    session = open_session(model, path)
    x = cases[0].x(9)
    got = session.run(None, {"x": x})[0]
    for case in cases:
        x = case.product(x)
        if case.problem.y == "uint8":
            x = np.clip(np.rint(x / case.y_grid.scale) + case.y_grid.zero_point, 0, 255).astype(np.uint8)
        else:
            x = x.astype(np.float32)
    np.testing.assert_allclose(got, x, rtol=1e-4, atol=1e-4)
    if INFERS:
        assert session.get_outputs()[0].shape == ["batch", 8]


def test_agrees_with_onnx_runtime(library: Library) -> None:
    """QuantizeLinear, MatMul and QuantizeLinear, as ONNX says; but for results that lie between two codes."""
    case = make_case("int8", "uint8", "uint8", activation=Activation.RELU)
    grids = {"x": case.x_grid, "y": case.y_grid}
    constants = [numpy_helper.from_array(np.float32(grid.scale), f"{name}s") for name, grid in grids.items()]
    constants += [numpy_helper.from_array(np.uint8(grid.zero_point), f"{name}z") for name, grid in grids.items()]
    constants += [numpy_helper.from_array(case.matrix.to_dense().T.copy(), "w"), *case.constants()]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["codes"]),
        case.node("codes", "ours"),
        helper.make_node("DequantizeLinear", ["codes", "xs", "xz"], ["rounded"]),
        helper.make_node("MatMul", ["rounded", "w"], ["product"]),
        helper.make_node("Add", ["product", "plain.bias"], ["sum"]),
        helper.make_node("Relu", ["sum"], ["active"]),
        helper.make_node("QuantizeLinear", ["active", "ys", "yz"], ["theirs"]),
    ]
    model = make_model(
        nodes,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info(name, TensorProto.UINT8, None) for name in ("ours", "theirs")],
        constants,
    )
    session = open_session(model, library(case))
    ours, theirs = (y.astype(int) for y in session.run(None, {"x": RNG.standard_normal((200, 40)).astype(np.float32)}))
    assert np.abs(ours - theirs).max() <= 1
    assert (ours != theirs).mean() < 1e-3
    assert len(np.unique(theirs)) > 50


# ---- Types and shapes before the model runs ----


@pytest.mark.skipif(not INFERS, reason="needs ONNX Runtime 1.24")
@pytest.mark.parametrize(
    ("x", "y"), [(x, y) for x in ("float", "uint8", "static", "dynamic") for y in ("float", "uint8")]
)
def test_inference(library: Library, x: str, y: str) -> None:
    """Also where the library has the operators of all types."""
    cases = every_case()
    case = next(case for case in cases if (case.problem.x, case.problem.y) == (x, y))
    model = case.model(x_shape=["batch", 3, 40])
    # The result is an output by name alone.
    model.graph.output[0].type.Clear()
    session = open_session(model, library(*cases))
    [output] = session.get_outputs()
    assert output.shape == ["batch", 3, 50]
    assert output.type == ("tensor(uint8)" if y == "uint8" else "tensor(float)")


# ---- What is wrong is said ----


def drop(name: str) -> Callable[[Case], None]:
    def apply(case: Case) -> None:
        del case.attributes[name]

    return apply


def leave_out(name: str) -> Callable[[Case], None]:
    def apply(case: Case) -> None:
        case.inputs[name] = None

    return apply


DAMAGE = [
    (corrupt("table", lambda a: a[:-1]), r"'fc1': table has 49 elements, expected 50; the model is damaged"),
    (corrupt("table", lambda a: np.append(a, a)), r"table has 100 elements, expected 50"),
    (corrupt("table", lambda a: a[:0]), r"table has 0 elements, expected 50"),
    (corrupt("table", lambda a: a.astype(np.float16)), r"'tensor\(float16\)'.*is invalid"),
    (leave_out("table"), r"'fc1': table is .*, expected"),
    (corrupt("sums", lambda a: a[1:]), r"'fc1': sums has 49 elements, expected 50; the model is damaged"),
    (corrupt("sums", lambda a: a.astype(np.int64)), r"'tensor\(int64\)'.*is invalid"),
    (leave_out("sums"), r"'fc1': sums is .*, expected"),
    (corrupt("values", lambda a: a[:-1]), r"values has \d+ elements, expected \d+ blocks of 32 weights of 8 bits"),
    (corrupt("values", lambda a: np.append(a, a)), r"values has \d+ elements, expected \d+ blocks of 32 weights of 8"),
    (
        corrupt("values", lambda a: a.astype(np.float32)),
        r"is invalid|values is float32, expected int8 of kernel 'plain'",
    ),
    (corrupt("indices", put(0, 37)), r"indices\[0\] is 37, expected 0 to 36"),
    *(
        (change, sentence)
        for name in ("x_scale", "y_scale")
        for change, sentence in [
            (drop(name), rf"'fc1': attribute '{name}' is missing or no float; the model is damaged"),
            (attribute(name, 1), rf"attribute '{name}' is missing or no float"),
            (
                attribute(name, 0.0),
                rf"attribute '{name}' is 0, expected a positive finite number; the model is damaged",
            ),
            (attribute(name, -0.5), rf"attribute '{name}' is -0.5, expected a positive finite number"),
            (attribute(name, 1e-40), rf"attribute '{name}' is \S+e-4\d, expected a positive finite number"),
            (attribute(name, float("inf")), rf"attribute '{name}' is inf, expected a positive finite number"),
            (attribute(name, float("nan")), rf"attribute '{name}' is -?nan, expected a positive finite number"),
        ]
    ),
    *(
        (change, sentence)
        for name in ("x_zero_point", "y_zero_point")
        for change, sentence in [
            (drop(name), rf"'fc1': attribute '{name}' is missing or no integer; the model is damaged"),
            (attribute(name, 3.0), rf"attribute '{name}' is missing or no integer"),
            (attribute(name, 300), rf"attribute '{name}' is 300, expected 0 to 255; the model is damaged"),
            (attribute(name, -1), rf"attribute '{name}' is -1, expected 0 to 255"),
        ]
    ),
]


@pytest.mark.parametrize(("break_it", "sentence"), DAMAGE, ids=[sentence for _, sentence in DAMAGE])
def test_damage_is_named(library: Library, break_it: Callable[[Any], None], sentence: str) -> None:
    case = make_case(*INTEGERS)
    path = library(case)
    break_it(case)
    with pytest.raises(Exception, match=sentence):
        open_session(case.model(), path)


@pytest.mark.parametrize(
    ("number", "table", "bits"), [(1, 0, 16), (4, 258, 8), (5, 16, 4), (6, 256, 8)], ids=lambda value: str(value)
)
def test_damage_of_products_of_floats(library: Library, number: int, table: int, bits: int) -> None:
    path = library(*every_case())
    count = rf"values has \d+ elements, expected \d+ blocks of 32 weights of {bits} bits"
    changes: list[tuple[str, Callable[[Array], Array], str]] = [
        ("values", lambda a: a[:-1], count),
        ("values", lambda a: np.append(a, a), count),
        ("table", lambda a: a[:-1], f"table has {table - 1} elements, expected {table}"),
    ]
    for name, change, sentence in changes if table else changes[:2]:
        case = every_case()[number]
        corrupt(name, change)(case)  # type: ignore[arg-type]
        with pytest.raises(Exception, match=sentence):
            open_session(case.model(), path)


@pytest.mark.parametrize("name", ["values", "table", "sums"])
def test_constants_must_be_constant(library: Library, name: str) -> None:
    case = make_case(*INTEGERS)
    model = case.model()
    [constant] = [tensor for tensor in model.graph.initializer if tensor.name == f"plain.{name}"]
    model.graph.input.append(helper.make_tensor_value_info(constant.name, constant.data_type, constant.dims))
    with pytest.raises(Exception, match=f"'fc1': {name} is computed or fed, expected an initializer"):
        open_session(model, library(case))


def test_x_of_another_type(library: Library) -> None:
    """With the operators of both types in the library, each kernel takes its own X alone."""
    codes, numbers = make_case("int8", "uint8", name="codes"), make_case("int8", "static", name="numbers")
    path = library(codes, numbers)
    wrong = make_case("int8", "uint8", name="codes")
    wrong.attributes["kernel"] = "numbers"
    with pytest.raises(Exception, match="X is uint8, expected float32 of kernel 'numbers'"):
        open_session(wrong.model(), path).run(None, {"x": codes.x(2)})
    with pytest.raises(Exception, match="is invalid"):
        open_session(codes.model(), library(make_case("int8", "static")))


@pytest.mark.parametrize("y", ["float", "uint8"])
def test_result_of_another_type(library: Library, y: str) -> None:
    """A node whose kernel writes another type than the operator's output has."""
    cases = {name: make_case("int8", "uint8", name, name=name) for name in ("float", "uint8")}
    path = library(*cases.values())
    wrong = cases[y]
    wrong.attributes |= {"kernel": next(name for name in cases if name != y), "y_scale": 1.0, "y_zero_point": 0}
    with pytest.raises(Exception, match=f"'fc1'.*kernel '{wrong.attributes['kernel']}'"):
        open_session(wrong.model(), path)


def test_no_residual_of_codes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'plain': a result of uint8 with a residual"):
        build_library([make_case("int8", "uint8", "uint8", residual=True).kernel], tmp_path / "ops.so")


INT32 = st.integers(-(2**31), 2**31 - 1) | st.integers(-2, 30)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.sampled_from(["indices", "indptr"]), st.integers(0, 60), INT32), min_size=1, max_size=3))
def test_damaged_weights_are_refused_or_harmless(library: Library, changes: list[tuple[str, int, int]]) -> None:
    """Any change of the index arrays is an error, or another matrix whose product is right."""
    case = make_case("int8", "uint8", k=24, n=30)
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
        assert indices is not None and indptr is not None
        # As floats, of which blocks that now lie on each other can be added.
        values, sums = case.matrix.values.astype(np.float32), case.inputs["sums"]
        codes = replace(case.matrix, kind=Floats(), values=values, indices=indices, indptr=indptr).to_dense()
        x = case.x(3)
        exact = x.astype(np.float64) @ codes.T - case.x_grid.zero_point * sums
        right = np.maximum(exact * case.matrix.table[:, 0] * case.x_grid.scale + case.bias, 0)
        np.testing.assert_allclose(session.run(None, {"x": x})[0], right, rtol=1e-5, atol=1e-4)
        return
    assert re.search(r"SparseLinear 'fc1': ind(ices|ptr)\S* (is|ends at) \S+, expected ", refusal)

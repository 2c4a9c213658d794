"""Programs out: what a rewritten graph looks like, that it computes the same, and that the rest leaves as it came."""

from __future__ import annotations

import errno
import io
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from sparsec.compiler.exporter import SparseOp, export, layer_model, save, session_source
from sparsec.compiler.exporter.stream import write_model
from sparsec.compiler.frontend import read
from sparsec.compiler.frontend.activation import FORMULAS
from sparsec.ir import Activation, BlockPattern, Program, SparsecError, SparseMatrix
from sparsec.ir.values.floats import DTYPES, Floats

PATTERN = BlockPattern(2, 2)
ASSETS = Path(__file__).resolve().parents[2].parent / "shared" / "assets" / "models"
RNG = np.random.default_rng(0)


class SparseLinear(OpRun):  # type: ignore[misc]
    """The custom operator by its definition, so that a rewritten model can be run without it."""

    op_domain = "ai.sparsec"

    def _run(self, x: Any, values: Any, indices: Any, indptr: Any, bias: Any, residual: Any = None, **a: Any) -> Any:
        shape = (a["out_features"], a["in_features"])
        pattern, dtype = BlockPattern(a["block_rows"], a["block_cols"]), values.dtype.name
        weight = SparseMatrix(pattern, shape, values, indices, indptr, Floats(dtype), dtype=dtype).to_dense()
        assert all(array is None or array.dtype == x.dtype for array in (values, bias, residual))
        y = x.astype(np.float32) @ weight.T
        y = y if bias is None else y + bias.astype(np.float32)
        with np.errstate(over="ignore"):
            y = FORMULAS[Activation(a["activation"])](y, a["alpha"], a["beta"])
        return (np.asarray(y if residual is None else y + residual.astype(np.float32)).astype(x.dtype),)


def build(
    body: str,
    inputs: str = "float[2,6] x",
    outputs: str = "float[a,b] y",
    opset: int = 17,
    ir: int = 8,
    dtype: str = "float32",
    **constants: Any,
) -> onnx.ModelProto:
    """A model from ONNX text, with those of `constants` that its nodes read as initialisers.

    What is a float in the text and the constants is `dtype` in the model.
    """
    text = f'<ir_version: {ir}, opset_import: ["": {opset}]>\ng ({inputs}) => ({outputs}) {{ {body} }}'
    text = text if dtype == "float32" else text.replace("float[", f"{dtype}[")
    model = onnx.parser.parse_model(text)
    read_by_nodes = {name for node in model.graph.node for name in node.input}
    for name, value in constants.items():
        if name in read_by_nodes:
            array = np.asarray(value)
            array = array.astype(DTYPES[dtype]) if array.dtype in (np.float32, np.float64) else array
            model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


def without_shape(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, its output of any rank."""
    model.graph.output[0].type.tensor_type.ClearField("shape")
    return model


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def sparse(program: Program, *names: str) -> dict[str, SparseOp]:
    """Every layer that can be, or those named, packed."""
    return {
        layer.name: SparseOp(PATTERN.pack(layer.weight, layer.dtype), f"{layer.name}_kernel", 2)
        for layer in program.layers
        if not layer.obstacle and (not names or layer.name in names)
    }


def run(model: onnx_ir.Model | onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    proto = onnx_ir.to_proto(model) if isinstance(model, onnx_ir.Model) else model
    return list(ReferenceEvaluator(proto, new_ops=[SparseLinear]).run(None, feeds))


def run_dense(model: onnx_ir.Model | onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """By ONNX Runtime, or by ONNX's own evaluator in bfloat16, in which ONNX Runtime's CPU provider has no products."""
    proto = onnx_ir.to_proto(model) if isinstance(model, onnx_ir.Model) else model
    if any(array.dtype == DTYPES["bfloat16"] for array in feeds.values()):
        return run(proto, feeds)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def nodes(model: onnx_ir.Model) -> list[str]:
    """One line a node, without attributes."""
    return [
        f"{', '.join(v.name or '' for v in node.outputs)} = {node.op_type}"
        f"({', '.join('' if v is None else v.name or '' for v in node.inputs)})"
        for node in model.graph
    ]


def check_same(model: onnx.ModelProto, **feeds: np.ndarray) -> onnx_ir.Model:
    """Rewrite all layers of `model`; the outputs stay the same and the program untouched. The rewritten model.

    Feeds are rounded to the types of the inputs.
    """
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    feeds = {k: v.astype(onnx.helper.tensor_dtype_to_np_dtype(types[k])) for k, v in feeds.items()}
    program = read(model)
    before = onnx_ir.to_proto(program.model).SerializeToString()
    result = export(program, sparse(program))
    assert onnx_ir.to_proto(program.model).SerializeToString() == before
    assert any(node.op_type == "SparseLinear" for node in result.graph)
    for actual, expected in zip(run(result, feeds), run_dense(model, feeds), strict=True):
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
        assert_close(actual, expected)
    return result


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    """But for a few roundings: ONNX rounds after every node, the sparse operator after the last."""
    tolerances = {"float32": (1e-4, 1e-5), "float16": (4e-3, 4e-3), "bfloat16": (1e-2, 4e-2)}
    relative, absolute = tolerances[expected.dtype.name]
    np.testing.assert_allclose(actual.astype(np.float32), expected.astype(np.float32), relative, absolute)


def test_a_layer_becomes_one_node() -> None:
    """Text in, text out."""
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["": 17]>
        g (float[n,2] x, float[n,2] z) => (float[n,2] y)
        <float[2,2] W = {1, 0, 0, 2}, float[2] b = {5, 6}>
        {
            ["mm"] h = MatMul (x, W)
            a = Add (h, b)
            r = Relu (a)
            y = Add (r, z)
        }""")
    program = read(model)
    ops = {"mm": SparseOp(BlockPattern(1, 1).pack(program.layers[0].weight), "k0", 4)}
    rewritten = onnx.printer.to_text(onnx_ir.to_proto(export(program, ops)))
    expected = """<
   ir_version: 8,
   opset_import: ["" : 17, "ai.sparsec" : 1]
>
g (float[n,2] x, float[n,2] z) => (float[n,2] y)
   <float[2] b =  {5,6}, float[2] "W.values" =  {1,2}, int32[2] "W.indices" =  {0,1}, int32[3] "W.indptr" =  {0,1,2}>
{
   [mm] y = ai.sparsec.SparseLinear <kernel: string = "k0", in_features: int = 2, out_features: int = 2, \
block_rows: int = 1, block_cols: int = 1, threads: int = 4, pattern: string = "block:1x1", sparsity: float = 0.5, \
activation: string = "relu", alpha: float = 0, beta: float = 0> (x, "W.values", "W.indices", "W.indptr", b, z)
}"""
    assert rewritten.split() == expected.split()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_layer_of_16_bits_keeps_its_type(dtype: str) -> None:
    """Text in, text out: the packed values, and what value_info says of the output."""
    model = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["": 17]>
        g ({dtype}[n,2] x) => ({dtype}[n,2] y)
        <{dtype}[2,2] W = {{1, 0, 0, 2}}, {dtype}[2] b = {{5, 6}}, {dtype}[n,2] r>
        {{
            h = MatMul (x, W)
            a = Add (h, b)
            r = Relu (a)
            y = Neg (r)
        }}""")
    program = read(model)
    (layer,) = program.layers
    op = SparseOp(BlockPattern(1, 1).pack(layer.weight, layer.dtype), "k0", 4)
    result = onnx_ir.to_proto(export(program, {layer.name: op}))
    attributes = result.graph.node[0].attribute
    del attributes[:]
    expected = f"""<
   ir_version: 8,
   opset_import: ["" : 17, "ai.sparsec" : 1]
>
g ({dtype}[n,2] x) => ({dtype}[n,2] y)
   <{dtype}[2] b =  {{5,6}}, {dtype}[2] "W.values" =  {{1,2}}, int32[2] "W.indices" =  {{0,1}}, \
int32[3] "W.indptr" =  {{0,1,2}}, {dtype}[n,2] r>
{{
   r = ai.sparsec.SparseLinear (x, "W.values", "W.indices", "W.indptr", b)
   y = Neg (r)
}}"""
    assert onnx.printer.to_text(result).split() == expected.split()


def test_no_bias_is_an_empty_name() -> None:
    model = build("h = MatMul(x, W) y = Add(z, h)", "float[2,6] x, float[2,4] z", W=normal(6, 4))
    result = check_same(model, x=normal(2, 6), z=normal(2, 4))
    assert nodes(result) == ["y = SparseLinear(x, W.values, W.indices, W.indptr, , z)"]
    plain = check_same(build("y = MatMul(x, W)", W=normal(6, 4)), x=normal(2, 6))
    assert nodes(plain) == ["y = SparseLinear(x, W.values, W.indices, W.indptr, )"]


CHAINS = {
    "clip": "h = MatMul(x, W) a = Add(h, b) y = Clip(a, low, high)",
    "leaky relu": "h = MatMul(x, W) y = LeakyRelu<alpha = 0.3>(h)",
    "sigmoid": "h = MatMul(x, W) a = Add(b, h) y = Sigmoid(a)",
    "tanh": "h = MatMul(x, W) y = Tanh(h)",
    "silu and residual": "h = MatMul(x, W) s = Sigmoid(h) m = Mul(h, s) y = Add(m, z)",
    "gelu": "h = MatMul(x, W) d = Div(h, root) e = Erf(d) s = Add(e, one) m = Mul(h, s) y = Mul(m, half)",
    "gelu by tanh": "h = MatMul(x, W) p = Pow(h, three) q = Mul(p, k) a = Add(h, q) t0 = Mul(a, c) t = Tanh(t0)"
    " s = Add(t, one) m = Mul(h, s) y = Mul(m, half)",
}
SCALARS: dict[str, Any] = {
    "low": -0.5,
    "high": 0.5,
    "root": 2**0.5,
    "one": 1.0,
    "half": 0.5,
    "three": 3.0,
    "k": 0.044715,
    "c": 0.79788456,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chain", CHAINS)
def test_chains_compute_the_same(chain: str, dtype: str) -> None:
    feeds = {"x": normal(2, 6), "z": normal(2, 4)}
    inputs = "float[2,6] x, float[2,4] z"
    result = check_same(build(CHAINS[chain], inputs, dtype=dtype, W=normal(6, 4), b=normal(4), **SCALARS), **feeds)
    assert len(result.graph) == 1
    assert not set(result.graph.initializers) & set(SCALARS), "constants of covered nodes go"


@settings(max_examples=60, deadline=None)
@given(
    trans=st.tuples(st.booleans(), st.booleans()),
    alpha=st.sampled_from([1.0, 0.5, -2.0]),
    beta=st.sampled_from([1.0, 0.0, 0.25]),
    c=st.sampled_from([None, "[N]", "[1,N]", "[1]", "[]", "[M,N]", "[M,1]", "variable"]),
    left=st.booleans(),
    sizes=st.tuples(*[st.integers(1, 7)] * 3),
    opset=st.sampled_from([11, 13, 17]),
    dtype=st.sampled_from(["float32", "float16"]),
)
def test_every_form_of_gemm(
    trans: Any, alpha: float, beta: float, c: Any, left: bool, sizes: Any, opset: int, dtype: str
) -> None:
    m, k, n = sizes
    a, b = ((k, m) if trans[0] else (m, k)), ((n, k) if trans[1] else (k, n))
    shapes = {"[N]": (n,), "[1,N]": (1, n), "[1]": (1,), "[]": (), "[M,N]": (m, n), "[M,1]": (m, 1), "variable": (m, n)}
    constants: dict[str, Any] = {"A": normal(*a)} if left else {"B": normal(*b)}
    inputs = f"float[{b[0]},{b[1]}] B" if left else f"float[{a[0]},{a[1]}] A"
    feeds = {"B": normal(*b)} if left else {"A": normal(*a)}
    if c == "variable":
        inputs += f", float[{m},{n}] C"
        feeds["C"] = normal(m, n)
    elif c is not None:
        constants["C"] = normal(*shapes[c])
    arguments = "A, B" if c is None else "A, B, C"
    attributes = f"transA = {trans[0]:d}, transB = {trans[1]:d}, alpha = {alpha}, beta = {beta}"
    model = build(f"y = Gemm<{attributes}>({arguments})", inputs, opset=opset, dtype=dtype, **constants)
    (layer,) = read(model).layers
    if layer.obstacle:
        assert left, "only Gemm with the weight on the left, and C along the rows, has no operator"
        return
    result = check_same(model, **feeds)
    assert len(result.graph) <= 3


@settings(max_examples=40, deadline=None)
@given(
    leading=st.lists(st.integers(1, 3), max_size=3),
    left=st.booleans(),
    sizes=st.tuples(*[st.integers(1, 6)] * 3),
    bias=st.booleans(),
)
def test_every_form_of_matmul(leading: list[int], left: bool, sizes: tuple[int, int, int], bias: bool) -> None:
    m, k, n = sizes
    shape = [*leading, k, n] if left else [*leading, k]
    body = f"h = MatMul({'W, x' if left else 'x, W'}) {'a = Add(h, b)' if bias else 'a = Identity(h)'} y = Relu(a)"
    constants: dict[str, Any] = {"W": normal(m, k) if left else normal(k, n)}
    if bias:
        constants["b"] = normal(m, 1) if left else normal(n)
    model = build(body, f"float[{','.join(map(str, shape))}] x", "float y", **constants)
    result = check_same(without_shape(model), x=normal(*shape))
    assert [node.op_type for node in result.graph if node.op_type != "Identity"] == (
        ["Transpose", "SparseLinear", "Transpose"] if left else ["SparseLinear"]
    )


def test_the_output_keeps_its_name_as_a_graph_output() -> None:
    body = '["first"] h = MatMul(x, W) ["second"] y = MatMul(h, V)'
    model = build(body, "float[2,6] x", "float[a,b] y, float[a,b] h", W=normal(6, 4), V=normal(4, 3))
    result = check_same(model, x=normal(2, 6))
    assert [node.name for node in result.graph] == ["first", "second"]
    assert [value.name for value in result.graph.outputs] == ["y", "h"]


def test_transposes_get_names_of_their_own() -> None:
    body = '["mm/Transpose"] t = Neg(x) ["mm"] y = MatMul(W, t)'
    result = check_same(build(body, "float[6,2] x", W=normal(4, 6)), x=normal(6, 2))
    assert [node.name for node in result.graph] == ["mm/Transpose", "mm/Transpose_2", "mm", "mm/Transpose_3"]
    assert nodes(result)[1:] == [
        "t.transposed = Transpose(t)",
        "y.transposed = SparseLinear(t.transposed, W.values, W.indices, W.indptr, )",
        "y = Transpose(y.transposed)",
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_gemm_scales_a_variable_c_beforehand(dtype: str) -> None:
    model = build("y = Gemm<beta = 0.5>(x, W, C)", "float[2,6] x, float[2,4] C", dtype=dtype, W=normal(6, 4))
    result = check_same(model, x=normal(2, 6), C=normal(2, 4))
    assert nodes(result) == [
        "C.scaled = Mul(C, C.beta)",
        "y = SparseLinear(x, W.values, W.indices, W.indptr, , C.scaled)",
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_that_was_folded_is_a_new_initialiser(dtype: str) -> None:
    model = build("y = Gemm<beta = 2.0>(x, W, C)", dtype=dtype, W=normal(6, 4), C=normal(4))
    assert "W.bias" in check_same(model, x=normal(2, 6)).graph.initializers


def test_names_that_are_taken_are_left_to_their_owners() -> None:
    body = '["mm"] h = MatMul(x, W) "W.values" = Neg(h) y = Relu("W.values")'
    result = check_same(build(body, W=normal(6, 4)), x=normal(2, 6))
    assert "W.values_2" in result.graph.initializers


def test_what_others_still_use_stays() -> None:
    """A weight with another user, a constant that was unused before, an input that only became unused."""
    body = "h = MatMul(x, W) w = ReduceSum<keepdims = 0>(W) y = Add(h, w)"
    model = build(body, "float[2,6] x, float[2,4] unused_input", W=normal(6, 4))
    model.graph.initializer.append(onnx.numpy_helper.from_array(normal(3), "unused"))
    result = check_same(model, x=normal(2, 6), unused_input=normal(2, 4))
    assert {"W", "unused"} <= set(result.graph.initializers)
    assert [value.name for value in result.graph.inputs] == ["x", "unused_input"]


def test_constant_ancestors_go_with_the_weight() -> None:
    model = build("t = Transpose(W) i = Identity(t) y = MatMul(x, i)", W=normal(4, 6))
    result = check_same(model, x=normal(2, 6))
    assert nodes(result) == ["y = SparseLinear(x, i.values, i.indices, i.indptr, )"]


def test_a_weight_used_in_a_subgraph_stays() -> None:
    body = """
        h = MatMul(x, W)
        y = If(flag) <
            then_branch = t () => (float[m,n] p) { p = MatMul(x, W) },
            else_branch = e () => (float[m,n] q) { q = Neg(h) }
        >
    """
    model = build(body, "float[2,6] x, bool flag", W=normal(6, 4))
    result = check_same(model, x=normal(2, 6), flag=np.array(False))
    assert "W" in result.graph.initializers
    assert nodes(result)[1] == "y = If(flag)"


def test_layers_that_share_a_matrix_share_its_initialisers() -> None:
    model = build("a = MatMul(x, W) b = MatMul(z, W) y = Sub(a, b)", "float[2,6] x, float[2,6] z", W=normal(6, 4))
    program = read(model)
    op = SparseOp(PATTERN.pack(program.layers[0].weight), "k", 0)
    result = export(program, {"a": op, "b": op})
    assert sorted(result.graph.initializers) == ["W.indices", "W.indptr", "W.values"]


def test_ir_3_lists_initialisers_as_inputs() -> None:
    model = build("y = MatMul(x, W)", "float[2,6] x, float[6,4] W", opset=8, ir=3, W=normal(6, 4))
    result = check_same(model, x=normal(2, 6))
    assert [value.name for value in result.graph.inputs] == ["x", "W.values", "W.indices", "W.indptr"]


def test_metadata_goes_with_the_node() -> None:
    model = build("h = MatMul(x, W) y = Relu(h)", W=normal(6, 4))
    model.graph.node[0].doc_string = "what it does"
    model.graph.node[0].metadata_props.add(key="source", value="encoder.py:12")
    model.metadata_props.add(key="licence", value="MIT")
    model.producer_name = "someone"
    proto = onnx_ir.to_proto(check_same(model, x=normal(2, 6)))
    node = proto.graph.node[0]
    assert (node.doc_string, node.metadata_props[0].value) == ("what it does", "encoder.py:12")
    assert (proto.producer_name, proto.metadata_props[0].value) == ("someone", "MIT")


def test_only_the_named_layers_change() -> None:
    program = read(build('["a"] h = MatMul(x, W) ["b"] y = MatMul(h, V)', W=normal(6, 4), V=normal(4, 3)))
    assert nodes(export(program, sparse(program, "b")))[0] == "h = MatMul(x, W)"


def test_impossible_requests_are_refused() -> None:
    program = read(build('["a"] y = MatMul(x, W)', W=normal(6, 4)))
    op = sparse(program)["a"]
    with pytest.raises(ValueError, match="'nobody' is no layer"):
        export(program, {"nobody": op})
    with pytest.raises(ValueError, match="cannot be sparse and have a new dense weight"):
        export(program, {"a": op}, {"a": program.layers[0].weight})
    with pytest.raises(ValueError, match=r"shape \(3, 3\), expected \(4, 6\)"):
        export(program, {}, {"a": np.zeros((3, 3), np.float32)})
    half = read(build("y = MatMul(x, W)", dtype="float16", W=normal(6, 4)))
    with pytest.raises(ValueError, match="layer 'y': float32 values, expected float16"):
        export(half, {"y": op})
    integers = read(build("y = MatMul(x, W)", "int32[2,6] x", "int32[a,b] y", W=np.ones((6, 4), np.int32)))
    with pytest.raises(ValueError, match="int32 weights; no sparse operator yet"):
        export(integers, {"y": op})


DENSE = {
    "matmul": ("y = MatMul(x, W)", "2,6", (6, 4)),
    "matmul, left": ("y = MatMul(W, x)", "6,2", (4, 6)),
    "gemm": ("y = Gemm<alpha = 0.5>(x, W)", "2,6", (6, 4)),
    "gemm, transposed": ("y = Gemm<transB = 1>(x, W)", "2,6", (4, 6)),
    "gemm, left": ("y = Gemm<transA = 1>(W, x)", "6,2", (6, 4)),
    "stack": ("y = MatMul(x, W)", "3,2,6", (3, 6, 4)),
    "conv": ("y = Conv<group = 2>(x, W)", "1,4,5,5", (6, 2, 3, 3)),
    "transposed conv": ("y = ConvTranspose<group = 2>(x, W)", "1,4,5,5", (4, 3, 2, 3)),
}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("form", DENSE)
def test_new_dense_weights_of_16_bits_are_exact(form: str, dtype: str) -> None:
    body, x, shape = DENSE[form]
    program = read(without_shape(build(body, f"float[{x}] x", "float[a] y", dtype=dtype, W=normal(*shape))))
    (layer,) = program.layers
    assert layer.dtype == dtype
    mask = RNG.random(layer.weight.shape) < 0.5
    pruned = read(onnx_ir.to_proto(export(program, {}, {"y": layer.weight * mask})))
    np.testing.assert_array_equal(pruned.layers[0].weight, layer.weight * mask)
    assert pruned.layers[0].dtype == dtype


@pytest.mark.parametrize("form", DENSE)
def test_new_dense_weights_lie_as_the_old_ones_did(form: str) -> None:
    """`Layer.weight` written back is the weight that came; a masked one is zero where the mask is."""
    body, x, shape = DENSE[form]
    program = read(without_shape(build(body, f"float[{x}] x", "float y", W=normal(*shape))))
    (layer,) = program.layers
    old = program.model.graph.initializers["W"].const_value
    same = export(program, {}, {"y": layer.weight}).graph.initializers["W"].const_value
    assert old is not None
    assert same is not None
    np.testing.assert_allclose(same.numpy(), old.numpy(), rtol=1e-6)
    mask = RNG.random(layer.weight.shape) < 0.5
    pruned = export(program, {}, {"y": layer.weight * mask})
    np.testing.assert_allclose(read(onnx_ir.to_proto(pruned)).layers[0].weight, layer.weight * mask, rtol=1e-6)
    assert nodes(pruned) == nodes(program.model)


def test_new_dense_weights_of_other_types_keep_them() -> None:
    model = build("y = MatMul(x, W)", "int32[2,6] x", "int32[a,b] y", W=normal(6, 4).astype(np.int32))
    program = read(model)
    result = export(program, {}, {"y": program.layers[0].weight * 0})
    weight = result.graph.initializers["W"].const_value
    assert weight is not None
    assert weight.dtype == onnx_ir.DataType.INT32
    assert not weight.numpy().any()


def test_recurrent_weights_can_be_replaced() -> None:
    constants: dict[str, Any] = {"V": normal(1, 16, 3), "R": normal(1, 16, 4)}
    program = read(build("y = LSTM<hidden_size = 4>(x, V, R)", "float[5,1,3] x", "float[a,b,c,d] y", **constants))
    result = export(program, {}, {"y": program.layers[0].weight * 0}).graph.initializers["V"].const_value
    assert result is not None
    assert result.shape == (1, 16, 3)
    assert not result.numpy().any()


def test_a_shared_or_computed_weight_is_replaced_for_its_node_only() -> None:
    shared = build("a = MatMul(x, W) b = Neg(W) c = MatMul(x, b) y = Add(a, c)", W=normal(6, 4))
    program = read(shared)
    result = export(program, {}, {"a": program.layers[0].weight * 0})
    assert nodes(result)[0] == "a = MatMul(x, W.pruned)"
    assert "W" in result.graph.initializers
    computed = build("t = Transpose(W) y = MatMul(x, t)", W=normal(4, 6))
    program = read(computed)
    result = export(program, {}, {"y": program.layers[0].weight * 2})
    assert (nodes(result), list(result.graph.initializers)) == (["y = MatMul(x, t.pruned)"], ["t.pruned"])
    feeds = {"x": normal(2, 6)}
    np.testing.assert_allclose(run_dense(result, feeds)[0], 2 * run_dense(computed, feeds)[0], rtol=1e-5)


XZ = "float[2,6] x0, float[2,4] z"
LAYERS = {
    "everything": ("h = MatMul(x, W) a = Add(h, b) r = Relu(a) y = Add(r, z)", XZ, (6, 4), (3,)),
    "rank 3": ("h = MatMul(x, W) a = Add(h, b) y = Tanh(a)", "float[2,5,6] x0", (6, 4), (2, 3)),
    "left": ("y = MatMul(W, x)", "float[2,6,5] x0", (4, 6), (2, 3)),
    "gemm": ("y = Gemm<transA = 1, beta = 0.5>(x, W, z)", "float[6,2] x0, float[2,4] z", (6, 4), (3,)),
    "computed": ("t = Transpose(W) y = MatMul(x, t)", "float[2,6] x0", (4, 6), (3,)),
    "x is the residual": ("h = MatMul(x, W) y = Add(h, x)", "float[2,6] x0", (6, 6), (3,)),
    "c counts nothing": ("y = Gemm<beta = 0.0>(x, W, z)", XZ, (6, 4), (3,)),
    "c is constant": ("y = Gemm(x, W, C)", "float[3,6] x0", (6, 4), (3,)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", LAYERS)
def test_one_layer_as_a_model(form: str, dtype: str) -> None:
    """Dense and sparse forms take the same inputs and give the same output, at any number of rows."""
    body, inputs, shape, rows = LAYERS[form]
    constants: dict[str, Any] = {"W": normal(*shape), "b": normal(4), "C": normal(3, 4)}
    model = build(f"x = Neg(x0) {body} after = Neg(y)", inputs, "float[a] after", dtype=dtype, **constants)
    program = read(without_shape(model))
    (layer,) = program.layers
    dense = layer_model(program, layer, rows[0] if len(rows) == 1 else rows)
    packed = layer_model(program, layer, rows, SparseOp(PATTERN.pack(layer.weight, layer.dtype), "k", 1))
    feeds = {}
    for value, other in zip(dense.graph.inputs, packed.graph.inputs, strict=True):
        assert (value.name, value.shape, value.dtype) == (other.name, other.shape, other.dtype)
        assert value.shape is not None
        feeds[value.name or ""] = normal(*value.shape.numpy()).astype(DTYPES[dtype])
    assert dense.graph.outputs[0].shape == packed.graph.outputs[0].shape
    (expected,), (actual,) = run_dense(dense, feeds), run(packed, feeds)
    assert dense.graph.outputs[0].dtype == onnx_ir.DataType.from_numpy(DTYPES[dtype])
    assert_close(actual, expected)
    assert expected.shape == tuple(dense.graph.outputs[0].shape or ())


def test_one_layer_as_a_model_with_another_weight() -> None:
    program = read(build("y = MatMul(x, W)", W=normal(6, 4)))
    (layer,) = program.layers
    model = layer_model(program, layer, 3, weight=layer.weight * 0)
    assert not run_dense(model, {"x": normal(3, 6)})[0].any()
    conv = read(build("y = Conv(x, W)", "float[1,2,5,5] x", "float[a,b,c,d] y", W=normal(3, 2, 3, 3)))
    with pytest.raises(ValueError, match="is conv: a model of one layer needs a linear one"):
        layer_model(conv, conv.layers[0], 1)


def normalised(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Without what says nothing: empty fields, types of values that are gone or described twice, their order."""

    def clear(message: Any) -> None:
        for descriptor, value in message.ListFields():
            if descriptor.type == descriptor.TYPE_MESSAGE:
                for child in value if descriptor.is_repeated else [value]:
                    clear(child)
                if descriptor.name == "type" and not value.ListFields():
                    message.ClearField("type")
            elif descriptor.type in (descriptor.TYPE_STRING, descriptor.TYPE_BYTES) and not len(value):
                message.ClearField(descriptor.name)

    copy = onnx.ModelProto.FromString(proto.SerializeToString())
    clear(copy)
    known = {name for node in copy.graph.node for name in node.output} | {t.name for t in copy.graph.initializer}
    known -= {value.name for value in copy.graph.output}
    infos = sorted((info for info in copy.graph.value_info if info.name in known), key=lambda info: info.name)
    del copy.graph.value_info[:]
    copy.graph.value_info.extend(infos)
    return copy


@pytest.mark.skipif(not ASSETS.is_dir(), reason="the models of ../shared/assets are not on this machine")
@pytest.mark.parametrize("file", sorted(ASSETS.glob("*.onnx")), ids=lambda path: path.stem)
def test_real_models_leave_as_they_came(file: Path) -> None:
    program = read(file)
    result = export(program, {})
    proto = onnx_ir.to_proto(result)
    written = io.BytesIO()
    write_model(result, written)
    assert written.getvalue() == proto.SerializeToString() == onnx_ir.to_proto(program.model).SerializeToString()
    assert normalised(proto) == normalised(onnx.load(file, load_external_data=False))


def test_every_onnx_node_test_leaves_as_it_came() -> None:
    """1,884 models, one for each case of each operator: sequences, optionals, strings and functions among them."""
    loader = pytest.importorskip("onnx.backend.test.loader")
    with np.errstate(all="ignore"):
        cases = loader.load_model_tests(kind="node")
    refused = []
    for case in cases:
        try:
            program = read(case.model)
        except SparsecError as error:
            refused.append(f"{case.name}: {error}")
            continue
        assert normalised(onnx_ir.to_proto(export(program, {}))) == normalised(case.model), case.name
    assert len(cases) - len(refused) > 1000
    # What ONNX Runtime does not open either.
    assert all("newer than onnxruntime" in words for words in refused), refused


def test_functions_and_subgraphs_leave_as_they_came() -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["": 17, "local": 1], metadata_props: ["k": "v"]>
        g (float[2,6] x, bool flag) => (float[a,b] y) <float[2] dead = {1, 2}>
        {
            h = MatMul(x, W)
            f = local.twice(h)
            y = If(flag) < then_branch = t () => (float[m,n] p) { p = Add(f, f) },
                           else_branch = e () => (float[m,n] q) { q = Neg(h) } >
        }
        <domain: "local", opset_import: ["": 17]> twice (v) => (w) { w = Add(v, v) }""")
    model.graph.initializer.append(onnx.numpy_helper.from_array(normal(6, 4), "W"))
    program = read(model)
    rewritten = normalised(onnx_ir.to_proto(export(program, sparse(program))))
    assert rewritten.functions == normalised(model).functions
    assert rewritten.graph.node[1:] == normalised(model).graph.node[1:]
    assert "dead" in {tensor.name for tensor in rewritten.graph.initializer}


def test_saving_is_deterministic_and_inline(tmp_path: Path) -> None:
    model = build("y = MatMul(x, W)", W=normal(6, 4))
    for name in ("a", "b"):
        program = read(model)
        save(export(program, sparse(program)), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
    assert (tmp_path / "a").read_bytes() == onnx_ir.to_proto(export(program, sparse(program))).SerializeToString()


def test_saving_what_is_too_large_for_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsec.compiler.exporter.files.INLINE_LIMIT", 1000)
    weight = normal(64, 64)
    model = export(read(build("y = MatMul(x, W)", "float[2,64] x", W=weight)), {})
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        save(model, tmp_path / folder / "model.onnx")
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"model.onnx", "model.onnx.data"}
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    loaded = read(tmp_path / "a" / "model.onnx")
    np.testing.assert_array_equal(loaded.layers[0].weight, weight.T)
    assert model.graph.initializers["W"].const_value is not None, "saving leaves the model as it was"


def test_external_data_stays_external_and_may_move(tmp_path: Path) -> None:
    weight = normal(64, 64)
    for folder in ("in", "out"):
        (tmp_path / folder).mkdir()
    model = build("y = MatMul(x, W)", "float[2,64] x", W=weight)
    onnx.save_model(model, tmp_path / "in" / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    program = read(tmp_path / "in" / "m.onnx")
    save(export(program, {}), tmp_path / "out" / "model.onnx")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.onnx", "model.onnx.data"}
    feeds = {"x": normal(2, 64)}
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, feeds)[0], feeds["x"] @ weight, rtol=1e-4, atol=1e-5)


def test_external_data_of_constant_nodes_moves_into_the_file(tmp_path: Path) -> None:
    value = onnx.numpy_helper.from_array(normal(2, 64), "c")
    model = build("y = Add(x, c)", "float[2,64] x")
    model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["c"], value=value))
    onnx.save_model(
        model,
        tmp_path / "m.onnx",
        save_as_external_data=True,
        location="c.bin",
        size_threshold=0,
        convert_attribute=True,
    )
    (tmp_path / "out").mkdir()
    save(export(read(tmp_path / "m.onnx"), {}), tmp_path / "out" / "model.onnx")
    (tmp_path / "c.bin").unlink()
    loaded = onnx.load(tmp_path / "out" / "model.onnx")
    np.testing.assert_array_equal(
        onnx.numpy_helper.to_array(loaded.graph.node[0].attribute[0].t), onnx.numpy_helper.to_array(value)
    )


def test_sources_for_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = export(read(build("y = MatMul(x, W)", "float[2,64] x", W=normal(64, 64))), {})
    assert isinstance(session_source(model, tmp_path), bytes)
    monkeypatch.setattr("sparsec.compiler.exporter.files.SESSION_LIMIT", 1000)
    sources = [session_source(model, tmp_path) for _ in range(2)]
    assert sources[0] != sources[1], "the first may still be mapped by a session"
    for source in sources:
        onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = export(read(build("y = MatMul(x, W)", W=normal(6, 4))), {})
    with pytest.raises(SparsecError, match=r"nowhere.* cannot be written \(No such file or directory\)"):
        save(model, tmp_path / "nowhere" / "model.onnx")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sparsec.compiler.exporter.files.write_model", full)
    with pytest.raises(SparsecError, match="No space left on device"):
        save(model, tmp_path / "model.onnx")

"""Graphs in, layers out: what is found, what is fused, what must not be, and that a layer computes what it covers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from sparsec.compiler.frontend import read
from sparsec.ir import Activation, Layer, SparsecError
from sparsec.ir.values.floats import DTYPES

if TYPE_CHECKING:
    from collections.abc import Callable

RNG = np.random.default_rng(0)
CONSTANTS = {
    "W": RNG.standard_normal((3, 4)),
    "W2": RNG.standard_normal((3, 4)),
    "b": RNG.standard_normal(4),
    "b2": RNG.standard_normal((1, 4)),
    "b3": RNG.standard_normal((1, 1, 4)),
    "full": RNG.standard_normal((2, 4)),
    "one_b": np.array([0.3]),
    "zero": np.array(0.0),
    "half": np.array(0.5),
    "half1": np.array([0.5]),
    "one": np.array(1.0),
    "three": np.array(3.0),
    "six": np.array(6.0),
    "rough": np.array(1.4),
    "sqrt2": np.array(math.sqrt(2)),
    "rsqrt2": np.array(1 / math.sqrt(2)),
    "k": np.array(0.044715),
    "c": np.array(math.sqrt(2 / math.pi)),
    "quick": np.array(1.702),
    "slope": np.array([0.2]),
}
X = "float[2,3] x"


def build(
    body: str,
    inputs: str = X,
    outputs: str = "float[a,b] y",
    opset: int = 17,
    ir: int = 8,
    more: str = "",
    dtype: str = "float32",
) -> onnx.ModelProto:
    """A model from ONNX text, with those of `CONSTANTS` that it names as initialisers; "float" in it means `dtype`."""
    text = (
        f'<ir_version: {ir}, opset_import: ["": {opset}, "com.microsoft": 1, "local": 1]>\ng ({inputs}) => ({outputs})'
    )
    text = text if dtype == "float32" else text.replace("float[", f"{dtype}[")
    model = onnx.parser.parse_model(f"{text} {{ {body} }} {more}")
    used = {name for node in model.graph.node for name in node.input} | set(outputs.split())
    for name, value in CONSTANTS.items():
        if name in used or f"({name}" in body or f", {name}" in body:
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value, DTYPES[dtype]), name))
    return model


def layers_of(model: onnx.ModelProto) -> tuple[Layer, ...]:
    return read(model.SerializeToString()).layers


def describe(layer: Layer) -> str:
    """A layer as one line: `y = relu(x W + b) + r`, where T turns a matrix."""
    x = f"{layer.x.name}{'.T' if layer.transpose_x else ''}"
    product = f"{x} W" + (" + b" if layer.bias is not None else "")
    name = layer.epilogue.activation.value
    parameters = f"{layer.epilogue.alpha:.4g} {layer.epilogue.beta:.4g}"
    inner = {"none": product, "clip": f"clip[{parameters}]({product})"}.get(name, f"{name}({product})")
    if name in ("leaky_relu", "silu"):
        inner = f"{name}[{layer.epilogue.alpha:.4g}]({product})"
    inner = f"({inner}).T" if layer.transpose_y else inner
    residual = f" + {layer.residual.name}" if layer.residual is not None else ""
    return f"{layer.nodes[-1].outputs[0].name} = {inner}{residual}" + (f" ! {layer.obstacle}" if layer.obstacle else "")


def described(model: onnx.ModelProto) -> str:
    return "; ".join(describe(layer) for layer in layers_of(model))


ERF_FORMS = {
    "torch": "d = Div(h, sqrt2) e = Erf(d) s = Add(e, one) m = Mul(h, s) y = Mul(m, half)",
    "half inside": "d = Mul(h, rsqrt2) e = Erf(d) s = Add(one, e) p = Mul(half, s) y = Mul(h, p)",
    "half first": "q = Mul(h, half) d = Div(h, sqrt2) e = Erf(d) s = Add(e, one) y = Mul(q, s)",
    "scalar of one axis": "d = Div(h, sqrt2) e = Erf(d) s = Add(e, one) m = Mul(s, h) y = Mul(half1, m)",
}
TANH_FORMS = {
    "pow": "p = Pow(h, three) q = Mul(k, p) a = Add(h, q) t0 = Mul(a, c) t = Tanh(t0) s = Add(t, one) m = Mul(h, s)"
    " y = Mul(m, half)",
    "products": "p0 = Mul(h, h) p = Mul(p0, h) q = Mul(p, k) a = Add(q, h) t0 = Mul(c, a) t = Tanh(t0) s = Add(one, t)"
    " m = Mul(half, s) y = Mul(m, h)",
    "factored": "p = Mul(h, h) q = Mul(p, k) a = Add(q, one) u = Mul(h, c) t0 = Mul(u, a) t = Tanh(t0) s = Add(t, one)"
    " m = Mul(h, half) y = Mul(m, s)",
}
FUSED = {
    "nothing": ("y = MatMul(x, W)", "y = x W"),
    "bias": ("h = MatMul(x, W) y = Add(h, b)", "y = x W + b"),
    "bias first": ("h = MatMul(x, W) y = Add(b, h)", "y = x W + b"),
    "bias of two axes": ("h = MatMul(x, W) y = Add(h, b2)", "y = x W + b"),
    "bias for all": ("h = MatMul(x, W) y = Add(h, one_b)", "y = x W + b"),
    "bias behind Identity": ("h = MatMul(x, W) i = Identity(b) y = Add(h, i)", "y = x W + b"),
    "relu": ("h = MatMul(x, W) y = Relu(h)", "y = relu(x W)"),
    "bias, relu": ("h = MatMul(x, W) a = Add(h, b) y = Relu(a)", "y = relu(x W + b)"),
    "clip": ("h = MatMul(x, W) y = Clip(h, zero, six)", "y = clip[0 6](x W)"),
    "clip below": ("h = MatMul(x, W) y = Clip(h, half)", "y = clip[0.5 inf](x W)"),
    "clip above": ("h = MatMul(x, W) y = Clip(h, , half)", "y = clip[-inf 0.5](x W)"),
    "clip is relu": ("h = MatMul(x, W) y = Clip(h, zero)", "y = relu(x W)"),
    "min max": ("h = MatMul(x, W) m = Max(h, zero) y = Min(six, m)", "y = clip[0 6](x W)"),
    "relu, min": ("h = MatMul(x, W) m = Relu(h) y = Min(m, six)", "y = clip[0 6](x W)"),
    "leaky": ("h = MatMul(x, W) y = LeakyRelu<alpha = 0.3>(h)", "y = leaky_relu[0.3](x W)"),
    "leaky default": ("h = MatMul(x, W) y = LeakyRelu(h)", "y = leaky_relu[0.01](x W)"),
    "prelu of one slope": ("h = MatMul(x, W) y = PRelu(h, slope)", "y = leaky_relu[0.2](x W)"),
    "sigmoid": ("h = MatMul(x, W) y = Sigmoid(h)", "y = sigmoid(x W)"),
    "tanh": ("h = MatMul(x, W) y = Tanh(h)", "y = tanh(x W)"),
    "silu": ("h = MatMul(x, W) s = Sigmoid(h) y = Mul(h, s)", "y = silu[1](x W)"),
    "silu other order": ("h = MatMul(x, W) s = Sigmoid(h) y = Mul(s, h)", "y = silu[1](x W)"),
    "quick gelu": ("h = MatMul(x, W) q = Mul(h, quick) s = Sigmoid(q) y = Mul(h, s)", "y = silu[1.702](x W)"),
    "microsoft gelu": ("h = MatMul(x, W) y = com.microsoft.Gelu(h)", "y = gelu(x W)"),
    "microsoft fast gelu": ("h = MatMul(x, W) y = com.microsoft.FastGelu(h)", "y = gelu_tanh(x W)"),
    "microsoft quick gelu": ("h = MatMul(x, W) y = com.microsoft.QuickGelu(h)", "y = silu[1.702](x W)"),
    "residual": ("h = MatMul(x, W) r = Neg(z) y = Add(h, r)", "y = x W + r"),
    "residual first": ("h = MatMul(x, W) y = Add(z, h)", "y = x W + z"),
    "everything": ("h = MatMul(x, W) a = Add(h, b) n = Relu(a) y = Add(n, z)", "y = relu(x W + b) + z"),
    "relu after residual": ("h = MatMul(x, W) a = Add(h, z) y = Relu(a)", "a = x W + z"),
    "two layers added": ("h = MatMul(x, W) i = MatMul(x, W2) y = Add(h, i)", "y = x W + i; i = x W"),
    **{f"gelu {k}": (f"h = MatMul(x, W) {v}", "y = gelu(x W)") for k, v in ERF_FORMS.items()},
    **{f"gelu {k}": (f"h = MatMul(x, W) {v}", "y = gelu_tanh(x W)") for k, v in TANH_FORMS.items()},
}
NOT_FUSED = {
    "intermediate used twice": ("h = MatMul(x, W) a = Add(h, b) n = Neg(h) y = Add(a, n)", "h = x W"),
    "bias is not constant": ("h = MatMul(x, W) y = Add(h, v)", "y = x W + v"),
    "bias widens the result": ("h = MatMul(x, W) q = Add(h, b3) y = Squeeze(q)", "h = x W"),
    "constant for each row": ("h = MatMul(x, W) y = Add(h, full)", "h = x W"),
    "added to itself": ("h = MatMul(x, W) y = Add(h, h)", "h = x W"),
    "residual from the layer itself": ("h = MatMul(x, W) n = Neg(h) r = Exp(n) y = Add(h, r)", "h = x W"),
    "bounds are not constant": ("h = MatMul(x, W) m = ReduceMax<keepdims = 0>(z) y = Clip(h, m)", "h = x W"),
    "slope for each output": ("h = MatMul(x, W) y = PRelu(h, b)", "h = x W"),
    "almost gelu": (
        "h = MatMul(x, W) d = Div(h, rough) e = Erf(d) s = Add(e, one) m = Mul(h, s) y = Mul(m, half)",
        "h = x W",
    ),
    "gelu of something else": (
        "h = MatMul(x, W) d = Div(z, sqrt2) e = Erf(d) s = Add(e, one) m = Mul(h, s) y = Mul(m, half)",
        "h = x W",
    ),
    "not an activation": ("h = MatMul(x, W) y = Exp(h)", "h = x W"),
    "part of gelu seen outside": (
        "h = MatMul(x, W) d = Div(h, sqrt2) e = Erf(d) s = Add(e, one) m = Mul(h, s) g = Mul(m, half) y = Add(g, e)",
        "h = x W",
    ),
}
INPUTS = f"{X}, float[2,4] z, float[1,4] v"


def formula(activation: Activation, a: float, b: float, x: np.ndarray) -> np.ndarray:
    """The activations once more, in float64 and independently of the code under test."""
    erf = np.vectorize(math.erf)
    formulas: dict[Activation, Callable[[], np.ndarray]] = {
        Activation.NONE: lambda: x,
        Activation.RELU: lambda: np.where(x > 0, x, 0),
        Activation.LEAKY_RELU: lambda: np.where(x > 0, x, a * x),
        Activation.CLIP: lambda: np.clip(x, a, b),
        Activation.SIGMOID: lambda: 0.5 + np.tanh(x / 2) / 2,
        Activation.TANH: lambda: np.tanh(x),
        Activation.GELU: lambda: x / 2 * (1 + erf(x * math.sqrt(0.5))),
        Activation.GELU_TANH: lambda: x / 2 * (1 + np.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))),
        Activation.SILU: lambda: x * (0.5 + np.tanh(a * x / 2) / 2),
    }
    return formulas[activation]()


def compute(layer: Layer, values: dict[str, np.ndarray]) -> np.ndarray:
    """What `Layer` says that it computes."""
    x = values[str(layer.x.name)].astype(np.float64)
    y = (np.swapaxes(x, -1, -2) if layer.transpose_x else x) @ layer.weight.T.astype(np.float64)
    y = y if layer.bias is None else y + layer.bias
    y = formula(layer.epilogue.activation, layer.epilogue.alpha, layer.epilogue.beta, y)
    y = np.swapaxes(y, -1, -2) if layer.transpose_y else y
    return y if layer.residual is None else y + values[str(layer.residual.name)].astype(np.float64)


def check_values(model: onnx.ModelProto, feeds: dict[str, np.ndarray], dtype: str = "float32") -> None:
    """Every layer, computed by its description, equals what ONNX computes there."""
    program = read(model.SerializeToString())
    wanted = {
        str(v.name) for layer in program.layers for v in (layer.x, layer.residual, layer.nodes[-1].outputs[0]) if v
    }
    shown = onnx.ModelProto.FromString(model.SerializeToString())
    known = {value.name for value in shown.graph.output}
    produced = {name for node in shown.graph.node for name in node.output}
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(wanted & produced - known))
    names = [output.name for output in shown.graph.output]
    values = {k: np.asarray(onnx.numpy_helper.to_array(t)) for t in shown.graph.initializer for k in [t.name]}
    values |= feeds | dict(zip(names, run(shown, feeds, dtype), strict=True))
    # Rounding: a few times that of a result, which ONNX rounds after every node and a layer after its last.
    relative, absolute = {"float32": (1e-4, 1e-5), "float16": (4e-3, 4e-3), "bfloat16": (1e-2, 4e-2)}[dtype]
    for layer in program.layers:
        if not layer.obstacle:
            expected = values[str(layer.nodes[-1].outputs[0].name)].astype(np.float64)
            actual = compute(layer, values)
            np.testing.assert_allclose(actual, expected, rtol=relative, atol=absolute, err_msg=layer.name)


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray], dtype: str) -> list[np.ndarray]:
    """The outputs by ONNX Runtime, which computes nothing in bfloat16, or by ONNX's own evaluator."""
    if dtype == "bfloat16":
        return list(ReferenceEvaluator(model).run(None, feeds))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def random_feeds(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    fixed = {tensor.name for tensor in model.graph.initializer}
    return {
        value.name: rng.standard_normal([d.dim_value or 2 for d in value.type.tensor_type.shape.dim]).astype(np.float32)
        for value in model.graph.input
        if value.name not in fixed
    }


@pytest.mark.parametrize("form", FUSED)
def test_fused(form: str) -> None:
    body, expected = FUSED[form]
    model = build(body, INPUTS)
    assert described(model) == expected
    check_values(model, random_feeds(model))


HALVES = ["float16", "bfloat16"]
# PRelu's slope of 0.2 as it is in eight bits.
ROUNDED = {("prelu of one slope", "bfloat16"): "y = leaky_relu[0.2002](x W)"}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("form", FUSED)
def test_fused_in_16_bits(form: str, dtype: str) -> None:
    """Gelu too, though its constants are rounded so far that one of its forms is as near as the other."""
    body, expected = FUSED[form]
    model = build(body, INPUTS, dtype=dtype)
    assert described(model) == ROUNDED.get((form, dtype), expected)
    assert {layer.dtype for layer in layers_of(model)} == {dtype}
    if "microsoft" not in form or dtype == "float16":
        check_values(model, {name: x.astype(DTYPES[dtype]) for name, x in random_feeds(model).items()}, dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("form", NOT_FUSED)
def test_not_fused_in_16_bits(form: str, dtype: str) -> None:
    body, expected = NOT_FUSED[form]
    outputs = "float[b] y" if "Squeeze" in body else "float[a,b] y"
    assert described(build(body, INPUTS, outputs, dtype=dtype)) == expected


@pytest.mark.parametrize("form", NOT_FUSED)
def test_not_fused(form: str) -> None:
    body, expected = NOT_FUSED[form]
    outputs = "float[b] y" if "Squeeze" in body else "float[a,b] y"
    assert described(build(body, INPUTS, outputs)) == expected


def test_a_graph_output_is_not_swallowed() -> None:
    body = "h = MatMul(x, W) a = Add(h, b) y = Relu(a)"
    assert described(build(body, outputs="float[m,n] y, float[m,n] a")) == "a = x W + b"
    assert described(build(body, outputs="float[m,n] y, float[m,n] h")) == "h = x W"


def test_a_use_in_a_subgraph_counts() -> None:
    body = """
        h = MatMul(x, W)
        a = Relu(h)
        y = If(flag) <
            then_branch = t () => (float[m,n] p) { p = Add(a, h) },
            else_branch = e () => (float[m,n] q) { q = Neg(a) }
        >
    """
    assert described(build(body, f"{X}, bool flag")) == "h = x W"
    assert described(build(body.replace("Add(a, h)", "Exp(a)"), f"{X}, bool flag")) == "a = relu(x W)"


def test_layers_in_subgraphs_and_functions_are_left_alone() -> None:
    body = """
        l = local.twice(x)
        y = If(flag) <
            then_branch = t () => (float[m,n] p) { p = MatMul(l, W) },
            else_branch = e () => (float[m,n] q) { q = MatMul(x, W) }
        >
    """
    more = '<domain: "local", opset_import: ["": 17]> twice (v) => (w) { w = Add(v, v) }'
    assert layers_of(build(body, f"{X}, bool flag", more=more)) == ()


def test_a_model_local_function_is_not_taken_for_the_operator_of_its_name() -> None:
    more = '<domain: "com.microsoft", opset_import: ["": 17]> Gelu (v) => (w) { w = Neg(v) }'
    assert described(build("h = MatMul(x, W) y = com.microsoft.Gelu(h)", more=more)) == "h = x W"


def test_clip_of_old_opsets_has_attributes() -> None:
    model = build("h = MatMul(x, W) y = Clip<min = 0.0, max = 6.0>(h)", opset=9)
    assert described(model) == "y = clip[0 6](x W)"
    assert described(build("h = MatMul(x, W) y = Clip<max = 6.0>(h)", opset=7)) == "y = clip[-inf 6](x W)"
    check_values(model, random_feeds(model))


@pytest.mark.parametrize(
    ("node", "opset", "expected"),
    [
        ("Gelu(h)", 20, "gelu"),
        ('Gelu<approximate = "tanh">(h)', 20, "gelu_tanh"),
        ("Swish(h)", 24, "silu[1]"),
        ("Swish<alpha = 1.5>(h)", 24, "silu[1.5]"),
    ],
)
def test_activations_of_new_opsets(node: str, opset: int, expected: str) -> None:
    model = build(f"h = MatMul(x, W) y = {node}", opset=opset, ir=10)
    try:
        found = described(model)
    except SparsecError as error:
        if f"opset {opset} of domain ai.onnx is newer than onnxruntime" not in str(error):
            raise
        pytest.skip(str(error))
    assert found == f"y = {expected}(x W)"


@pytest.mark.parametrize(
    ("residual", "fused"),
    [
        ("float[2,4] z", True),
        ("float[n,4] z", True),
        ("float[2,1] z", True),
        ("float[4] z", False),
        ("float[5,2,4] z", False),
    ],
)
def test_a_residual_has_the_rank_of_the_output(residual: str, fused: bool) -> None:
    outputs = "float[a,b,c] y" if "5" in residual else "float[a,b] y"
    model = build("h = MatMul(x, W) y = Add(h, z)", f"{X}, {residual}", outputs)
    assert described(model) == ("y = x W + z" if fused else "h = x W")


def test_a_residual_that_stretches_the_output_stays_outside() -> None:
    model = build("h = MatMul(x, W) y = Add(h, z)", "float[1,3] x, float[5,4] z")
    assert described(model) == "h = x W"


def test_any_rank_of_x() -> None:
    for shape in ("3", "7,3", "2,7,3", "2,2,7,3"):
        model = build("h = MatMul(x, W) a = Add(h, b) y = Relu(a)", f"float[{shape}] x", "float y")
        model.graph.output[0].type.tensor_type.ClearField("shape")
        assert described(model) == "y = relu(x W + b)"
        assert layers_of(model)[0].rank == shape.count(",") + 1
        check_values(model, random_feeds(model))


def test_a_bias_of_three_axes_needs_a_known_rank() -> None:
    body = "h = MatMul(x, W) y = Add(h, b3)"
    assert described(build(body, "float[2,7,3] x", "float[a,b,c] y")) == "y = x W + b"
    unknown = build(body, X, "float[a,b,c] y")
    unknown.graph.input[0].type.tensor_type.ClearField("shape")
    assert described(unknown) == "h = x W"


LEFT = {
    "float[4,7] x": "y = (relu(x.T W + b)).T",
    "float[2,4,7] x": "y = (relu(x.T W + b)).T",
}


@pytest.mark.parametrize("inputs", LEFT)
def test_the_weight_on_the_left(inputs: str) -> None:
    model = build("h = MatMul(W, x) a = Add(h, u) y = Relu(a)", inputs, "float y")
    model.graph.output[0].type.tensor_type.ClearField("shape")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((3, 1), np.float32), "u"))
    assert described(model) == LEFT[inputs]
    check_values(model, random_feeds(model))


def test_the_weight_on_the_left_without_a_rank() -> None:
    vector = build("y = MatMul(W, x)", "float[4] x", "float[a] y")
    words = "the weight stands on the left and its input is a vector; no sparse operator yet"
    assert [layer.obstacle for layer in layers_of(vector)] == [words]
    unknown = build("y = MatMul(W, x)", "float[4,2] x")
    unknown.graph.input[0].type.tensor_type.ClearField("shape")
    words = "the weight stands on the left and the rank of its input is unknown; no sparse operator yet"
    assert [layer.obstacle for layer in layers_of(unknown)] == [words]


def test_the_rank_of_a_computed_input_is_inferred() -> None:
    model = build("t = Transpose(x) y = MatMul(W, t)", "float[7,4] x")
    assert described(model) == "y = (t.T W).T"
    assert not read(model).model.graph[0].outputs[0].shape, "what is inferred does not get into the model"


@pytest.mark.parametrize(
    ("attributes", "x", "expected"),
    [
        ("alpha = 1.0", "2,3", "y = x W + b"),
        ("transA = 1", "3,2", "y = x.T W + b"),
        ("alpha = 0.5, beta = 2.0", "2,3", "y = x W + b"),
        ("beta = 0.0", "2,3", "y = x W"),
    ],
)
def test_gemm(attributes: str, x: str, expected: str) -> None:
    model = build(f"y = Gemm<{attributes}>(x, W, b)", f"float[{x}] x")
    assert described(model) == expected
    check_values(model, random_feeds(model))


def test_gemm_with_a_variable_c() -> None:
    model = build("h = Gemm(x, W, z) y = Relu(h)", f"{X}, float[2,4] z")
    assert described(model) == "h = x W + z"
    check_values(model, random_feeds(model))
    assert described(build("y = Gemm(x, W, full)")) == "y = x W + full"


def test_gemm_with_the_weight_on_the_left() -> None:
    for attributes, x, turned in (("transA = 1", "3,2", ".T"), ("transA = 1, transB = 1", "2,3", "")):
        model = build(f"y = Gemm<{attributes}>(W, x, u)", f"float[{x}] x")
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((4, 1), np.float32), "u"))
        assert described(model) == f"y = (x{turned} W + b).T"
        check_values(model, random_feeds(model))
    words = "the weight stands on the left and C varies along the rows; no sparse operator yet"
    assert words in described(build("y = Gemm<transA = 1>(W, x, z)", "float[3,2] x, float[4,2] z"))


def test_gemm_with_alpha_zero() -> None:
    assert "alpha is 0.0" in described(build("y = Gemm<alpha = 0.0>(x, W)"))


def test_weights_computed_from_constants() -> None:
    """Transpose, Reshape, Cast and DequantizeLinear chains: as quantizers and exporters without folding write them."""
    plain = build("y = MatMul(x, W)")
    weight = layers_of(plain)[0].weight
    chains = {
        "Identity": "i = Identity(W) y = MatMul(x, i)",
        "Transpose": "t = Transpose(W) i = Identity(t) u = Transpose<perm = [1, 0]>(i) y = MatMul(x, u)",
        "Reshape": "s = Constant<value_ints = [4, 3]>() r = Reshape(W, s) q = Constant<value_ints = [3, 4]>()"
        " u = Reshape(r, q) y = MatMul(x, u)",
        "Mul": "m = Mul(W, half) u = Mul(m, v) y = MatMul(x, u)",
    }
    for op, body in chains.items():
        model = build(body.replace("v)", "two)"))
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(2), "two"))
        layers = layers_of(model)
        assert [layer.name for layer in layers] == ["y"], op
        np.testing.assert_array_equal(layers[0].weight, weight, err_msg=op)


def test_weights_that_are_parts_of_one_tensor() -> None:
    """PyTorch's attention over other keys than its own queries."""
    body = "p, q = Split<axis = 1>(W, sizes) t = Transpose(p) h = MatMul(x, q) u = Transpose(t) y = MatMul(x, u)"
    model = build(body, outputs="float[a,b] h, float[c,d] y")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, 3]), "sizes"))
    weight = layers_of(build("y = MatMul(x, W)"))[0].weight
    found = {layer.name: layer.weight for layer in layers_of(model)}
    assert list(found) == ["h", "y"]
    np.testing.assert_array_equal(found["y"], weight[:1])
    np.testing.assert_array_equal(found["h"], weight[1:])


@pytest.mark.parametrize("opset", [10, 13, 21])
def test_quantized_weights(opset: int) -> None:
    model = build("w = DequantizeLinear(q, s, z) y = MatMul(x, w)", opset=opset)
    quantized = RNG.integers(-127, 127, (3, 4), dtype=np.int8)
    for name, array in {"q": quantized, "s": np.float32(0.5), "z": np.int8(3)}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    (layer,) = layers_of(model)
    np.testing.assert_array_equal(layer.weight, (quantized.T.astype(np.float32) - 3) * 0.5)


def test_a_computed_constant_may_not_ask_for_unbounded_memory() -> None:
    body = "a = Mul(p, q) i = Identity(a) y = MatMul(x, i)"
    model = build(body, "float[2,1000000] x")
    for name, shape in {"p": (1_000_000, 1), "q": (1, 1_000_000)}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(shape, np.float32), name))
    assert layers_of(model) == ()


def test_an_initialiser_that_is_also_an_input() -> None:
    """From IR 4 on a caller may replace it; in IR 3 every initialiser is listed so, and none can be."""
    inputs = f"{X}, float[3,4] W"
    obstacle = "its weight 'W' is also an input of the model, so a caller may replace it"
    assert described(build("y = MatMul(x, W)", inputs)) == f"y = x W ! {obstacle}"
    assert described(build("y = MatMul(x, W)", inputs, opset=7, ir=3)) == "y = x W"
    assert described(build("h = MatMul(x, W) y = Add(h, b2)", f"{X}, float[1,4] b2")) == "y = x W + b2"


@pytest.mark.parametrize("dtype", ["float64", "int32"])
def test_other_types(dtype: str) -> None:
    kind = {"float64": "double", "int32": "int32"}[dtype]
    model = build("y = MatMul(x, V)", f"{kind}[2,3] x", f"{kind}[a,b] y")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((3, 4), dtype), "V"))
    assert described(model) == f"y = x W ! {dtype} weights; no sparse operator yet"


def half_weight(dtype: str) -> np.ndarray:
    """`CONSTANTS["W"]` as `dtype` holds it, [out, in] float32."""
    return np.asarray(CONSTANTS["W"].T, DTYPES[dtype]).astype(np.float32)


@pytest.mark.parametrize("dtype", HALVES)
def test_weights_of_16_bits_are_widened(dtype: str) -> None:
    (layer,) = layers_of(build("y = MatMul(x, W)", dtype=dtype))
    assert (layer.weight.dtype, layer.nbytes) == (np.float32, 2 * 12)
    np.testing.assert_array_equal(layer.weight, half_weight(dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_weights_of_16_bits_in_a_field_of_integers(dtype: str) -> None:
    """As ONNX stores them where they are not raw bytes."""
    model = build("y = MatMul(x, V)", dtype=dtype)
    kind = onnx.helper.np_dtype_to_tensor_dtype(DTYPES[dtype])
    model.graph.initializer.append(onnx.helper.make_tensor("V", kind, (3, 4), CONSTANTS["W"].ravel()))
    assert model.graph.initializer[0].int32_data
    np.testing.assert_array_equal(layers_of(model)[0].weight, half_weight(dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_weights_of_16_bits_beside_the_model(dtype: str, tmp_path: Path) -> None:
    model = build("y = MatMul(x, W)", dtype=dtype)
    onnx.save_model(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.bin", size_threshold=0)
    np.testing.assert_array_equal(read(tmp_path / "m.onnx").layers[0].weight, half_weight(dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_weights_of_16_bits_computed_from_constants(dtype: str) -> None:
    """Also in bfloat16, in which ONNX Runtime's CPU provider computes next to nothing."""
    kind = onnx.helper.np_dtype_to_tensor_dtype(DTYPES[dtype])
    weight = half_weight(dtype)
    chains = {
        "Identity": ("i = Identity(W)", weight),
        "Transpose": ("t = Transpose(W) u = Identity(t) i = Transpose(u)", weight),
        "Cast": (f"i = Cast<to = {kind}>(wide)", weight),
        "Cast there and back": (f"v = Cast<to = 1>(W) i = Cast<to = {kind}>(v)", weight),
        "Mul": ("i = Mul(W, half)", weight / 2),
        "DequantizeLinear": ("i = DequantizeLinear(q, half)", np.full((4, 3), 1.5, np.float32)),
    }
    for op, (body, expected) in chains.items():
        model = build(f"{body} y = MatMul(x, i)", opset=21, ir=10, dtype=dtype)
        for name, array in {"wide": np.float32(CONSTANTS["W"]), "q": np.full((3, 4), 3, np.int8)}.items():
            if name in body:
                model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        assert [(layer.name, layer.dtype) for layer in layers_of(model)] == [("y", dtype)], op
        np.testing.assert_array_equal(layers_of(model)[0].weight, expected, err_msg=op)


@pytest.mark.parametrize("dtype", HALVES)
def test_casts_around_a_layer_stay_outside(dtype: str) -> None:
    kind = onnx.helper.np_dtype_to_tensor_dtype(DTYPES[dtype])
    body = f"n = Cast<to = {kind}>(x) h = MatMul(n, W) a = Add(h, b) w = Cast<to = 1>(a) y = Relu(w)"
    model = build(body, dtype=dtype)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    assert described(model) == "a = n W + b"
    assert layers_of(model)[0].dtype == dtype


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("gemm", "expected"),
    [
        ("Gemm(x, W, b)", "y = x W + b"),
        ("Gemm<alpha = 0.5, beta = 2.0>(x, W, b)", "y = x W + b"),
        ("Gemm<alpha = 2.0>(x, W, z)", "y = x W + z"),
        ("Gemm<alpha = 0.3>(x, W, b)", "y = x W ! alpha is 0.3, which {} cannot take in without rounding"),
        ("Gemm<beta = 0.3>(x, W, b)", "y = x W ! beta is 0.3, which {} cannot take in without rounding"),
        ("Gemm<beta = 0.3>(x, W, z)", "y = x W ! beta is 0.3, which {} cannot take in without rounding"),
        ("Gemm<beta = 0.3>(x, W, zero)", "y = x W + b"),
    ],
)
def test_gemm_in_16_bits(gemm: str, expected: str, dtype: str) -> None:
    model = build(f"y = {gemm}", f"{X}, float[2,4] z", dtype=dtype)
    assert described(model) == expected.format(dtype)
    check_values(model, {name: x.astype(DTYPES[dtype]) for name, x in random_feeds(model).items()}, dtype)


def test_the_oldest_opset_of_a_type() -> None:
    assert described(build("y = MatMul(x, W)", opset=7, dtype="float16")) == "y = x W"
    assert described(build("y = MatMul(x, W)", opset=13, dtype="bfloat16")) == "y = x W"
    words = "opset 12; sparse operators from opset 13 on"
    assert described(build("y = MatMul(x, W)", opset=12, dtype="bfloat16")) == f"y = x W ! {words}"


def test_stacks_of_weights() -> None:
    model = build("y = MatMul(x, V)", "float[5,2,3] x", "float[a,b,c] y")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((5, 3, 4), np.float32), "V"))
    (layer,) = layers_of(model)
    assert (layer.weight.shape, layer.obstacle) == ((20, 3), "a stack of 5 weights; no sparse operator yet")


def test_two_constants_are_no_layer() -> None:
    model = build("h = MatMul(V, W) y = Add(h, z)", "float[2,4] z")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((2, 3), np.float32), "V"))
    assert layers_of(model) == ()


@pytest.mark.parametrize(
    ("node", "weight", "shape", "words"),
    [
        ("Conv<group = 2>", (6, 2, 3, 5), (6, 30), "a convolution; no sparse operator yet"),
        ("ConvTranspose<group = 2>", (4, 3, 3, 5), (6, 30), "a convolution; no sparse operator yet"),
    ],
)
def test_convolutions(node: str, weight: tuple[int, ...], shape: tuple[int, int], words: str) -> None:
    model = build(f"y = {node}(x, V)", "float[1,4,9,9] x", "float[a,b,c,d] y")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(weight, np.float32), "V"))
    (layer,) = layers_of(model)
    assert (layer.kind.value, layer.weight.shape, layer.obstacle) == ("conv", shape, words)


def test_recurrent_layers() -> None:
    model = build("y = LSTM<hidden_size = 4>(x, V, R)", "float[5,1,3] x", "float[a,b,c,d] y")
    for name, shape in {"V": (1, 16, 3), "R": (1, 16, 4)}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(shape, np.float32), name))
    (layer,) = layers_of(model)
    expected = ("recurrent", (16, 3), "a recurrent layer; no sparse operator yet")
    assert (layer.kind.value, layer.weight.shape, layer.obstacle) == expected


def test_names_are_unique_and_stable() -> None:
    body = '["mm"] h = MatMul(x, W) ["mm"] i = MatMul(x, W) j = MatMul(x, W2) y = Sum(h, i, j)'
    assert [layer.name for layer in layers_of(build(body))] == ["mm", "mm_2", "j"]


def test_nodes_out_of_order_are_sorted() -> None:
    model = build("y = Relu(h) h = MatMul(x, W)")
    assert described(model) == "y = relu(x W)"
    assert [node.op_type for node in read(model).model.graph] == ["MatMul", "Relu"]


def test_a_weight_is_not_copied() -> None:
    program = read(build("y = MatMul(x, W)").SerializeToString())
    assert not program.layers[0].weight.flags.owndata


def test_what_is_read_of_external_data_stays_mapped(tmp_path: Path) -> None:
    model = build("y = MatMul(x, W)")
    onnx.save_model(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.bin", size_threshold=0)
    program = read(tmp_path / "m.onnx")
    (layer,) = program.layers
    np.testing.assert_array_equal(layer.weight, np.asarray(CONSTANTS["W"], np.float32).T)
    assert program.source == tmp_path / "m.onnx"


ASSETS = Path(__file__).resolve().parents[2].parent / "shared" / "assets" / "models"


@pytest.mark.skipif(not ASSETS.is_dir(), reason="the models of ../shared/assets are not on this machine")
@pytest.mark.parametrize(
    ("file", "linear", "others"),
    [
        ("magika_standard_v3_3", 2, 1),
        ("mnist_cnn_opset7", 1, 2),
        ("mnist_cnn_opset8", 1, 2),
        ("resnet20_cifar10", 1, 19),
        ("resnet20_cifar10_int8_qdq", 1, 19),
        ("resnet32_cifar10_external", 1, 31),
        ("silero_vad", 0, 0),
        ("silero_vad_op18_ifless", 0, 0),
        ("squeezenet_dc_sparse", 0, 26),
        ("ultraface_version-RFB-320", 0, 52),
    ],
)
def test_real_models(file: str, linear: int, others: int) -> None:
    layers = read(ASSETS / f"{file}.onnx").layers
    assert sum(not layer.obstacle for layer in layers) == linear
    assert sum(bool(layer.obstacle) for layer in layers) == others


def test_layers_of_old_opsets_are_found_and_left_alone() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 3, opset_import: ["" : 6]>
        g (float[N, 3] x) => (float[N, 2] y) <float[3, 2] w = {1, 2, 3, 4, 5, 6}> { y = MatMul(x, w) }"""
    )
    (layer,) = read(model).layers
    assert layer.obstacle == "opset 6; sparse operators from opset 7 on"

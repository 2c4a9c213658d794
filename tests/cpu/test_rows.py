"""The rows that a layer multiplies: with its weight they make what ONNX Runtime makes of the layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sparsec.compiler.calibration import has_rows, masks
from sparsec.compiler.calibration.rows import ROWS_A_SAMPLE, groups_of, rows, source_of
from sparsec.compiler.frontend import read
from sparsec.compiler.machine import Cpu

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sparsec.ir import Layer

FLOAT = onnx.TensorProto.FLOAT
RNG = np.random.default_rng(0)


def one_node(op_type: str, x: tuple[int, ...], weight: NDArray[Any], left: bool = False, **attributes: Any) -> Any:
    """The model of one operator without bias, and its layer."""
    inputs = ["W", "x"] if left else ["x", "W"]
    node = onnx.helper.make_node(op_type, inputs, ["y"], "layer", **attributes)
    values = [onnx.helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in (("x", x), ("y", None))]
    tensor = onnx.numpy_helper.from_array(weight, "W")
    graph = onnx.helper.make_graph([node], "g", values[:1], values[1:], [tensor])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    (layer,) = read(model).layers
    return model, layer


def normal(*shape: int) -> NDArray[np.float32]:
    return RNG.standard_normal(shape).astype(np.float32)


def run(model: onnx.ModelProto, x: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(Cpu(1).open(model.SerializeToString()).run(None, {"x": x})[0])


def product(layer: Layer, found: NDArray[Any]) -> NDArray[Any]:
    """What the layer makes of its rows: [rows, out]."""
    parts = zip(found, np.split(layer.weight, groups_of(layer)), strict=True)
    return np.concatenate([x @ weight.T for x, weight in parts], axis=1)


def assert_close(found: NDArray[Any], expected: NDArray[Any]) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max(initial=0) <= 1e-5 * np.abs(expected).max(initial=1)


# ---- Convolutions ----


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]:
    """Shapes of X and W, and attributes, each of which may be left out where it has its default."""
    axes = draw(st.integers(1, 3))

    def each(least: int, most: int) -> list[int]:
        return [draw(st.integers(least, most)) for _ in range(axes)]

    groups, channels = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    outputs, kernel = groups * draw(st.integers(1, 2)), each(1, 3)
    x = (draw(st.integers(1, 2)), groups * channels, *each(3, 6))
    auto = draw(st.sampled_from(("", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER")))
    attributes: dict[str, Any] = {"strides": each(1, 3), "dilations": each(1, 2), "group": groups}
    if auto.startswith("SAME"):
        attributes["dilations"] = [1] * axes  # ONNX Runtime refuses others
    if auto in ("", "NOTSET"):
        attributes["pads"] = [draw(st.integers(0, 2)) for _ in range(2 * axes)]
    if auto:
        attributes["auto_pad"] = auto
    defaults = {"strides": [1] * axes, "dilations": [1] * axes, "group": 1, "pads": [0] * 2 * axes}
    attributes = {
        name: value for name, value in attributes.items() if value != defaults.get(name) or draw(st.booleans())
    }
    attributes["kernel_shape"] = kernel
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, attributes.get("dilations", [1] * axes), strict=True)]
    pads = attributes.get("pads", [0] * 2 * axes)
    padded = [n + a + b for n, a, b in zip(x[2:], pads[:axes], pads[axes:], strict=True)]
    assume(auto.startswith("SAME") or all(r <= n for r, n in zip(reach, padded, strict=True)))
    return x, (outputs, channels, *kernel), attributes


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(case=convolutions())
def test_a_convolution_is_the_product_of_its_rows(case: Any) -> None:
    shape, weight, attributes = case
    model, layer = one_node("Conv", shape, normal(*weight), **attributes)
    x = normal(*shape)
    expected = run(model, x)
    assert expected[0, 0].size <= ROWS_A_SAMPLE, "all rows are taken"
    found = rows(layer, x, 0)
    assert found.dtype == np.float32 and has_rows(layer)
    assert found.shape == (groups_of(layer), len(x) * expected[0, 0].size, layer.in_features)
    assert_close(product(layer, found), np.moveaxis(expected, 1, -1).reshape(-1, len(layer.weight)))


def test_a_convolution_shares_rows_only_with_the_same_geometry() -> None:
    def sources(weights: list[NDArray[Any]], attributes: list[dict[str, Any]]) -> int:
        nodes = [
            onnx.helper.make_node("Conv", ["x", f"W{i}"], [f"y{i}"], kernel_shape=weight.shape[2:], **one)
            for i, (weight, one) in enumerate(zip(weights, attributes, strict=True))
        ]
        x = onnx.helper.make_tensor_value_info("x", FLOAT, (1, 4, 8, 8))
        outputs = [onnx.helper.make_tensor_value_info(f"y{i}", FLOAT, None) for i in range(len(nodes))]
        tensors = [onnx.numpy_helper.from_array(weight, f"W{i}") for i, weight in enumerate(weights)]
        graph = onnx.helper.make_graph(nodes, "g", [x], outputs, tensors)
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
        return len({source_of(layer) for layer in read(model).layers})

    square, wide, small = normal(8, 4, 3, 3), normal(8, 4, 1, 9), normal(8, 2, 3, 3)
    assert sources([square, square, normal(2, 4, 3, 3)], [{}, {}, {}]) == 1
    different = [{"strides": [2, 2]}, {"dilations": [2, 2]}, {"pads": [1, 1, 1, 1]}, {"auto_pad": "SAME_UPPER"}]
    assert sources([square] * 5, [{}, *different]) == 5
    assert sources([square, wide], [{}, {}]) == 2  # as many inputs, of other places
    assert sources([square, small], [{}, {"group": 2}]) == 2


def test_what_has_no_rows() -> None:
    transposed = one_node("ConvTranspose", (1, 4, 5, 5), normal(4, 2, 3, 3))[1]
    stack = one_node("MatMul", (3, 4, 5), normal(3, 5, 2))[1]
    assert not has_rows(transposed) and not has_rows(stack)
    # A weight that no sparse operator takes for another reason is solved all the same.
    assert has_rows(one_node("MatMul", (5,), normal(4, 5), left=True)[1])


# ---- Products with one matrix ----

LINEAR: dict[str, tuple[str, tuple[int, ...], NDArray[Any], bool, dict[str, Any]]] = {
    "gemm": ("Gemm", (6, 5), normal(5, 3), False, {}),
    "gemm with transB and alpha": ("Gemm", (6, 5), normal(3, 5), False, {"transB": 1, "alpha": 0.5}),
    "gemm with transA": ("Gemm", (5, 6), normal(5, 3), False, {"transA": 1}),
    "gemm, the weight left": ("Gemm", (5, 6), normal(3, 5), True, {}),
    "gemm, the weight left, all transposed": ("Gemm", (6, 5), normal(5, 3), True, {"transA": 1, "transB": 1}),
    "matmul": ("MatMul", (6, 5), normal(5, 3), False, {}),
    "matmul of a vector": ("MatMul", (5,), normal(5, 3), False, {}),
    "matmul of tokens": ("MatMul", (2, 4, 5), normal(5, 3), False, {}),
    "matmul, the weight left": ("MatMul", (5, 6), normal(3, 5), True, {}),
    "matmul of tokens, the weight left": ("MatMul", (2, 5, 4), normal(3, 5), True, {}),
}


@pytest.mark.parametrize("name", LINEAR)
def test_a_product_is_that_of_its_rows(name: str) -> None:
    op_type, shape, weight, left, attributes = LINEAR[name]
    model, layer = one_node(op_type, shape, weight, left, **attributes)
    x = normal(*shape)
    expected = run(model, x)
    if layer.transpose_y:
        expected = np.swapaxes(expected, -1, -2)
    found = rows(layer, x, 0)
    assert found.shape == (1, x.size // 5, 5) and found.dtype == np.float32
    assert_close(product(layer, found), expected.reshape(-1, 3))


# ---- The choice of rows ----


def choices() -> dict[str, tuple[Layer, NDArray[Any]]]:
    """Layers with more rows than are looked at; each row holds its own number."""
    tokens = np.arange(2 * 400, dtype=np.float32).reshape(2, 400, 1) * np.ones(5, np.float32)
    pixels = np.arange(2 * 30 * 30, dtype=np.float32).reshape(2, 1, 30, 30)
    return {
        "tokens": (one_node("MatMul", (2, 400, 5), normal(5, 3))[1], tokens),
        "transposed": (one_node("MatMul", (2, 5, 400), normal(3, 5), left=True)[1], np.swapaxes(tokens, 1, 2)),
        "pixels": (one_node("Conv", (2, 1, 30, 30), normal(3, 1, 1, 1), kernel_shape=[1, 1])[1], pixels),
    }


@pytest.mark.parametrize("name", choices())
def test_rows_are_chosen_by_the_seed_alone(name: str) -> None:
    layer, x = choices()[name]
    first, again, other = (rows(layer, x, seed) for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert first.shape == other.shape == (1, 2 * ROWS_A_SAMPLE, layer.in_features)
    assert not np.array_equal(first, other)
    # In their order, none twice, so that what two models make of the same feeds stays paired.
    assert (np.diff(first[0, :, 0]) > 0).all()
    assert np.array_equal(rows(layer, x + 0.5, 3), first + 0.5)


def test_what_is_no_sequence_counts_whole() -> None:
    """[samples, in]: each row is a sample of its own."""
    layer = one_node("MatMul", (1000, 5), normal(5, 3))[1]
    x = normal(1000, 5)
    assert np.array_equal(rows(layer, x, 0), x[None])


def test_half_precision_is_widened() -> None:
    layer = one_node("MatMul", (4, 5), normal(5, 3))[1]
    assert rows(layer, normal(4, 5).astype(np.float16), 0).dtype == np.float32


# ---- Masks ----

MASK = np.array([[1, 1, 0, 0], [1, 1, 1, 0]])


def test_padded_tokens_are_left_out() -> None:
    layer = one_node("MatMul", (2, 4, 5), normal(5, 3))[1]
    x = normal(2, 4, 5)
    kept = np.concatenate([x[0, :2], x[1, :3]])[None]
    assert np.array_equal(rows(layer, x, 0, MASK != 0), kept)
    assert np.array_equal(rows(layer, x, 0, None), x.reshape(1, 8, 5))


def test_the_most_rows_are_of_those_that_count() -> None:
    layer = one_node("MatMul", (2, 400, 5), normal(5, 3))[1]
    x, keep = normal(2, 400, 5), np.arange(800).reshape(2, 400) % 8 == 0
    assert np.array_equal(rows(layer, x, 0, keep)[0], x[keep])


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.bool_, np.uint8])
def test_a_mask_is_an_input_that_says_so(dtype: Any) -> None:
    found = masks({"ids": np.full((2, 4), 7), "Attention_Mask": MASK.astype(dtype)})
    assert found is not None and found.dtype == np.bool_
    assert np.array_equal(found, MASK != 0)


@pytest.mark.parametrize(
    "feeds",
    [
        {"ids": MASK},  # another name
        {"mask": MASK.astype(np.float32)},  # what is added to scores, or multiplied
        {"mask": MASK[:, None, None]},  # one for each head
        {"mask": MASK[0]},
        {"mask": np.array([[1, 2, 3, 0]])},  # lengths, or positions
        {"mask": np.array([[0, -10000]])},
        {},
    ],
)
def test_what_is_no_mask(feeds: Any) -> None:
    assert masks(feeds) is None


@pytest.mark.parametrize("keep", [np.ones((2, 3), bool), np.ones((4, 2), bool), np.zeros((2, 4), bool)])
def test_a_mask_that_does_not_fit_is_not_used(keep: Any) -> None:
    """Of other tokens than the layer's, or one that would leave nothing."""
    layer = one_node("MatMul", (2, 4, 5), normal(5, 3))[1]
    x = normal(2, 4, 5)
    assert np.array_equal(rows(layer, x, 0, keep), x.reshape(1, 8, 5))


def test_a_convolution_looks_at_no_mask() -> None:
    layer = one_node("Conv", (2, 4, 5), normal(3, 4, 1), kernel_shape=[1])[1]
    x = normal(2, 4, 5)
    assert np.array_equal(rows(layer, x, 0, MASK != 0), rows(layer, x, 0))

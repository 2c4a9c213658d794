"""The kernels' activations as functions of one variable, against float64."""

from __future__ import annotations

import ctypes
from functools import cache
from math import erf, pi, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparsec.codegen.kernels.elementwise import CHEAP, Vector, activate
from sparsec.ir import Activation, Epilogue

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Array = NDArray[Any]

EPSILON = float(np.finfo(np.float32).eps)
LANES = (1, 4, 16)
# Every order of magnitude, the interval that matters, and the ends of what exp can represent.
POINTS = np.concatenate(
    [
        np.linspace(-20, 20, 16001),
        np.linspace(-100, 100, 4001),
        *(sign * np.logspace(-38, 30, 1365) for sign in (-1, 1)),
        [0.0, -0.0],
    ]
).astype(np.float32)


def mapped(function: Callable[[Any, int], Any], lanes: int) -> Callable[[Array], Array]:
    """Compile `y[i] = function(x[i])` for this machine, `lanes` elements at a time."""
    import tvm
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script import builder as T

    from sparsec.codegen.kernels.cpu.lanes import adjacent
    from sparsec.codegen.target import parse_cpu

    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("mapped")
        T.func_attr({"global_symbol": "mapped", "tirx.noalias": True})
        x, y = (T.arg(name, T.handle("float32")) for name in "xy")
        size = T.arg("size", T.int64())
        source, target = (T.decl_buffer((size,), "float32", data=data, align=4) for data in (x, y))
        with T.serial(T.truncdiv(size, T.int64(lanes))) as i:
            where = adjacent(i * lanes, lanes)
            T.buffer_store(target, function(source[where], lanes), [where])
    compiled = tvm.compile(tvm.IRModule({"mapped": builder.get()}), target=parse_cpu().tvm)["mapped"]

    def call(values: Array) -> Array:
        x = np.zeros(-(-values.size // lanes) * lanes, dtype=np.float32)
        x[: values.size] = values
        y = np.empty_like(x)
        compiled(ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(y.ctypes.data), x.size)
        return y[: values.size]

    return call


@cache
def activation(epilogue: Epilogue, lanes: int) -> Callable[[Array], Array]:
    return mapped(lambda x, lanes: activate(x, epilogue, lanes), lanes)


@cache
def exponential(lanes: int) -> Callable[[Array], Array]:
    return mapped(lambda x, lanes: Vector(lanes).exp(x), lanes)


@cache
def error_function(lanes: int) -> Callable[[Array], Array]:
    return mapped(lambda x, lanes: Vector(lanes).erf(x), lanes)


def wide(x: Array) -> Array:
    return x.astype(np.float64)


def units(got: Array, right: Array) -> Array:
    """The error in units of the last place of float32."""
    return np.abs(wide(got) - right) / (np.abs(right) * EPSILON / 2 + np.finfo(np.float32).tiny)


def sigmoid(x: Array) -> Array:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("lanes", LANES)
def test_exp_is_exact_to_two_units(lanes: int) -> None:
    x = POINTS[(POINTS >= -87.3) & (POINTS <= 88.3)]
    assert units(exponential(lanes)(x), np.exp(wide(x))).max() <= 2


@pytest.mark.parametrize("lanes", LANES)
def test_exp_saturates(lanes: int) -> None:
    """Beyond the range of float32 it stays finite and does not return."""
    x = np.array([-np.inf, -1e30, -100, -87.3, 88.3, 100, 1e30, np.inf], dtype=np.float32)
    y = exponential(lanes)(x)
    assert np.isfinite(y).all()
    assert (np.diff(y) >= 0).all()
    assert 0 < y[0] < 2e-38
    assert y[-1] > 2e38


@pytest.mark.parametrize("lanes", LANES)
def test_erf(lanes: int) -> None:
    y = error_function(lanes)(POINTS)
    right = np.vectorize(erf, otypes=[float])(wide(POINTS))
    assert np.abs(y - right).max() < 5e-7
    assert np.array_equal(y[np.abs(POINTS) > 5], np.sign(POINTS[np.abs(POINTS) > 5]))


# Formula in float64 and the largest error, relative to 1 + |x|.
FORMULAS: dict[Activation, tuple[Callable[[Array, float, float], Array], float]] = {
    Activation.NONE: (lambda x, a, b: x, 0),
    Activation.RELU: (lambda x, a, b: np.maximum(x, 0), 0),
    Activation.CLIP: (lambda x, a, b: np.clip(x, np.float32(a), np.float32(b)), 0),
    Activation.LEAKY_RELU: (lambda x, a, b: np.where(x < 0, np.float32(a) * x, x), EPSILON / 2),
    Activation.SIGMOID: (lambda x, a, b: sigmoid(x), 2 * EPSILON),
    Activation.TANH: (lambda x, a, b: np.tanh(x), 4 * EPSILON),
    Activation.GELU: (lambda x, a, b: x * (1 + np.vectorize(erf, otypes=[float])(x / sqrt(2))) / 2, 4 * EPSILON),
    Activation.GELU_TANH: (
        lambda x, a, b: x * (1 + np.tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))) / 2,
        4 * EPSILON,
    ),
    Activation.SILU: (lambda x, a, b: x * sigmoid(np.float32(a) * x), 4 * EPSILON),
}
PARAMETERS = {
    Activation.CLIP: (-0.7, 6.0),
    Activation.LEAKY_RELU: (0.01, 0.0),
    Activation.SILU: (1.702, 0.0),
}


def epilogue_of(kind: Activation) -> Epilogue:
    return Epilogue(kind, *PARAMETERS.get(kind, (0.0, 0.0)))


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("kind", Activation)
def test_activation(kind: Activation, lanes: int) -> None:
    formula, tolerance = FORMULAS[kind]
    epilogue = epilogue_of(kind)
    y = activation(epilogue, lanes)(POINTS)
    right = formula(wide(POINTS), epilogue.alpha, epilogue.beta)
    error = np.abs(wide(y) - right) / (1 + np.abs(wide(POINTS)))
    worst = int(np.argmax(error))
    assert error[worst] <= tolerance, f"{kind.value}({POINTS[worst]}) = {y[worst]}, expected {right[worst]}"


@pytest.mark.parametrize("kind", sorted(set(Activation) - CHEAP))
def test_lanes_agree(kind: Activation) -> None:
    """One element or sixteen at a time: the last outputs of a row are what they would be elsewhere."""
    one, *others = (activation(epilogue_of(kind), lanes)(POINTS) for lanes in LANES)
    for other in others:
        assert np.array_equal(one, other)


@pytest.mark.parametrize(
    ("kind", "limits"),
    [
        (Activation.RELU, (0, np.inf)),
        (Activation.CLIP, (-0.7, 6)),
        (Activation.LEAKY_RELU, (-np.inf, np.inf)),
        (Activation.SIGMOID, (0, 1)),
        (Activation.TANH, (-1, 1)),
    ],
)
def test_infinity(kind: Activation, limits: tuple[float, float]) -> None:
    y = activation(epilogue_of(kind), 4)(np.array([-np.inf, np.inf], dtype=np.float32))
    assert np.allclose(y, limits, atol=1e-37)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40))
@example([0.0, -0.0])
def test_symmetry(values: list[float]) -> None:
    """tanh is bounded and odd; GELU(x) - GELU(-x) is x."""
    x = np.array(values, dtype=np.float32)
    tanh = activation(Epilogue(Activation.TANH), 16)
    assert (np.abs(tanh(x)) <= 1).all()
    assert np.abs(tanh(x) + tanh(-x)).max() <= 4 * EPSILON
    gelu = activation(Epilogue(Activation.GELU), 16)
    assert np.abs(gelu(x) - gelu(-x) - x).max() <= 4 * EPSILON * (1 + np.abs(x).max())

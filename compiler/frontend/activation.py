"""Which activation a chain of element-wise operators computes, found by trying it.

Exporters write Gelu in a dozen ways (Div or Mul by a reciprocal, the half first or last, x^3 as Pow or as products).
A sub-graph of element-wise operators that reads one tensor and scalars otherwise is a function of one number, so there
is no need to recognise its form: it is evaluated at points, and compared with the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...ir import Activation
from ...ir.values.floats import DTYPES
from .nodes import attribute

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray

Samples = Any  # NDArray[np.float64], or a number
_Arguments = Sequence[Samples]  # None for an input left out
_Function = Callable[["onnx_ir.Node", _Arguments], Samples]

_LARGEST = 3e38
# Dense where activations bend, and far out, where two that agree near zero part.
_FAR = np.array([20.0, 50.0, 1e2, 1e3, 1e4, 1e6, 1e30, _LARGEST])
POINTS: NDArray[np.float64] = np.concatenate([np.linspace(-12, 12, 385), _FAR, -_FAR])
# Exporters round constants such as sqrt(2 / pi) to float32 or to five digits. Gelu's two forms differ by 5e-4.
_RELATIVE, _ABSOLUTE = 2e-5, 2e-6
# What the forms of Gelu are made of.
_CONSTANTS = (
    math.sqrt(2), math.sqrt(1 / 2), math.sqrt(2 / math.pi), math.sqrt(8 / math.pi),
    0.044715, 0.044715 * math.sqrt(2 / math.pi), 0.044715 * math.sqrt(8 / math.pi), 1.702,
)  # fmt: skip

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(x: Samples) -> Samples:
    return 1 / (1 + np.exp(-x))


def _gelu(x: Samples) -> Samples:
    return x * (1 + _erf(x / math.sqrt(2))) / 2


def _gelu_tanh(x: Samples) -> Samples:
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


FORMULAS: Mapping[Activation, Callable[[Samples, float, float], Samples]] = {
    Activation.NONE: lambda x, alpha, beta: x,
    Activation.RELU: lambda x, alpha, beta: np.maximum(x, 0),
    Activation.LEAKY_RELU: lambda x, alpha, beta: np.where(x >= 0, x, alpha * x),
    Activation.CLIP: lambda x, alpha, beta: np.minimum(np.maximum(x, alpha), beta),
    Activation.SIGMOID: lambda x, alpha, beta: _sigmoid(x),
    Activation.TANH: lambda x, alpha, beta: np.tanh(x),
    Activation.GELU: lambda x, alpha, beta: _gelu(x),
    Activation.GELU_TANH: lambda x, alpha, beta: _gelu_tanh(x),
    Activation.SILU: lambda x, alpha, beta: x * _sigmoid(alpha * x),
}


def _clip(node: onnx_ir.Node, arguments: _Arguments) -> Samples:
    """Bounds are attributes before opset 11 and inputs from then on."""
    bounds = [arguments[i] if i < len(arguments) else None for i in (1, 2)]
    low = attribute(node, "min", -math.inf) if bounds[0] is None else bounds[0]
    high = attribute(node, "max", math.inf) if bounds[1] is None else bounds[1]
    # The attributes' defaults are the ends of float32's range, beyond which nothing lies.
    low, high = (-math.inf if low <= -_LARGEST else low), (math.inf if high >= _LARGEST else high)
    return np.minimum(np.maximum(arguments[0], low), high)


def _gelu_node(node: onnx_ir.Node, arguments: _Arguments) -> Samples:
    return (_gelu_tanh if attribute(node, "approximate", "none") == "tanh" else _gelu)(arguments[0])


def _leaky(node: onnx_ir.Node, arguments: _Arguments) -> Samples:
    x = arguments[0]
    return np.where(x >= 0, x, attribute(node, "alpha", 0.01) * x)


def _swish(default: float) -> _Function:
    return lambda node, arguments: arguments[0] * _sigmoid(attribute(node, "alpha", default) * arguments[0])


@dataclass(frozen=True)
class Operator:
    """An element-wise operator: its function of the node and the arguments, and how many inputs it can have."""

    function: _Function
    required: int = 1
    optional: int = 0

    def takes(self, inputs: Sequence[object]) -> bool:
        """Whether a node with these inputs, None for one left out, is in its form."""
        count = self.required + self.optional
        return self.required <= len(inputs) <= count and all(x is not None for x in inputs[: self.required])


def _plain(function: Callable[..., Samples], required: int = 1) -> Operator:
    return Operator(lambda node, arguments: function(*arguments), required)


OPERATORS: Mapping[tuple[str, str], Operator] = {
    ("", "Add"): _plain(np.add, 2),
    ("", "Clip"): Operator(_clip, 1, 2),
    ("", "Div"): _plain(np.divide, 2),
    ("", "Erf"): _plain(_erf),
    ("", "Exp"): _plain(np.exp),
    ("", "Gelu"): Operator(_gelu_node),
    ("", "Identity"): _plain(np.array),
    ("", "LeakyRelu"): Operator(_leaky),
    ("", "Max"): _plain(np.maximum, 2),
    ("", "Min"): _plain(np.minimum, 2),
    ("", "Mul"): _plain(np.multiply, 2),
    ("", "Neg"): _plain(np.negative),
    ("", "PRelu"): _plain(lambda x, slope: np.where(x >= 0, x, slope * x), 2),
    ("", "Pow"): _plain(np.power, 2),
    ("", "Reciprocal"): _plain(np.reciprocal),
    ("", "Relu"): _plain(lambda x: np.maximum(x, 0)),
    ("", "Sigmoid"): _plain(_sigmoid),
    ("", "Sub"): _plain(np.subtract, 2),
    ("", "Swish"): Operator(_swish(1.0)),
    ("", "Tanh"): _plain(np.tanh),
    ("com.microsoft", "FastGelu"): _plain(_gelu_tanh),
    ("com.microsoft", "Gelu"): _plain(_gelu),
    ("com.microsoft", "QuickGelu"): Operator(_swish(1.702)),
}


def number(scalar: NDArray[Any]) -> float:
    """The number that an array of one element means: in 16 bits, the constant of Gelu that it is the rounding of.

    As rounded to bfloat16, such constants move one form of Gelu by as much as it differs from the other.
    """
    if scalar.dtype.itemsize == 2 and scalar.dtype.name in DTYPES:
        for constant in _CONSTANTS:
            if scalar == np.array(constant, dtype=scalar.dtype):
                return constant
    return float(scalar.reshape(-1)[0])


def identify(values: NDArray[np.float64]) -> tuple[Activation, float, float] | None:
    """The activation, alpha and beta whose values at `POINTS` are `values`; None where none is, or nothing happens."""
    at = dict(zip(POINTS.tolist(), values.tolist(), strict=True))
    if not np.isfinite(values).all() or _close(values, POINTS):
        return None
    low, high, one = at[-_LARGEST], at[_LARGEST], at[1.0]
    candidates = [
        (Activation.RELU, 0.0, 0.0),
        (Activation.LEAKY_RELU, -at[-1.0], 0.0),
        (Activation.CLIP, -math.inf if low <= -_LARGEST else low, math.inf if high >= _LARGEST else high),
        (Activation.SIGMOID, 0.0, 0.0),
        (Activation.TANH, 0.0, 0.0),
        (Activation.GELU, 0.0, 0.0),
        (Activation.GELU_TANH, 0.0, 0.0),
    ]
    if 0 < one < 1:  # f(1) = sigmoid(alpha)
        candidates.append((Activation.SILU, float(np.float32(math.log(one / (1 - one)))), 0.0))
    with np.errstate(all="ignore"):
        for activation, alpha, beta in candidates:
            if _close(values, FORMULAS[activation](POINTS, alpha, beta)):
                return activation, alpha, beta
    return None


def _close(values: NDArray[np.float64], expected: NDArray[np.float64]) -> bool:
    return bool((np.abs(values - expected) <= _ABSOLUTE + _RELATIVE * np.abs(expected)).all())

"""Activations as TVM expressions that stay vectors: no calls into libm, only adds, multiplies, a division and bits.

LLVM turns `exp`, `erf` and `tanh` into one library call an element; these forms cost 10 to 20 vector operations.
The functions emit statements (each intermediate is bound once) and so are called inside an open TVM function.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ...ir import Activation

if TYPE_CHECKING:
    from ...ir import Epilogue

Expr = Any

_LOG2E = 1.4426950408889634
# ln 2 in two parts, the first with trailing zero bits, so that n * _LN2_HIGH is exact (Cody and Waite 1980).
_LN2_HIGH = 0.693359375
_LN2_LOW = -2.12194440e-4

# Activations of one or two operations, which cost nothing where the sums are still in registers.
CHEAP = frozenset({Activation.NONE, Activation.RELU, Activation.CLIP, Activation.LEAKY_RELU})


class Vector:
    """Arithmetic on expressions of `lanes` float32."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes

    def __call__(self, value: float, dtype: str = "float32") -> Expr:
        """A constant in every lane."""
        from tvm import tirx

        scalar = tirx.const(value, dtype)
        return tirx.Broadcast(scalar, self.lanes) if self.lanes > 1 else scalar

    def type(self, base: str) -> str:
        return f"{base}x{self.lanes}" if self.lanes > 1 else base

    def bind(self, value: Expr) -> Expr:
        """`value` under a name, so that its second use is not a second computation."""
        from tvm.tirx.script import builder as T

        return T.Bind(value)

    def exp(self, x: Expr) -> Expr:
        """e^x to 2 units in the last place; x is clamped to -87.3..88.3, where float32 neither under- nor overflows."""
        from tvm import tirx

        x = self.bind(tirx.min(tirx.max(x, self(-87.3)), self(88.3)))
        # x = n ln 2 + r with |r| <= ln 2 / 2.
        n = self.bind(tirx.floor(x * self(_LOG2E) + self(0.5)))
        r = self.bind(x - n * self(_LN2_HIGH) - n * self(_LN2_LOW))
        # Taylor's series to r^7 / 7!, in Horner's form: its rest is below 1e-8 on this interval.
        series = self(1 / math.factorial(7))
        for k in range(6, -1, -1):
            series = series * r + self(1 / math.factorial(k))
        power = (tirx.Cast(self.type("int32"), n) + self(127, "int32")) * self(1 << 23, "int32")
        return self.bind(series * tirx.reinterpret(self.type("float32"), power))

    def sigmoid(self, x: Expr) -> Expr:
        """1 / (1 + e^-x)."""
        return self.bind(self(1.0) / (self(1.0) + self.exp(self(0.0) - x)))

    def tanh(self, x: Expr) -> Expr:
        """2 sigmoid(2x) - 1: accurate absolutely, not relatively, near 0."""
        return self(2.0) * self.sigmoid(self(2.0) * x) - self(1.0)

    def erf(self, x: Expr) -> Expr:
        """Abramowitz and Stegun, formula 7.1.26: absolute error below 1.5e-7 by itself, 5e-7 in float32."""
        from tvm import tirx

        x = self.bind(x)
        size = self.bind(tirx.max(x, self(0.0) - x))
        t = self.bind(self(1.0) / (self(1.0) + self(0.3275911) * size))
        series = self(1.061405429)
        for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
            series = series * t + self(coefficient)
        value = self.bind(self(1.0) - series * t * self.exp(self(0.0) - size * size))
        return tirx.Select(x < self(0.0), self(0.0) - value, value)


def activate(x: Expr, epilogue: Epilogue, lanes: int) -> Expr:
    """`epilogue.activation` of `x`, an expression of `lanes` float32."""
    from tvm import tirx

    v = Vector(lanes)
    match epilogue.activation:
        case Activation.NONE:
            return x
        case Activation.RELU:
            return tirx.max(x, v(0.0))
        case Activation.CLIP:
            return tirx.min(tirx.max(x, v(epilogue.alpha)), v(epilogue.beta))
        case Activation.LEAKY_RELU:
            return tirx.Select(x < v(0.0), x * v(epilogue.alpha), x)
        case Activation.SIGMOID:
            return v.sigmoid(x)
        case Activation.TANH:
            return v.tanh(x)
        case Activation.GELU:
            x = v.bind(x)
            return v(0.5) * x * (v(1.0) + v.erf(x * v(math.sqrt(0.5))))
        case Activation.GELU_TANH:
            x = v.bind(x)
            return v(0.5) * x * (v(1.0) + v.tanh(v(math.sqrt(2 / math.pi)) * (x + v(0.044715) * x * x * x)))
        case Activation.SILU:
            x = v.bind(x)
            return x * v.sigmoid(v(epilogue.alpha) * x)

"""Between float32 and 8-bit integers: value = scale * (code - zero point)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .lanes import broadcast

if TYPE_CHECKING:
    from .abi import Expr

# What `parameters` holds, by position.
X_SCALE, X_INVERSE, X_ZERO_POINT, Y_INVERSE, Y_ZERO_POINT = range(5)

# Adding 1.5 * 2^23 leaves a small float32's nearest integer, ties to even, in the lower bits.
_ROUND = 12582912.0
_ROUND_BITS = 0x4B400000


def quantized(value: Expr, inverse: Expr, zero_point: Expr, lanes: int) -> Any:
    """uint8 of `lanes` float32: round(value * inverse) + zero point, saturated; NaN becomes 0.

    ONNX's QuantizeLinear divides by the scale; multiplying by its inverse spares a slow instruction, and differs by one
    step where the quotient is within rounding of a tie.

    Args:
        value: float32.
        inverse: of the scale, a scalar.
        zero_point: a whole number as float32, a scalar.
        lanes: of `value`.
    """
    from tvm import tirx
    from tvm.tirx.script import builder as T

    zero = T.Bind(zero_point)
    low, high = broadcast(T.float32(0) - zero, lanes), broadcast(T.float32(255) - zero, lanes)
    shift = broadcast(T.cast(zero, "int32") - T.int32(_ROUND_BITS), lanes)
    near = T.Bind(
        tirx.min(tirx.max(value * broadcast(inverse, lanes), low), high) + broadcast(T.float32(_ROUND), lanes)
    )
    bits = tirx.reinterpret(f"int32x{lanes}" if lanes > 1 else "int32", near)
    return tirx.Cast(f"uint8x{lanes}" if lanes > 1 else "uint8", bits + shift)

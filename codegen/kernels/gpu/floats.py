"""16-bit floats as bits: loads and stores stay vectors of integers, and only the conversions know the format.

A GPU converts a float16 in one instruction, which the reinterpreting casts below become. A bfloat16 is the upper half
of a float32: an integer shift, on every device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .abi import Expr


def widen(stored: Expr, dtype: str) -> Expr:
    """An element of `dtype` as it is stored -> float32, exactly."""
    from tvm.tirx.script import builder as T

    match dtype:
        case "float16":
            return T.cast(T.reinterpret("float16", stored), "float32")
        case "bfloat16":
            return T.reinterpret("float32", T.cast(stored, "uint32") << T.uint32(16))
    return stored


def narrow(value: Expr, dtype: str) -> Expr:
    """A float32 -> `dtype` as it is stored, to nearest even."""
    from tvm.tirx.script import builder as T

    match dtype:
        case "float16":
            return T.reinterpret("uint16", T.cast(value, "float16"))
        case "bfloat16":
            bits = T.Bind(T.reinterpret("uint32", value))
            # Just below a half, and the last bit that stays: a tie goes up only from an odd number.
            rounded = (bits + T.uint32(0x7FFF) + ((bits >> T.uint32(16)) & T.uint32(1))) >> T.uint32(16)
            # The carry would turn some NaNs into infinities or zeros.
            is_nan = (bits & T.uint32(0x7FFFFFFF)) > T.uint32(0x7F800000)
            return T.cast(T.Select(is_nan, T.uint32(0x7FFF), rounded), "uint16")
    return value

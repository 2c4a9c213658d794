"""Products of bfloat16, two inputs at a time: rounding float32 to pairs, and sums of pairs in float32."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .lanes import adjacent, broadcast, shuffle, zeros

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...target import CpuTarget
    from .abi import Buffer, Expr

# Lanes of float32 that the instruction has.
_DOT = (16, 8, 4)
# Its operands as bits: as bfloat16 TVM would give them as float32.
_FUNCTION = """
define internal <{n} x float> @sparsec_dpbf16ps_{n}(<{n} x float> %sum, <{m} x i16> %x, <{m} x i16> %w) alwaysinline {{
  %a = bitcast <{m} x i16> %x to <{m} x bfloat>
  %b = bitcast <{m} x i16> %w to <{m} x bfloat>
  %r = call <{n} x float> @llvm.x86.avx512bf16.dpbf16ps.{bits}(<{n} x float> %sum, <{m} x bfloat> %a, <{m} x bfloat> %b)
  ret <{n} x float> %r
}}
declare <{n} x float> @llvm.x86.avx512bf16.dpbf16ps.{bits}(<{n} x float>, <{m} x bfloat>, <{m} x bfloat>)
"""


def pairs_of(value: Expr, lanes: int) -> Expr:
    """`lanes` / 2 int32 of two bfloat16 each, from `lanes` float32: the nearest, ties to even; NaN stays NaN."""
    from tvm import tirx
    from tvm.tirx.script import builder as T

    bits = T.Bind(tirx.reinterpret(f"uint32x{lanes}", value))
    odd = T.bitwise_and(T.shift_right(bits, broadcast(T.uint32(16), lanes)), broadcast(T.uint32(1), lanes))
    rounded = bits + odd + broadcast(T.uint32(0x7FFF), lanes)
    # Rounding up the bits of a NaN could make it a number.
    is_nan = T.bitwise_and(bits, broadcast(T.uint32(0x7FFFFFFF), lanes)) > broadcast(T.uint32(0x7F800000), lanes)
    rounded = T.Bind(T.Select(is_nan, T.bitwise_or(bits, broadcast(T.uint32(0x400000), lanes)), rounded))
    low, high = (shuffle([rounded], range(first, lanes, 2)) for first in (0, 1))
    half = lanes // 2
    low = T.shift_right(low, broadcast(T.uint32(16), half))
    both = T.bitwise_or(low, T.bitwise_and(high, broadcast(T.uint32(0xFFFF0000), half)))
    return T.Bind(tirx.reinterpret(f"int32x{half}" if half > 1 else "int32", both))


@dataclass(frozen=True)
class PairDot:
    """Accumulates acc[i] += sum over j < 2 of x[j] * w[i, j], for `lanes` outputs i, in float32.

    Attributes:
        lanes: outputs a vector.
        instruction: "vdpbf16ps" (AVX512_BF16), or "" for widening to float32.
    """

    lanes: int
    instruction: str

    @classmethod
    def of(cls, target: CpuTarget, lanes: int) -> PairDot:
        """The best that `target` has for vectors of at most `lanes` outputs."""
        lanes = min(lanes, target.lanes)
        return cls(lanes, "vdpbf16ps" if "avx512bf16" in target.requires and lanes in _DOT else "")

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Where `accumulate` may stand."""
        from tvm.tirx.script import builder as T

        if not self.instruction:
            yield
            return
        text = _FUNCTION.format(n=self.lanes, m=2 * self.lanes, bits=32 * self.lanes)
        with T.attr(T.int32(0), "pragma_import_llvm", text):
            yield

    def zeros(self) -> Buffer:
        """Sums in a register."""
        return zeros(self.lanes)

    def weights(self, codes: Expr) -> tuple[Expr, ...]:
        """Operands from 2 * `lanes` bfloat16 as bits, two inputs of an output adjacent."""
        from tvm import tirx
        from tvm.tirx.script import builder as T

        codes = T.Bind(codes)
        if self.instruction:
            return (codes,)
        return self._widened(tirx.reinterpret(self._of("uint32"), codes), self.lanes)

    def inputs(self, pair: Expr) -> tuple[Expr, ...]:
        """Operands from two bfloat16 in an int32, for all lanes."""
        from tvm import tirx
        from tvm.tirx.script import builder as T

        if self.instruction:
            return (T.Bind(tirx.reinterpret(f"uint16x{2 * self.lanes}", broadcast(pair, self.lanes))),)
        both = self._widened(tirx.reinterpret("uint32", T.Bind(pair)), 1)
        return tuple(T.Bind(broadcast(one, self.lanes)) for one in both)

    def accumulate(self, acc: Buffer, x: tuple[Expr, ...], w: tuple[Expr, ...]) -> None:
        """Emit the sum."""
        from tvm.tirx.script import builder as T

        value = acc[self._all]
        if self.instruction:
            value = T.call_extern(self._of("float32"), f"sparsec_dpbf16ps_{self.lanes}", value, x[0], w[0])
        else:
            for a, b in zip(x, w, strict=True):
                value = value + a * b
        T.buffer_store(acc, value, [self._all])

    def total(self, chains: list[Buffer]) -> Expr:
        """The sum of several sums."""
        return sum((chain[self._all] for chain in chains[1:]), chains[0][self._all])

    @property
    def _all(self) -> Any:
        from tvm.tirx.script import builder as T

        return adjacent(T.int64(0), self.lanes)

    def _of(self, base: str) -> str:
        return f"{base}x{self.lanes}" if self.lanes > 1 else base

    def _widened(self, both: Expr, lanes: int) -> tuple[Expr, ...]:
        """The lower and the upper half of uint32 as float32: a bfloat16 is float32's upper half."""
        from tvm import tirx
        from tvm.tirx.script import builder as T

        both, kind = T.Bind(both), f"float32x{lanes}" if lanes > 1 else "float32"
        low = T.shift_left(both, broadcast(T.uint32(16), lanes))
        high = T.bitwise_and(both, broadcast(T.uint32(0xFFFF0000), lanes))
        return tuple(T.Bind(tirx.reinterpret(kind, half)) for half in (low, high))

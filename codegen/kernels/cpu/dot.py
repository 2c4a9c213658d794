"""Sums of four products of unsigned and signed 8-bit integers in int32, with the instructions that a target has."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .lanes import adjacent, broadcast, shuffle

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from ...target import CpuTarget
    from .abi import Buffer, Expr

# By lanes of int32.
_VNNI = {16: "llvm.x86.avx512.vpdpbusd.512", 8: "llvm.x86.avx512.vpdpbusd.256", 4: "llvm.x86.avx512.vpdpbusd.128"}
_MADD = {16: "llvm.x86.avx512.pmaddw.d.512", 8: "llvm.x86.avx2.pmadd.wd", 4: "llvm.x86.sse2.pmadd.wd"}


@dataclass(frozen=True)
class Dot:
    """Accumulates acc[i] += sum over j < 4 of x[j] * w[i, j], for `lanes` outputs i; exact.

    Attributes:
        lanes: outputs a vector.
        instruction: "vpdpbusd" (AVX-512 VNNI and AVX-VNNI), "pmaddwd" (every x86-64: products of 16 bits, so that
            nothing saturates as in `pmaddubsw`), or "" for plain arithmetic.
    """

    lanes: int
    instruction: str

    @classmethod
    def of(cls, target: CpuTarget, lanes: int) -> Dot:
        """The best that `target` has for vectors of at most `lanes` outputs."""
        if target.arch != "x86_64" or lanes < 4:
            return cls(lanes, "")
        lanes = min(lanes, target.lanes)
        if "avx512vnni" in target.requires or ("avxvnni" in target.requires and lanes <= 8):
            return cls(lanes, "vpdpbusd")
        # 32 products of 16 bits need AVX-512 BW.
        return cls(lanes if "avx512bw" in target.requires else min(lanes, 8), "pmaddwd")

    def scope(self) -> AbstractContextManager[None]:
        """Where `accumulate` may stand: anywhere."""
        return nullcontext()

    def zeros(self) -> Buffer:
        """Sums in a register."""
        from tvm.tirx.script import builder as T

        buffer = T.alloc_buffer((self.lanes,), "int32")
        T.buffer_store(buffer, broadcast(T.int32(0), self.lanes), [self._all])
        return buffer

    def weights(self, codes: Expr) -> tuple[Expr, ...]:
        """Operands from 4 * `lanes` int8, four inputs of an output adjacent."""
        from tvm.tirx.script import builder as T

        match self.instruction:
            case "vpdpbusd":
                return (T.Bind(codes),)
            case "pmaddwd":
                return self._split(codes, signed=True)
            case _:
                return self._extended(T.Bind(codes))

    def inputs(self, four: Expr) -> tuple[Expr, ...]:
        """Operands from four uint8 in an int32, for all lanes."""
        from tvm.tirx.script import builder as T

        match self.instruction:
            case "vpdpbusd":
                return (T.Bind(T.reinterpret(f"int8x{4 * self.lanes}", broadcast(four, self.lanes))),)
            case "pmaddwd":
                return self._split(broadcast(four, self.lanes), signed=False)
            case _:
                codes = T.Bind(T.reinterpret("uint8x4", four))
                return tuple(T.Bind(broadcast(T.Cast("int32", shuffle([codes], [j])), self.lanes)) for j in range(4))

    def _extended(self, codes: Expr) -> tuple[Expr, ...]:
        """Each of four bytes of every lane as int32.

        By casts: shifts of whole lanes are what LLVM 22 turns into wrong code where it makes vectors of them.
        """
        from tvm import tirx
        from tvm.tirx.script import builder as T

        return tuple(T.Bind(tirx.Cast(self._type, shuffle([codes], range(j, 4 * self.lanes, 4)))) for j in range(4))

    def accumulate(self, acc: Buffer, x: tuple[Expr, ...], w: tuple[Expr, ...]) -> None:
        """Emit the sum."""
        from tvm.tirx.script import builder as T

        value = acc[self._all]
        if self.instruction == "vpdpbusd":
            value = T.call_llvm_intrin(self._type, _VNNI[self.lanes], value, x[0], w[0])
        else:
            for a, b in zip(x, w, strict=True):
                value = value + (
                    T.call_llvm_intrin(self._type, _MADD[self.lanes], a, b) if self.instruction == "pmaddwd" else a * b
                )
        T.buffer_store(acc, value, [self._all])

    def total(self, chains: list[Buffer]) -> Expr:
        """The sum of several sums."""
        return sum((chain[self._all] for chain in chains[1:]), chains[0][self._all])

    @property
    def _type(self) -> str:
        return f"int32x{self.lanes}" if self.lanes > 1 else "int32"

    @property
    def _all(self) -> Any:
        from tvm.tirx.script import builder as T

        return adjacent(T.int64(0), self.lanes)

    def _as(self, value: Expr, kind: str = "int16") -> Expr:
        """The same bits as vectors of 16 bits."""
        from tvm.tirx.script import builder as T

        return T.reinterpret(f"{kind}x{2 * self.lanes}", value)

    def _split(self, value: Expr, signed: bool) -> tuple[Expr, ...]:
        """The lower and the upper byte of every 16 bits, extended to 16."""
        from tvm.tirx.script import builder as T

        kind = "int16" if signed else "uint16"
        eight = broadcast(T.Cast(kind, T.int32(8)), 2 * self.lanes)
        value = T.Bind(self._as(value, kind))
        # To the top, and back down with the sign or with zeros.
        parts = (T.shift_right(T.shift_left(value, eight), eight), T.shift_right(value, eight))
        return tuple(T.Bind(self._as(part)) for part in parts)

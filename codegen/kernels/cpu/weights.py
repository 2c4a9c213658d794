"""Packed values as float32, whatever they are stored as; scales that a whole output shares wait for `store`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ....ir.sparse_matrix import code_unit
from ....ir.values import Codebook, Floats, Int8
from .lanes import adjacent, broadcast, shuffle

if TYPE_CHECKING:
    from ....ir.values import Values
    from ...problem import Problem
    from ...target import CpuTarget
    from .abi import Arguments, Expr


def is_flat(values: Values) -> bool:
    """Whether a value can be read wherever it lies, without knowing of which output and input it is."""
    return values.bits >= 8 and not (isinstance(values, Int8) and values.group)


@dataclass(frozen=True)
class Weights:
    """Reads the values of one panel.

    Attributes:
        first: index of the panel's first value (`Panel.values`).
        output: the panel's first output.
    """

    problem: Problem
    args: Arguments
    target: CpuTarget
    first: Expr
    output: Expr

    def vector(self, t: Expr, c: Expr, column: Expr, offset: int, lanes: int) -> Expr:
        """The weights of outputs `offset` to `offset + lanes - 1` of the panel, at input c of block t.

        Args:
            t: block of the panel.
            c: input of the block.
            column: that input's number among all inputs.
            offset: a multiple of `lanes`.
            lanes: a power of two that divides the panel.
        """
        at = self._at(t, c) + offset
        match self.problem.values:
            case Int8(group) if group:
                value = _cast(self.args.values[adjacent(at, lanes)], "float32", lanes)
                return value * self._scales(column, group, offset, lanes)
            case Codebook(16) if lanes == 1:
                return self.args.table[self._half_code(at, offset)]
            case Codebook(16):
                return self._look_up(self._half_codes(at, lanes), lanes)
            case _:
                return self.flat(t, c, offset, lanes)

    def flat(self, t: Expr, c: Expr, offset: int, lanes: int) -> Expr:
        """`lanes` values as they lie in memory from there on, for kinds where `is_flat`."""
        codes = self.args.values[adjacent(self._at(t, c) + offset, lanes)]
        match self.problem.values:
            case Floats(name):
                return _widened(codes, name, lanes)
            case Int8():
                return _cast(codes, "float32", lanes)
            case _:
                return self._gathered(_cast(codes, "int32", lanes), lanes)

    def _at(self, t: Expr, c: Expr) -> Expr:
        return self.first + (t * self.problem.block[1] + c) * self.problem.panel

    def _scales(self, column: Expr, group: int, offset: int, lanes: int) -> Expr:
        from tvm.tirx.script import builder as T

        return self.args.table[
            adjacent(T.truncdiv(column, T.int64(group)) * self.problem.out_features + self.output + offset, lanes)
        ]

    def _look_up(self, codes: Expr, lanes: int) -> Expr:
        """The table's entries at the lower 4 bits of `codes`, int32."""
        from tvm.tirx.script import builder as T

        if lanes == 16 and "avx512f" in self.target.requires:
            table = self.args.table[adjacent(T.int64(0), 16)]
            return T.call_llvm_intrin("float32x16", "llvm.x86.avx512.permvar.sf.512", table, codes)
        return self.args.table[T.bitwise_and(codes, broadcast(T.int32(15), lanes))]

    def _gathered(self, codes: Expr, lanes: int) -> Expr:
        """The table's entries at `codes`, int32; LLVM would load them one by one."""
        from tvm.tirx.script import builder as T

        if lanes != 16 or "avx512f" not in self.target.requires:
            return self.args.table[codes]
        zeros, everywhere = broadcast(T.float32(0), 16), broadcast(T.bool(True), 16)
        table = T.address_of(self.args.table[T.int64(0)])
        return T.call_llvm_intrin(
            "float32x16", "llvm.x86.avx512.mask.gather.dps.512", zeros, table, codes, everywhere, T.int32(4)
        )

    def _half_codes(self, at: Expr, lanes: int) -> Expr:
        """`lanes` codes of 4 bits, a whole unit: int32, with other bits above the 4."""
        from tvm.tirx.script import builder as T

        half = lanes // 2
        bytes_ = self.args.values[adjacent(T.truncdiv(at, T.int64(2)), half)]
        codes = T.Bind(_cast(bytes_, "int32", half))
        twice = shuffle([codes, codes], range(lanes)) if lanes > 2 else shuffle([codes, codes], [0, 1])
        shifts = T.Shuffle([broadcast(T.int32(0), half), broadcast(T.int32(4), half)], list(range(lanes)))
        return T.Bind(T.shift_right(twice, shifts))

    def _half_code(self, at: Expr, offset: int) -> Expr:
        """One code of 4 bits, int32."""
        from tvm.tirx.script import builder as T

        panel = self.problem.panel
        unit = code_unit(panel)
        if panel % unit:  # no whole units: pairs, wherever the panel begins
            byte, high = T.truncdiv(at, T.int64(2)), T.cast(T.truncmod(at, T.int64(2)), "int32") * 4
        else:
            within = offset % unit
            byte = T.truncdiv(at - within, T.int64(2)) + within % (unit // 2)
            high = T.int32(4 * (within // (unit // 2)))
        return T.bitwise_and(T.shift_right(T.cast(self.args.values[byte], "int32"), high), T.int32(15))


def _cast(value: Expr, base: str, lanes: int) -> Any:
    from tvm import tirx

    return tirx.Cast(f"{base}x{lanes}" if lanes > 1 else base, value)


def _widened(value: Expr, name: str, lanes: int) -> Any:
    """Floats to float32; bfloat16 is float32's upper half."""
    from tvm import tirx
    from tvm.tirx.script import builder as T

    if name == "float32":
        return value
    if name == "float16":
        return _cast(value, "float32", lanes)
    bits = T.shift_left(_cast(value, "uint32", lanes), broadcast(T.uint32(16), lanes))
    return tirx.reinterpret(f"float32x{lanes}" if lanes > 1 else "float32", bits)

"""Rows of X to 8-bit codes or bfloat16, adjacent inputs in an int32, the rows of a tile beside each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .bfloat16 import pairs_of
from .lanes import adjacent, broadcast, shuffle
from .quantize import X_INVERSE, X_ZERO_POINT, quantized

if TYPE_CHECKING:
    from ...problem import Problem
    from .abi import Arguments, Expr

# Inputs at a time: a vector of float32, and four int32 of codes, or eight of pairs.
_WIDE = 16


@dataclass(frozen=True)
class Packed:
    """Where a tile's codes lie in the workspace.

    Attributes:
        rows: of the tile.
    """

    problem: Problem
    rows: int

    @property
    def stride(self) -> int:
        """int32 from some inputs to the next: a power of two, so that a cache line or less holds all rows."""
        return 1 << (self.rows - 1).bit_length()

    @property
    def codes(self) -> int:
        """int32 of all codes."""
        return self.problem.in_features // self.problem.together * self.stride

    @property
    def size(self) -> int:
        """int32 of codes and rows' parameters."""
        return self.codes + (2 * self.rows if self.problem.x == "dynamic" else 0)

    def scale(self, r: Expr) -> Expr:
        """Place of a row's scale, as bits."""
        return self.codes + r

    def zero_point(self, r: Expr) -> Expr:
        """Place of a row's zero point, int32."""
        return self.codes + self.rows + r


def pack_quantized(args: Arguments, row: Expr, packed: Packed) -> None:
    """Emit `workspace[k / 4 * stride + r] = codes of x[row + r, k .. k + 3]` for all rows of the tile.

    Of bfloat16 there are two to an int32.
    """
    from tvm.tirx.script import builder as T

    emitter = _Packer(args, packed)
    fours = packed.rows // 4
    if fours:
        with T.serial(T.int64(fours)) as i:
            emitter.rows(row, i * 4, 4)
    for r in range(fours * 4, packed.rows):
        emitter.rows(row, T.int64(r), 1)


class _Packer:
    """Emits the packing of one tile."""

    def __init__(self, args: Arguments, packed: Packed) -> None:
        from tvm.tirx.script import builder

        self.T: Any = builder
        self.args, self.packed, self.problem = args, packed, packed.problem

    def rows(self, row: Expr, first: Expr, count: int) -> None:
        """Rows `first` to `first + count - 1` of the tile: one, or four."""
        T, inputs = self.T, self.problem.in_features
        scales = [self.parameters(row + first + r, first + r) for r in range(count)]
        whole = inputs // _WIDE * _WIDE
        if whole:
            with T.serial(T.int64(whole // _WIDE)) as i:
                self.inputs(row, first, scales, i * _WIDE, _WIDE)
        for k in range(whole, inputs, self.problem.together):
            self.inputs(row, first, scales, T.int64(k), self.problem.together)

    def inputs(self, row: Expr, first: Expr, scales: list[tuple[Expr, Expr]], k: Expr, count: int) -> None:
        """Inputs k to k + count - 1 of the rows."""
        T, packed, together = self.T, self.packed, self.problem.together
        n = count // together
        codes = [T.Bind(self.codes(row + first + r, k, count, *scale)) for r, scale in enumerate(scales)]
        start = T.truncdiv(k, T.int64(together)) * packed.stride + first
        if len(codes) == 1 and packed.stride == 1:
            T.buffer_store(self.args.workspace, codes[0], [adjacent(start, n)])
            return
        for j in range(n):
            column = shuffle(codes, [n * r + j for r in range(len(codes))]) if n > 1 or len(codes) > 1 else codes[0]
            T.buffer_store(self.args.workspace, column, [adjacent(start + j * packed.stride, len(codes))])

    def codes(self, row: Expr, k: Expr, count: int, inverse: Expr, zero_point: Expr) -> Expr:
        """`count` codes of a row of X, as int32."""
        T = self.T
        where = adjacent(row * self.problem.in_features + k, count)
        value = self.args.x[where]
        if self.problem.x == "bfloat16":
            return pairs_of(value, count)
        if self.problem.x != "uint8":
            value = quantized(value, inverse, zero_point, count)
        return T.reinterpret(f"int32x{count // 4}" if count > 4 else "int32", value)

    def parameters(self, row: Expr, r: Expr) -> tuple[Expr, Expr]:
        """Inverse of the scale and zero point (float32) of a row; where they are its own, they are kept."""
        T, args, packed = self.T, self.args, self.packed
        if self.problem.x != "dynamic":
            return args.parameters[X_INVERSE], args.parameters[X_ZERO_POINT]
        least, largest = self.extremes(row)
        # Zero is a code, and a row of zeros has some scale.
        scale = T.Bind(T.max((largest - least) / T.float32(255), T.float32(1e-30)))
        inverse = T.Bind(T.float32(1) / scale)
        zero_point = T.Bind(T.nearbyint(T.float32(0) - least * inverse))
        T.buffer_store(args.workspace, T.reinterpret("int32", scale), [packed.scale(r)])
        T.buffer_store(args.workspace, T.cast(zero_point, "int32"), [packed.zero_point(r)])
        return inverse, zero_point

    def extremes(self, row: Expr) -> tuple[Expr, Expr]:
        """The least and the largest of a row and zero."""
        from tvm import tirx

        T, inputs = self.T, self.problem.in_features
        lanes = _WIDE if inputs >= _WIDE else 4
        both = [T.alloc_buffer((lanes,)) for _ in range(2)]
        whole = adjacent(T.int64(0), lanes)
        for buffer in both:
            T.buffer_store(buffer, broadcast(T.float32(0), lanes), [whole])
        with T.serial(T.int64(-(-inputs // lanes))) as i:
            # The last vector moves back inside.
            value = T.Bind(self.args.x[adjacent(row * inputs + T.min(i * lanes, T.int64(inputs - lanes)), lanes)])
            for buffer, choose in zip(both, (tirx.min, tirx.max), strict=True):
                T.buffer_store(buffer, choose(value, buffer[whole]), [whole])
        found = []
        for buffer, choose in zip(both, (tirx.min, tirx.max), strict=True):
            value, width = T.Bind(buffer[whole]), lanes
            while width > 1:
                width //= 2
                value = T.Bind(choose(shuffle([value], range(width)), shuffle([value], range(width, 2 * width))))
            found.append(value)
        return found[0], found[1]

"""Products of several inputs at a time: one panel of adjacent outputs times a tile of rows in registers.

    for tile of rows:
        round X[tile, :] -> workspace[k / 4, row], four integers of 8 bits an int32, or two bfloat16
        for panel:
            acc[tile_rows, panel] = 0
            for block t, four inputs c:
                acc[r, :] += dot(workspace[(indices[t] + c) / 4, r], values[t, c, :])
            Y[tile, panel] = epilogue((acc - zero point * sums) * scale of X * scales of W)

Of bfloat16 Y is the epilogue of acc, which is float32.

Codes of X are unsigned, those of W signed, sums int32: exact, because 4 products fit the instruction's sum and K of
them an int32 as long as K < 2^31 / (255 * 128) = 65,793 (`MAX_INTEGER_INPUTS`). With the zero point of X its product is
sum (x - z) w = sum x w - z sum w, of which the last sum is a constant of the weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .abi import function
from .bfloat16 import PairDot
from .blocks import Panel, each_input, each_tile
from .dot import Dot
from .lanes import adjacent, broadcast, whole_lanes
from .quantize import X_SCALE, X_ZERO_POINT
from .quantize_rows import Packed, pack_quantized
from .store import store_panel

if TYPE_CHECKING:
    from ...problem import Problem
    from ...target import CpuTarget
    from .abi import Arguments, Expr
    from .schedule import Schedule


def workspace(problem: Problem, schedule: Schedule) -> int:
    """int32 of scratch memory a call needs: the packed tile, and what else a row of it has."""
    return Packed(problem, schedule.tile_rows).size


def emit(problem: Problem, schedule: Schedule, symbol: str, target: CpuTarget) -> Any:
    """The TVM function `symbol` for this problem and schedule."""
    from tvm.script.ir_builder import IRBuilder

    with IRBuilder() as builder, function(problem, symbol, workspace(problem, schedule)) as args:
        emitter = _Emitter(problem, schedule, args, target)
        with emitter.dot.scope():
            each_tile(args, schedule.tile_rows, emitter.tile)
    return builder.get()


class _Emitter:
    """Emits one function; its methods are the loop nest from the outside in."""

    def __init__(self, problem: Problem, schedule: Schedule, args: Arguments, target: CpuTarget) -> None:
        from tvm.tirx.script import builder

        self.T: Any = builder
        self.problem, self.schedule, self.args = problem, schedule, args
        kind = Dot if problem.integers else PairDot
        self.dot: Dot | PairDot = kind.of(target, whole_lanes(problem.panel))
        self.vectors = problem.panel // self.dot.lanes

    def tile(self, row: Expr, rows: int) -> None:
        """All panels of the call for the `rows` rows from `row` on."""
        T, args, packed = self.T, self.args, Packed(self.problem, rows)
        pack_quantized(args, row, packed)
        with T.serial(args.panel_end - args.panel_begin) as i:
            panel = args.panel_begin + i
            at = Panel.locate(self.problem, args, panel)
            sums = self.sums(at, packed)

            def scaled(value: Expr, r: int, output: Expr, lanes: int) -> Expr:
                return self.scaled(value, packed, r, output, lanes)

            scales = scaled if self.problem.integers else None
            store_panel(self.problem, args, row, panel, at.output, sums, self.dot.lanes, scales)

    def sums(self, at: Panel, packed: Packed) -> list[list[Expr]]:
        """Emit the loop over the blocks; returns expressions [row][vector] of the sums, int32 or float32."""
        T, p, args, dot, one = self.T, self.problem, self.args, self.dot, self.problem.together
        chains = max(1, self.schedule.accumulators // (packed.rows * self.vectors))
        acc = [[[dot.zeros() for _ in range(self.vectors)] for _ in range(packed.rows)] for _ in range(chains)]
        several = p.block[1] // one

        def step(t: Expr, c: Expr, chain: int) -> None:
            """All rows and vectors for the inputs of number c of block t."""
            line = (T.truncdiv(T.cast(args.indices[at.first + t], "int64"), T.int64(one)) + c) * packed.stride
            values = at.values + (t * several + c) * (one * p.panel)
            weights = [
                dot.weights(args.values[adjacent(values + v * one * dot.lanes, one * dot.lanes)])
                for v in range(self.vectors)
            ]
            for r in range(packed.rows):
                x = dot.inputs(args.workspace[line + r])
                for v in range(self.vectors):
                    dot.accumulate(acc[chain][r][v], x, weights[v])

        each_input(at.count, several, chains, step)
        return [
            [dot.total([acc[c][r][v] for c in range(chains)]) for v in range(self.vectors)] for r in range(packed.rows)
        ]

    def scaled(self, value: Expr, packed: Packed, r: int, output: Expr, lanes: int) -> Expr:
        """The product of a row as float32, for `lanes` outputs from one on."""
        from tvm import tirx

        T, args, outputs = self.T, self.args, adjacent(output, lanes)
        scale, zero_point = self.row(packed, r)
        exact = value - args.sums[outputs] * broadcast(zero_point, lanes)
        value = tirx.Cast(f"float32x{lanes}" if lanes > 1 else "float32", exact)
        return T.Bind(value * (args.table[outputs] * broadcast(scale, lanes)))

    def row(self, packed: Packed, r: int) -> tuple[Expr, Expr]:
        """Scale and zero point (int32) of a row of X."""
        T, args = self.T, self.args
        if self.problem.x == "dynamic":
            return T.reinterpret("float32", args.workspace[packed.scale(r)]), args.workspace[packed.zero_point(r)]
        return args.parameters[X_SCALE], T.cast(args.parameters[X_ZERO_POINT], "int32")

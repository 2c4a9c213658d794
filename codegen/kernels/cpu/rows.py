"""Vectors along the rows of X, for blocks of few outputs: one panel times a tile of rows in registers.

    for tile of rows:
        pack X[tile, :] -> workspace[k, row]
        for group of panels:
            for panel:
                acc[width, tile_rows] = 0
                for block t, input c:
                    acc[r, :] += values[t, c, r] * workspace[indices[t] + c, :]
                stage[r, :] = acc[r, :]
            Y[tile, group] = epilogue(transpose(stage))

Every weight is one broadcast and a multiply-add a vector of rows, however narrow the blocks are: for unstructured
sparsity this is the loop of Elsen et al. 2020, "Fast Sparse ConvNets". What bounds it is the second-level cache, from
which the packed inputs come; the more rows, the more an index brings (Cascade Lake, 1 x 1, 90 % zeros, 1024 inputs: 26
GFLOP/s a core with 16 rows, 36 with 32 or 64, where vectors along the outputs reach 10; 4 x 4: 59 to 90, and 27).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .abi import function
from .blocks import Panel, each_input
from .lanes import WIDE, adjacent, broadcast, shuffle, transpose, whole_lanes, zeros
from .pack import pack_rows
from .stage import each_group, each_vector, room, width
from .store import store
from .weights import Weights

if TYPE_CHECKING:
    from ...problem import Problem
    from ...target import CpuTarget
    from .abi import Arguments, Expr
    from .schedule import Schedule

# Rows of the tiles for the rows that large tiles leave.
_SMALL_TILE = 16


def workspace(problem: Problem, schedule: Schedule) -> int:
    """float32 of scratch memory a call needs: the packed tile, and after it the stage."""
    return schedule.tile_rows * (problem.in_features + room(problem))


def emit(problem: Problem, schedule: Schedule, symbol: str, target: CpuTarget) -> Any:
    """The TVM function `symbol` for this problem and schedule."""
    from tvm.script.ir_builder import IRBuilder

    with IRBuilder() as builder, function(problem, symbol, workspace(problem, schedule)) as args:
        _each_tile(problem, schedule, args, target)
    return builder.get()


def _each_tile(problem: Problem, schedule: Schedule, args: Arguments, target: CpuTarget) -> None:
    """All rows of the call: tiles of `tile_rows`, of which the last may lack rows.

    Where it would lack half of them and more, the rest of the rows are done in small tiles instead.
    """
    from tvm.tirx.script import builder as T

    size, rows = schedule.tile_rows, args.row_end - args.row_begin
    lacking = size // 2 - 1 if size > _SMALL_TILE else size - 1
    large = T.Bind(T.truncdiv(rows + lacking, T.int64(size)))
    _Emitter(problem, schedule, args, target, size).tiles(args.row_begin, large)
    if size > _SMALL_TILE:
        rest = T.Bind(args.row_begin + T.min(large * size, rows))
        small = T.ceildiv(args.row_end - rest, T.int64(_SMALL_TILE))
        _Emitter(problem, schedule, args, target, _SMALL_TILE).tiles(rest, small)


class _Emitter:
    """Emits the code for tiles of one size; its methods are the loop nest from the outside in."""

    def __init__(self, problem: Problem, schedule: Schedule, args: Arguments, target: CpuTarget, rows: int) -> None:
        from tvm.tirx.script import builder

        self.T: Any = builder
        self.problem, self.args, self.target, self.rows = problem, args, target, rows
        self.lanes = whole_lanes(self.rows)
        self.vectors = self.rows // self.lanes
        self.width = width(problem)
        self.chains = max(1, schedule.accumulators // (self.width * self.vectors))
        self.stage = problem.in_features * self.rows

    def tiles(self, begin: Expr, count: Expr) -> None:
        """`count` tiles from row `begin` on."""
        T, args = self.T, self.args
        with T.serial(count) as i:
            row = T.Bind(begin + i * self.rows)
            valid = T.Bind(T.min(T.int64(self.rows), args.row_end - row))
            self.pack(row, valid)
            each_group(self.problem, args, self.panel, lambda output, count: self.store(row, valid, output, count))

    def pack(self, row: Expr, valid: Expr) -> None:
        """The tile's inputs to the workspace; rows that it lacks are zeros, not what the memory held."""
        T, args, inputs = self.T, self.args, self.problem.in_features
        with T.If(valid < self.rows), T.Then(), T.serial(T.int64(inputs * self.vectors)) as i:
            where = adjacent(i * self.lanes, self.lanes)
            T.buffer_store(args.workspace, broadcast(T.float32(0), self.lanes), [where])
        pack_rows(args, row, valid, self.rows, inputs)

    def panel(self, panel: Expr, place: Expr) -> None:
        """The sums of one panel, to its place in the stage."""
        T, p, args = self.T, self.problem, self.args
        at = Panel.locate(p, args, panel)
        acc = [
            [[zeros(self.lanes) for _ in range(self.vectors)] for _ in range(self.width)] for _ in range(self.chains)
        ]
        whole = adjacent(T.int64(0), self.lanes)
        weights = Weights(p, args, self.target, at.values, at.output)

        def step(t: Expr, c: Expr, chain: int) -> None:
            """All outputs and rows for input c of block t."""
            column = T.Bind(T.cast(args.indices[at.first + t], "int64") + c)
            packed = column * self.rows
            x = [T.Bind(args.workspace[self.vector(packed, v)]) for v in range(self.vectors)]
            for r in range(self.width):
                weight = T.Bind(broadcast(weights.vector(t, c, column, r, 1), self.lanes))
                for v in range(self.vectors):
                    target = acc[chain][r][v]
                    T.buffer_store(target, target[whole] + x[v] * weight, [whole])

        each_input(at.count, p.block[1], self.chains, step)
        for r in range(self.width):
            for v in range(self.vectors):
                total = sum((acc[chain][r][v][whole] for chain in range(1, self.chains)), acc[0][r][v][whole])
                T.buffer_store(args.workspace, total, [self.vector(self.stage + (place + r) * self.rows, v)])

    def vector(self, start: Expr, number: int) -> Expr:
        """The index of a vector of rows of the line of the tile that begins at `start`."""
        return adjacent(start + number * self.lanes, self.lanes)

    def store(self, row: Expr, valid: Expr, output: Expr, count: Expr) -> None:
        """Y[row ..., output ...] = epilogue(stage), `valid` rows and `count` outputs."""
        T = self.T
        fours = T.truncdiv(valid, T.int64(4))

        def vector(n: Expr) -> None:
            with T.serial(fours) as four:
                sums = self.transposed(n, four * 4)
                store(self.problem, self.args, row + four * 4, output + n, [[v] for v in sums], WIDE)
            with T.serial(valid - fours * 4) as r, T.serial(T.int64(WIDE)) as i:
                single(fours * 4 + r, n + i)

        def single(r: Expr, n: Expr) -> None:
            value = self.args.workspace[self.stage + n * self.rows + r]
            store(self.problem, self.args, row + r, output + n, [[value]], 1)

        def column(n: Expr) -> None:
            with T.serial(valid) as r:
                single(r, n)

        each_vector(count, vector, column)

    def transposed(self, n: Expr, r: Expr) -> list[Expr]:
        """Rows r to r+3 of the stage, each a vector of the outputs n to n+15."""
        T = self.T

        def rows(output: int) -> Expr:
            return self.args.workspace[adjacent(self.stage + (n + output) * self.rows + r, 4)]

        # Lane 4i + j of vector k is row r+j of output n + 4i + k.
        four = [shuffle([rows(4 * i + k) for i in range(4)], range(WIDE)) for k in range(4)]
        return transpose([T.Bind(vector) for vector in four])

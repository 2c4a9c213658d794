"""Vectors along the outputs: one panel of adjacent outputs times a tile of rows in registers.

    for tile of rows:
        pack X[tile, :] -> workspace[k, row]
        for panel:
            acc[tile_rows, panel] = 0
            for block t, input c:
                acc[r, :] += X[r, indices[t] + c] * values[t, c, :]
            Y[tile, panel] = epilogue(acc)

Every input of a block is one broadcast a row and one load a vector of weights. With two vectors of 16 outputs and 14
rows the loop is 28 multiply-adds for 17 loads; packed inputs and weights are prefetched, because the gather over the
inputs is what a processor cannot foresee (Cascade Lake, weights in the third-level cache: 78 -> 107 GFLOP/s a core).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .abi import function
from .blocks import Panel, each_input, each_tile
from .lanes import adjacent, broadcast, shuffle, whole_lanes, zeros
from .pack import pack_rows
from .store import store_panel
from .weights import Weights

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from ...problem import Problem
    from ...target import CpuTarget
    from .abi import Arguments, Buffer, Expr
    from .schedule import Schedule

    # Where X[row of the tile, input] is: a buffer and an index.
    Locate: TypeAlias = Callable[[int, Expr], tuple[Buffer, Expr]]

_LINE_BYTES = 64


def _stride(schedule: Schedule) -> int:
    """float32 between two inputs of a packed tile: a half or a whole cache line, so that none is split over two."""
    return 8 if schedule.tile_rows <= 8 else 16


def workspace(problem: Problem, schedule: Schedule) -> int:
    """float32 of scratch memory a call needs."""
    return _stride(schedule) * problem.in_features if schedule.pack else 0


def emit(problem: Problem, schedule: Schedule, symbol: str, target: CpuTarget) -> Any:
    """The TVM function `symbol` for this problem and schedule."""
    from tvm.script.ir_builder import IRBuilder

    with IRBuilder() as builder, function(problem, symbol, workspace(problem, schedule)) as args:
        _Emitter(problem, schedule, args, target).body()
    return builder.get()


class _Emitter:
    """Emits one function; its methods are the loop nest from the outside in."""

    def __init__(self, problem: Problem, schedule: Schedule, args: Arguments, target: CpuTarget) -> None:
        from tvm.tirx.script import builder

        self.T: Any = builder
        self.problem, self.schedule, self.args, self.target = problem, schedule, args, target
        self.lanes = whole_lanes(problem.panel)
        self.vectors = problem.panel // self.lanes

    def body(self) -> None:
        T = self.T
        self.last_block = T.Bind(T.cast(self.args.indptr[self.problem.block_rows], "int64") - 1)
        each_tile(self.args, self.schedule.tile_rows, self.tile)

    def tile(self, row: Expr, rows: int) -> None:
        """All panels of the call for the `rows` rows from `row` on; less than a whole tile is not packed."""
        T, args, k = self.T, self.args, self.problem.in_features
        pack = self.schedule.pack and rows == self.schedule.tile_rows
        if pack:
            stride = _stride(self.schedule)
            x_at: Locate = lambda r, i: (args.workspace, i * stride + r)  # noqa: E731
            pack_rows(args, row, T.int64(rows), stride, k)
        else:
            x_at = lambda r, i: (args.x, (row + r) * k + i)  # noqa: E731
        with T.serial(args.panel_end - args.panel_begin) as i:
            panel = args.panel_begin + i
            at = Panel.locate(self.problem, args, panel)
            paired = pack and self.schedule.pairs and self.vectors == 1 and self.lanes > 1 and rows % 2 == 0
            sums = self.paired_sums(rows, at, x_at) if paired else self.sums(rows, at, x_at, prefetch_x=pack)
            store_panel(self.problem, args, row, panel, at.output, sums, self.lanes)

    def sums(self, size: int, at: Panel, x_at: Locate, prefetch_x: bool) -> list[list[Expr]]:
        """Emit the loop over the blocks; returns expressions [row][vector] of the sums."""
        T, p, args = self.T, self.problem, self.args
        chains = max(1, self.schedule.accumulators // (size * self.vectors))
        acc = [[[zeros(self.lanes) for _ in range(self.vectors)] for _ in range(size)] for _ in range(chains)]
        whole = adjacent(T.int64(0), self.lanes)
        weights = Weights(p, args, self.target, at.values, at.output)

        def step(t: Expr, c: Expr, chain: int) -> None:
            """All rows and vectors for input c of block t."""
            column = T.cast(args.indices[at.first + t], "int64") + c
            self.prefetch(at.first + t, c, at.values + (t * p.block[1] + c) * p.panel, x_at if prefetch_x else None)
            weight = [T.Bind(weights.vector(t, c, column, v * self.lanes, self.lanes)) for v in range(self.vectors)]
            for r in range(size):
                buffer, where = x_at(r, column)
                x = broadcast(buffer[where], self.lanes)
                for v in range(self.vectors):
                    target = acc[chain][r][v]
                    T.buffer_store(target, target[whole] + x * weight[v], [whole])

        each_input(at.count, p.block[1], chains, step)
        return [
            [sum((acc[c][r][v][whole] for c in range(1, chains)), acc[0][r][v][whole]) for v in range(self.vectors)]
            for r in range(size)
        ]

    def paired_sums(self, size: int, at: Panel, x_at: Locate) -> list[list[Expr]]:
        """The same for a panel of one vector, two rows a register.

        A broadcast of two rows' inputs (64 bits, which a load does for nothing) meets the weights of half a panel, each
        twice: one load serves two multiply-adds, as it does in a panel of two vectors.
        """
        T, p, args, lanes = self.T, self.problem, self.args, self.lanes
        half = lanes // 2
        acc = [[zeros(lanes) for _ in range(2)] for _ in range(size // 2)]
        whole = adjacent(T.int64(0), lanes)
        weights = Weights(p, args, self.target, at.values, at.output)

        def step(t: Expr, c: Expr, chain: int) -> None:
            """All rows for input c of block t."""
            column = T.cast(args.indices[at.first + t], "int64") + c
            self.prefetch(at.first + t, c, at.values + (t * p.block[1] + c) * p.panel, x_at)
            row = T.Bind(weights.vector(t, c, column, 0, lanes))
            twice = [T.Bind(shuffle([row], [h * half + i // 2 for i in range(lanes)])) for h in range(2)]
            for pair in range(size // 2):
                buffer, where = x_at(2 * pair, column)
                two = T.reinterpret("float64", buffer[adjacent(where, 2)])
                x = T.Bind(T.reinterpret(f"float32x{lanes}", broadcast(two, half)))
                for h in range(2):
                    target = acc[pair][h]
                    T.buffer_store(target, target[whole] + x * twice[h], [whole])

        each_input(at.count, p.block[1], 1, step)
        return [
            [shuffle([acc[r // 2][0][whole], acc[r // 2][1][whole]], [2 * i + r % 2 for i in range(lanes)])]
            for r in range(size)
        ]

    def prefetch(self, block: Expr, c: Expr, weights: Expr, x_at: Locate | None) -> None:
        """Bring what `prefetch` steps ahead needs to the first-level cache; a prefetch beyond the end does nothing."""
        T, p, ahead = self.T, self.problem, self.schedule.prefetch
        if not ahead:
            return
        # A byte may hold two values.
        a_line, a_place = _LINE_BYTES * 8 // p.values.bits, p.values.dtype.itemsize * 8 // p.values.bits
        weights = weights + ahead * p.panel
        places = [
            (self.args.values, T.truncdiv(weights + line, T.int64(a_place))) for line in range(0, p.panel, a_line)
        ]
        if x_at is not None:
            # Whole blocks ahead, but within the array of indices.
            later = T.min(block + max(1, ahead // p.block[1]), self.last_block)
            places.append(x_at(0, T.cast(self.args.indices[later], "int64") + c))
        for buffer, where in places:
            T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch.p0", T.address_of(buffer[where]), 0, 3, 1))

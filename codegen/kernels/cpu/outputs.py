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

from ..elementwise import activate
from .abi import function
from .blocks import Panel, each_input, each_tile, first_output
from .lanes import adjacent, broadcast, shuffle, whole_lanes, zeros
from .pack import pack_rows
from .store import store

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from ...problem import Problem
    from .abi import Arguments, Buffer, Expr
    from .schedule import Schedule

    # Where X[row of the tile, input] is: a buffer and an index.
    Locate: TypeAlias = Callable[[int, Expr], tuple[Buffer, Expr]]

# float32 a cache line.
_LINE = 16


def _stride(schedule: Schedule) -> int:
    """float32 between two inputs of a packed tile: a half or a whole cache line, so that none is split over two."""
    return 8 if schedule.tile_rows <= 8 else 16


def workspace(problem: Problem, schedule: Schedule) -> int:
    """float32 of scratch memory a call needs."""
    return _stride(schedule) * problem.in_features if schedule.pack else 0


def emit(problem: Problem, schedule: Schedule, symbol: str) -> Any:
    """The TVM function `symbol` for this problem and schedule."""
    from tvm.script.ir_builder import IRBuilder

    with IRBuilder() as builder, function(problem, symbol, workspace(problem, schedule)) as args:
        _Emitter(problem, schedule, args).body()
    return builder.get()


class _Emitter:
    """Emits one function; its methods are the loop nest from the outside in."""

    def __init__(self, problem: Problem, schedule: Schedule, args: Arguments) -> None:
        from tvm.tirx.script import builder

        self.T: Any = builder
        self.problem, self.schedule, self.args = problem, schedule, args
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
            self.store(row, panel, at.output, sums)

    def sums(self, size: int, at: Panel, x_at: Locate, prefetch_x: bool) -> list[list[Expr]]:
        """Emit the loop over the blocks; returns expressions [row][vector] of the sums."""
        T, p, args = self.T, self.problem, self.args
        chains = max(1, self.schedule.accumulators // (size * self.vectors))
        acc = [[[zeros(self.lanes) for _ in range(self.vectors)] for _ in range(size)] for _ in range(chains)]
        whole = adjacent(T.int64(0), self.lanes)

        def step(t: Expr, c: Expr, chain: int) -> None:
            """All rows and vectors for input c of block t."""
            column = T.cast(args.indices[at.first + t], "int64") + c
            weights = at.values + (t * p.block[1] + c) * p.panel
            self.prefetch(at.first + t, c, weights, x_at if prefetch_x else None)
            for r in range(size):
                buffer, where = x_at(r, column)
                x = broadcast(buffer[where], self.lanes)
                for v in range(self.vectors):
                    weight = args.values[adjacent(weights + v * self.lanes, self.lanes)]
                    target = acc[chain][r][v]
                    T.buffer_store(target, target[whole] + x * weight, [whole])

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

        def step(t: Expr, c: Expr, chain: int) -> None:
            """All rows for input c of block t."""
            column = T.cast(args.indices[at.first + t], "int64") + c
            weights = at.values + (t * p.block[1] + c) * p.panel
            self.prefetch(at.first + t, c, weights, x_at)
            row = T.Bind(args.values[adjacent(weights, lanes)])
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
        places = [(self.args.values, weights + ahead * p.panel + line) for line in range(0, p.panel, _LINE)]
        if x_at is not None:
            # Whole blocks ahead, but within the array of indices.
            later = T.min(block + max(1, ahead // p.block[1]), self.last_block)
            places.append(x_at(0, T.cast(self.args.indices[later], "int64") + c))
        for buffer, where in places:
            T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch.p0", T.address_of(buffer[where]), 0, 3, 1))

    def store(self, row: Expr, panel: Expr, output: Expr, sums: list[list[Expr]]) -> None:
        """Y[row + r, output + v] = epilogue(sums[r][v])."""
        T, p = self.T, self.problem
        if p.block[0] % p.panel == 0 and p.out_features % p.block[0] == 0:
            store(p, self.args, row, output, sums, self.lanes)
            return
        # The panel may stick out of its block row or of the matrix.
        valid = T.min(first_output(p, panel + 1), T.int64(p.out_features)) - output
        with T.If(valid == p.panel):
            with T.Then():
                store(p, self.args, row, output, sums, self.lanes)
            with T.Else():
                self.store_part(row, output, valid, sums)

    def store_part(self, row: Expr, output: Expr, valid: Expr, sums: list[list[Expr]]) -> None:
        """The same through a small buffer, element by element: nothing beyond `valid` outputs is read or written."""
        T, args, n, epilogue = self.T, self.args, self.problem.out_features, self.problem.epilogue
        part = T.alloc_buffer((self.problem.panel,))
        for r, vectors in enumerate(sums):
            for v, value in enumerate(vectors):
                T.buffer_store(part, value, [adjacent(T.int64(v * self.lanes), self.lanes)])
            with T.serial(valid) as i:
                at = (row + r) * n + output + i
                T.buffer_store(args.y, part[i] + args.bias[output + i] if epilogue.bias else part[i], [at])
        with T.serial(T.int64(len(sums))) as r, T.serial(valid) as i:
            at = (row + r) * n + output + i
            value = activate(args.y[at], epilogue, 1)
            T.buffer_store(args.y, value + args.residual[at] if epilogue.residual else value, [at])

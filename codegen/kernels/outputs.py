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
inputs is what a processor cannot foresee (Cascade Lake: 78 -> 107 GFLOP/s a core with weights in the third-level cache).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .abi import Arguments, Buffer, Expr, function
from .elementwise import CHEAP, activate
from .pack import pack_rows

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from ..problem import Problem
    from .schedule import Schedule

    # Where X[row of the tile, input] is: a buffer and an index.
    Locate: TypeAlias = Callable[[int, Expr], tuple[Buffer, Expr]]
    # Emits one input of one block: (block, input, chain of sums).
    Step: TypeAlias = Callable[[Expr, Expr, int], None]

# Inputs of a block up to which its loop is unrolled whole.
_UNROLL_INPUTS = 4
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

    with IRBuilder() as builder:
        with function(problem, symbol, workspace(problem, schedule)) as args:
            _Emitter(problem, schedule, args).body()
    return builder.get()


class _Emitter:
    """Emits one function; its methods are the loop nest from the outside in."""

    def __init__(self, problem: Problem, schedule: Schedule, args: Arguments) -> None:
        from tvm.tirx.script import builder

        self.T: Any = builder
        self.problem, self.schedule, self.args = problem, schedule, args
        self.lanes = next(lanes for lanes in (16, 8, 4, 1) if problem.panel % lanes == 0)
        self.vectors = problem.panel // self.lanes

    def const(self, value: int) -> Expr:
        return self.T.int64(value)

    def vector(self, start: Expr) -> Expr:
        """The index of `lanes` adjacent elements."""
        return self.T.Ramp(start, self.const(1), self.lanes) if self.lanes > 1 else start

    def broadcast(self, scalar: Expr) -> Expr:
        return self.T.Broadcast(scalar, self.lanes) if self.lanes > 1 else scalar

    def body(self) -> None:
        T, args, size = self.T, self.args, self.schedule.tile_rows
        rows = args.row_end - args.row_begin
        self.last_block = T.Bind(T.cast(args.indptr[self.problem.block_rows], "int64") - 1)
        # Step 1. Whole tiles; the last one moves back over rows that are done already, and computes the same again.
        with T.If(rows >= size), T.Then():
            with T.serial(T.ceildiv(rows, self.const(size))) as i:
                row = args.row_begin + T.min(i * size, rows - size)
                if self.schedule.pack:
                    pack_rows(args, row, size, _stride(self.schedule), self.problem.in_features)
                self.panels(row, size, self.schedule.pack)
        # Step 2. Fewer rows than one tile: falling powers of two.
        part = 1 << (size - 1).bit_length() >> 1 if size > 1 else 0
        while part:
            present = T.truncmod(T.truncdiv(rows, self.const(part)), self.const(2)) == 1
            with T.If(T.And(rows < size, present)), T.Then():
                self.panels(args.row_begin + T.truncdiv(rows, self.const(2 * part)) * (2 * part), part, pack=False)
            part //= 2

    def panels(self, row: Expr, size: int, pack: bool) -> None:
        """All panels of the call for the `size` rows from `row` on."""
        T, k = self.T, self.problem.in_features
        if pack:
            stride = _stride(self.schedule)
            x_at: Locate = lambda r, i: (self.args.workspace, i * stride + r)  # noqa: E731
        else:
            x_at = lambda r, i: (self.args.x, (row + r) * k + i)  # noqa: E731
        with T.serial(self.args.panel_end - self.args.panel_begin) as i:
            self.tile(row, size, self.args.panel_begin + i, x_at, prefetch_x=pack)

    def tile(self, row: Expr, size: int, panel: Expr, x_at: Locate, prefetch_x: bool) -> None:
        """One panel of `size` rows, from the sums to the stores."""
        T, p, args = self.T, self.problem, self.args
        block_row = panel if p.panels == 1 else T.truncdiv(panel, self.const(p.panels))
        in_row = self.const(0) if p.panels == 1 else T.truncmod(panel, self.const(p.panels))
        first = T.cast(args.indptr[block_row], "int64")
        count = T.cast(args.indptr[block_row + 1], "int64") - first
        depth = p.block[1] * p.panel
        base = (first * p.panels + in_row * count) * depth
        sums = self.sums(size, first, count, base, x_at, prefetch_x)
        self.store(row, block_row * p.block[0] + in_row * p.panel, in_row, sums)

    def sums(
        self, size: int, first: Expr, count: Expr, base: Expr, x_at: Locate, prefetch_x: bool
    ) -> list[list[Expr]]:
        """Emit the loop over the blocks; returns expressions [row][vector] of the sums."""
        T, p, args = self.T, self.problem, self.args
        inputs = p.block[1]
        chains = max(1, self.schedule.accumulators // (size * self.vectors))
        # Small buffers with constant indices become registers; above 1,023 bytes TVM would take them from the heap.
        acc = [
            [[T.alloc_buffer((self.lanes,)) for _ in range(self.vectors)] for _ in range(size)] for _ in range(chains)
        ]
        whole = self.vector(self.const(0))
        for buffer in (b for chain in acc for row in chain for b in row):
            T.buffer_store(buffer, self.broadcast(T.float32(0)), [whole])

        def step(t: Expr, c: Expr, chain: int) -> None:
            """All rows and vectors for input c of block t."""
            column = T.cast(args.indices[first + t], "int64") + c
            weights = base + (t * inputs + c) * p.panel
            self.prefetch(first + t, c, weights, x_at if prefetch_x else None)
            for r in range(size):
                buffer, where = x_at(r, column)
                x = self.broadcast(buffer[where])
                for v in range(self.vectors):
                    weight = args.values[self.vector(weights + v * self.lanes)]
                    target = acc[chain][r][v]
                    T.buffer_store(target, target[whole] + x * weight, [whole])

        if inputs > _UNROLL_INPUTS:
            self.long_blocks(count, inputs, chains, step)
        else:
            self.short_blocks(count, inputs, chains, step)
        return [
            [sum((acc[c][r][v][whole] for c in range(1, chains)), acc[0][r][v][whole]) for v in range(self.vectors)]
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

    def short_blocks(self, count: Expr, inputs: int, chains: int, step: Step) -> None:
        """Several blocks an iteration, so that each chain of sums gets one input."""
        T = self.T
        together = max(1, chains // inputs)
        with T.serial(T.truncdiv(count, self.const(together))) as i:
            for j in range(together):
                for c in range(inputs):
                    step(i * together + j, self.const(c), (j * inputs + c) % chains)
        if together > 1:
            done = T.truncdiv(count, self.const(together)) * together
            with T.serial(count - done) as i:
                for c in range(inputs):
                    step(done + i, self.const(c), c % chains)

    def long_blocks(self, count: Expr, inputs: int, chains: int, step: Step) -> None:
        """One block an iteration, its inputs `unrolled` at a time."""
        T = self.T
        unrolled = max(chains, 2)
        with T.serial(count) as t:
            with T.serial(self.const(inputs // unrolled)) as i:
                for c in range(unrolled):
                    step(t, i * unrolled + c, c % chains)
            for c in range(inputs - inputs % unrolled, inputs):
                step(t, self.const(c), c % chains)

    def store(self, row: Expr, output: Expr, in_row: Expr, sums: list[list[Expr]]) -> None:
        """Y[row + r, output + v] = epilogue(sums[r][v])."""
        T, p = self.T, self.problem
        rows, n = p.block[0], p.out_features
        if rows % p.panel == 0 and n % rows == 0:
            self.store_whole(row, output, sums)
            return
        # The panel may stick out of its block row or of the matrix.
        end = T.min(self.const(n), output + (rows - in_row * p.panel))
        valid = T.min(end - output, self.const(p.panel))
        with T.If(valid == p.panel):
            with T.Then():
                self.store_whole(row, output, sums)
            with T.Else():
                self.store_part(row, output, valid, sums)

    def store_whole(self, row: Expr, output: Expr, sums: list[list[Expr]]) -> None:
        """Y[row + r, output + v] = epilogue(sums[r][v]), in whole vectors."""
        T, args, n, epilogue = self.T, self.args, self.problem.out_features, self.problem.epilogue
        cheap = epilogue.activation in CHEAP

        def finish(value: Expr, where: Expr) -> None:
            value = activate(value, epilogue, self.lanes)
            T.buffer_store(args.y, value + args.residual[where] if epilogue.residual else value, [where])

        for r, vectors in enumerate(sums):
            for v, value in enumerate(vectors):
                at = output + v * self.lanes
                where = self.vector((row + r) * n + at)
                value = value + args.bias[self.vector(at)] if epilogue.bias else value
                if cheap:
                    finish(value, where)
                else:
                    T.buffer_store(args.y, value, [where])
        if not cheap:
            # A second pass over what is still in the first-level cache: one copy of the activation's code, not one a row.
            with T.serial(self.const(len(sums))) as r:
                for v in range(self.vectors):
                    where = self.vector((row + r) * n + output + v * self.lanes)
                    finish(args.y[where], where)

    def store_part(self, row: Expr, output: Expr, valid: Expr, sums: list[list[Expr]]) -> None:
        """The same through a small buffer, element by element: nothing beyond `valid` outputs is read or written."""
        T, args, n, epilogue = self.T, self.args, self.problem.out_features, self.problem.epilogue
        part = T.alloc_buffer((self.problem.panel,))
        for r, vectors in enumerate(sums):
            for v, value in enumerate(vectors):
                T.buffer_store(part, value, [self.vector(self.const(v * self.lanes))])
            with T.serial(valid) as i:
                at = (row + r) * n + output + i
                T.buffer_store(args.y, part[i] + args.bias[output + i] if epilogue.bias else part[i], [at])
        with T.serial(self.const(len(sums))) as r, T.serial(valid) as i:
            at = (row + r) * n + output + i
            value = activate(args.y[at], epilogue, 1)
            T.buffer_store(args.y, value + args.residual[at] if epilogue.residual else value, [at])

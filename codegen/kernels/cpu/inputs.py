"""Vectors along the inputs of a block, for few rows of X and blocks of few outputs.

    for tile of rows:
        for group of panels:
            for panel:
                acc[tile_rows, inputs, width] = 0
                for block t:
                    acc[r, :, :] += X[r, indices[t] ...] (each input `width` times) * values[t, :, :]
                stage[r, :] = sum of acc[r, :, :] over the inputs
            Y[tile, group] = epilogue(stage)

A vector of weights is as they lie in memory, [inputs, outputs]: 16 x 1, 4 x 4, 2 x 8 and so on. Blocks of fewer than 16
weights share a vector where they fill it exactly; the inputs are then single loads put together, which on the
machines at hand is faster than a gather instruction. For kinds of values that can be read wherever they lie.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .abi import function
from .blocks import Panel, each_input, each_tile
from .lanes import WIDE, adjacent, broadcast, shuffle, zeros
from .stage import each_group, each_vector, room
from .store import store
from .weights import Weights

if TYPE_CHECKING:
    from ...problem import Problem
    from ...target import CpuTarget
    from .abi import Arguments, Buffer, Expr
    from .schedule import Schedule


def workspace(problem: Problem, schedule: Schedule) -> int:
    """float32 of scratch memory a call needs: the stage."""
    return schedule.tile_rows * _line(problem)


def _line(problem: Problem) -> int:
    """float32 of one row of the stage; a panel's padding may stick out."""
    return room(problem) + problem.panel


def emit(problem: Problem, schedule: Schedule, symbol: str, target: CpuTarget) -> Any:
    """The TVM function `symbol` for this problem and schedule."""
    from tvm.script.ir_builder import IRBuilder

    with IRBuilder() as builder, function(problem, symbol, workspace(problem, schedule)) as args:
        each_tile(args, schedule.tile_rows, _Emitter(problem, schedule, args, target).tile)
    return builder.get()


class _Emitter:
    """Emits one function; its methods are the loop nest from the outside in.

    Attributes:
        inputs: inputs of one block that a vector spans, a power of two.
        together: blocks that share a vector; more than one only where `inputs` is the whole block.
    """

    def __init__(self, problem: Problem, schedule: Schedule, args: Arguments, target: CpuTarget) -> None:
        from tvm.tirx.script import builder

        self.T: Any = builder
        self.problem, self.schedule, self.args, self.target = problem, schedule, args, target
        cols, panel = problem.block[1], problem.panel
        self.inputs = 1 << (min(cols, max(1, WIDE // panel)).bit_length() - 1)
        self.together = WIDE // (cols * panel) if WIDE % (cols * panel) == 0 else 1

    def tile(self, row: Expr, rows: int) -> None:
        """All panels of the call for the `rows` rows from `row` on."""
        each_group(
            self.problem,
            self.args,
            lambda panel, place: self.panel(row, rows, panel, place),
            lambda output, count: self.store(row, rows, output, count),
        )

    def panel(self, row: Expr, rows: int, panel: Expr, place: Expr) -> None:
        """The sums of one panel, to its place in the stage."""
        T, args, p = self.T, self.args, self.problem
        at = Panel.locate(p, args, panel)
        sums = self.wide(row, rows, at)
        for r, rest in enumerate(self.rest(row, rows, at)):
            sums[r] = [*sums[r], *rest]
        for r, parts in enumerate(sums):
            total = sum(parts[1:], parts[0])
            T.buffer_store(args.workspace, total, [adjacent(r * _line(p) + place, p.panel)])

    def wide(self, row: Expr, rows: int, at: Panel) -> list[list[Expr]]:
        """Sums of what whole vectors cover: a list of vectors of one panel's outputs for each row."""
        T, cols, together = self.T, self.problem.block[1], self.together
        chains = 1 if together > 1 else max(1, self.schedule.accumulators // rows)
        lanes = together * self.inputs * self.problem.panel
        acc = [[zeros(lanes) for _ in range(rows)] for _ in range(chains)]

        def step(t: Expr, vector: Expr, chain: int) -> None:
            self.multiply_add(acc[chain], row, at, t * together, vector * self.inputs, self.inputs, together)

        each_input(T.truncdiv(at.count, T.int64(together)), cols // self.inputs, chains, step)
        whole = adjacent(T.int64(0), lanes)
        totals = [sum((chain[r][whole] for chain in acc[1:]), acc[0][r][whole]) for r in range(rows)]
        return [[self.fold(total, lanes)] for total in totals]

    def rest(self, row: Expr, rows: int, at: Panel) -> list[list[Expr]]:
        """Sums of the rest: blocks too few to share a vector, or the last inputs of each block, too few to fill one."""
        T, cols = self.T, self.problem.block[1]
        done = T.truncdiv(at.count, T.int64(self.together)) * self.together if self.together > 1 else T.int64(0)
        first = 0 if self.together > 1 else cols // self.inputs * self.inputs
        sums: list[list[Expr]] = [[] for _ in range(rows)]
        while first < cols:
            inputs = 1 << ((cols - first).bit_length() - 1)
            acc = [zeros(inputs * self.problem.panel) for _ in range(rows)]
            with T.serial(at.count - done) as t:
                self.multiply_add(acc, row, at, done + t, T.int64(first), inputs, 1)
            whole = adjacent(T.int64(0), inputs * self.problem.panel)
            for r in range(rows):
                sums[r].append(self.fold(acc[r][whole], inputs * self.problem.panel))
            first += inputs
        return sums

    def multiply_add(
        self, acc: list[Buffer], row: Expr, at: Panel, t: Expr, first: Expr, inputs: int, blocks: int
    ) -> None:
        """Add inputs `first` to `first + inputs - 1` of the `blocks` blocks from t on to the sums of each row."""
        T, args, p = self.T, self.args, self.problem
        lanes = blocks * inputs * p.panel
        weights = T.Bind(Weights(p, args, self.target, at.values, at.output).flat(t, first, 0, lanes))
        columns = [T.Bind(T.cast(args.indices[at.first + t + b], "int64") + first) for b in range(blocks)]
        whole = adjacent(T.int64(0), lanes)
        for r, target in enumerate(acc):
            parts = [args.x[adjacent((row + r) * p.in_features + column, inputs)] for column in columns]
            x = self.repeat(parts, blocks * inputs)
            T.buffer_store(target, target[whole] + x * weights, [whole])

    def repeat(self, parts: list[Expr], length: int) -> Expr:
        """The parts laid end to end, `length` elements in all, each of them once an output of the panel."""
        panel = self.problem.panel
        if length == 1:
            return broadcast(parts[0], panel)
        x = self.T.Bind(shuffle(parts, range(length)) if len(parts) > 1 else parts[0])
        # A shuffle has no more lanes than its operands: hence the copies.
        return shuffle([x] * panel, [i for i in range(length) for _ in range(panel)]) if panel > 1 else x

    def fold(self, value: Expr, lanes: int) -> Expr:
        """The sum over the inputs of a vector [inputs, panel]: its halves are added until one panel is left."""
        while lanes > self.problem.panel:
            value, lanes = self.T.Bind(value), lanes // 2
            value = shuffle([value], range(lanes)) + shuffle([value], range(lanes, 2 * lanes))
        return value

    def store(self, row: Expr, rows: int, output: Expr, count: Expr) -> None:
        """Y[row ..., output ...] = epilogue(stage), `rows` rows and `count` outputs."""

        def some(n: Expr, lanes: int) -> None:
            line = _line(self.problem)
            sums = [[self.args.workspace[adjacent(r * line + n, lanes)]] for r in range(rows)]
            store(self.problem, self.args, row, output + n, sums, lanes)

        each_vector(count, lambda n: some(n, WIDE), lambda n: some(n, 1))

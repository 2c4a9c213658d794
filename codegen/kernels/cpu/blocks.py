"""Loops that every kernel shares: over tiles of rows, and over the blocks of one panel of the packed weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...problem import Problem
    from .abi import Arguments, Expr

# Inputs of a block up to which its loop is unrolled whole.
_UNROLL_INPUTS = 4


@dataclass(frozen=True, slots=True)
class Panel:
    """Where one panel of the packed weight is, as expressions.

    Attributes:
        first, count: its blocks: `first` to `first` + `count` - 1.
        values: index of its first value.
        output: its first output.
    """

    first: Expr
    count: Expr
    values: Expr
    output: Expr

    @classmethod
    def locate(cls, problem: Problem, args: Arguments, panel: Expr) -> Panel:
        """The panel with number `panel`."""
        from tvm.tirx.script import builder as T

        block_row, in_row = _split(problem, panel)
        first = T.cast(args.indptr[block_row], "int64")
        count = T.cast(args.indptr[block_row + 1], "int64") - first
        values = (first * problem.panels + in_row * count) * (problem.block[1] * problem.panel)
        return cls(first, count, values, first_output(problem, panel))


def _split(problem: Problem, panel: Expr) -> tuple[Expr, Expr]:
    """The block row of a panel, and its number in that row."""
    from tvm.tirx.script import builder as T

    if problem.panels == 1:
        return panel, T.int64(0)
    return T.truncdiv(panel, T.int64(problem.panels)), T.truncmod(panel, T.int64(problem.panels))


def first_output(problem: Problem, panel: Expr) -> Expr:
    """First output of a panel; that of the next panel is where this one's outputs end, or N if that is less."""
    block_row, in_row = _split(problem, panel)
    return block_row * problem.block[0] + in_row * problem.panel


def each_tile(args: Arguments, size: int, tile: Callable[[Expr, int], None]) -> None:
    """Emit `tile(row, rows)` for tiles of `size` rows that cover the rows of the call.

    The last tile moves back over rows that are done already, and computes the same again. Fewer rows than one tile are
    computed in tiles of falling powers of two.
    """
    from tvm.tirx.script import builder as T

    rows = args.row_end - args.row_begin
    with T.If(rows >= size), T.Then(), T.serial(T.ceildiv(rows, T.int64(size))) as i:
        tile(args.row_begin + T.min(i * size, rows - size), size)
    part = 1 << (size - 1).bit_length() >> 1 if size > 1 else 0
    while part:
        present = T.truncmod(T.truncdiv(rows, T.int64(part)), T.int64(2)) == 1
        with T.If(T.And(rows < size, present)), T.Then():
            tile(args.row_begin + T.truncdiv(rows, T.int64(2 * part)) * (2 * part), part)
        part //= 2


def each_input(count: Expr, inputs: int, chains: int, step: Callable[[Expr, Expr, int], None]) -> None:
    """Emit `step(t, c, chain)` for every input c of blocks 0 <= t < `count`, the chains of sums taking turns."""
    if inputs > _UNROLL_INPUTS:
        _long_blocks(count, inputs, chains, step)
    else:
        _short_blocks(count, inputs, chains, step)


def _short_blocks(count: Expr, inputs: int, chains: int, step: Callable[[Expr, Expr, int], None]) -> None:
    """Several blocks an iteration, so that each chain of sums gets one input."""
    from tvm.tirx.script import builder as T

    together = max(1, chains // inputs)
    with T.serial(T.truncdiv(count, T.int64(together))) as i:
        for j in range(together):
            for c in range(inputs):
                step(i * together + j, T.int64(c), (j * inputs + c) % chains)
    if together > 1:
        done = T.truncdiv(count, T.int64(together)) * together
        with T.serial(count - done) as i:
            for c in range(inputs):
                step(done + i, T.int64(c), c % chains)


def _long_blocks(count: Expr, inputs: int, chains: int, step: Callable[[Expr, Expr, int], None]) -> None:
    """One block an iteration, its inputs `unrolled` at a time."""
    from tvm.tirx.script import builder as T

    unrolled = max(chains, 2)
    with T.serial(count) as t:
        with T.serial(T.int64(inputs // unrolled)) as i:
            for c in range(unrolled):
                step(t, i * unrolled + c, c % chains)
        for c in range(inputs - inputs % unrolled, inputs):
            step(t, T.int64(c), c % chains)

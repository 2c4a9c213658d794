"""From sums to Y: scale, bias, activation, residual and, where Y is quantised, rounding on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ....ir.values import Int8
from ..elementwise import CHEAP, activate
from .blocks import first_output
from .lanes import adjacent
from .quantize import Y_INVERSE, Y_ZERO_POINT, quantized

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ...problem import Problem
    from .abi import Arguments, Expr

    # A sum of row r of the tile, from an output on, so many lanes: as float32.
    Scaled = Callable[[Expr, int, Expr, int], Expr]


def store(
    problem: Problem,
    args: Arguments,
    row: Expr,
    output: Expr,
    sums: Sequence[Sequence[Expr]],
    lanes: int,
    scaled: Scaled | None = None,
) -> None:
    """Emit Y[row + r, output + v * lanes ...] = epilogue(sums[r][v]) for vectors of `lanes` adjacent outputs."""
    from tvm.tirx.script import builder as T

    n = problem.out_features
    # Of what is dear, a second pass over what is still in the first-level cache: one copy of its code, not one a row.
    once = problem.epilogue.activation in CHEAP or problem.y == "uint8"
    for r, vectors in enumerate(sums):
        for v, value in enumerate(vectors):
            at = output + v * lanes
            where = adjacent((row + r) * n + at, lanes)
            value = scaled(value, r, at, lanes) if scaled else value
            value = _biased(problem, args, value, at, lanes)
            T.buffer_store(args.y, _finished(problem, args, value, where, lanes) if once else value, [where])
    if not once:
        with T.serial(T.int64(len(sums))) as r:
            for v in range(len(sums[0])):
                where = adjacent((row + r) * n + output + v * lanes, lanes)
                T.buffer_store(args.y, _finished(problem, args, args.y[where], where, lanes), [where])


def store_panel(
    problem: Problem,
    args: Arguments,
    row: Expr,
    panel: Expr,
    output: Expr,
    sums: Sequence[Sequence[Expr]],
    lanes: int,
    scaled: Scaled | None = None,
) -> None:
    """The same for the outputs of a panel, which may stick out of its block row or of the matrix."""
    from tvm.tirx.script import builder as T

    if problem.block[0] % problem.panel == 0 and problem.out_features % problem.block[0] == 0:
        store(problem, args, row, output, sums, lanes, scaled)
        return
    valid = T.min(first_output(problem, panel + 1), T.int64(problem.out_features)) - output
    with T.If(valid == problem.panel):
        with T.Then():
            store(problem, args, row, output, sums, lanes, scaled)
        with T.Else():
            _store_part(problem, args, row, output, valid, sums, lanes, scaled)


def _store_part(
    problem: Problem,
    args: Arguments,
    row: Expr,
    output: Expr,
    valid: Expr,
    sums: Sequence[Sequence[Expr]],
    lanes: int,
    scaled: Scaled | None,
) -> None:
    """Through a small buffer, element by element: nothing beyond `valid` outputs is read or written."""
    from tvm.tirx.script import builder as T

    for r, vectors in enumerate(sums):
        part = T.alloc_buffer((problem.panel,), "int32" if problem.integers else "float32")
        for v, value in enumerate(vectors):
            T.buffer_store(part, value, [adjacent(T.int64(v * lanes), lanes)])
        with T.serial(valid) as i:
            at = (row + r) * problem.out_features + output + i
            value = scaled(part[i], r, output + i, 1) if scaled else part[i]
            value = T.Bind(_biased(problem, args, value, output + i, 1))
            T.buffer_store(args.y, _finished(problem, args, value, at, 1), [at])


def _biased(problem: Problem, args: Arguments, value: Expr, output: Expr, lanes: int) -> Expr:
    values = problem.values
    if isinstance(values, Int8) and not values.group and not problem.integers:
        value = value * args.table[adjacent(output, lanes)]
    return value + args.bias[adjacent(output, lanes)] if problem.epilogue.bias else value


def _finished(problem: Problem, args: Arguments, value: Expr, where: Expr, lanes: int) -> Expr:
    value = activate(value, problem.epilogue, lanes)
    value = value + args.residual[where] if problem.epilogue.residual else value
    if problem.y == "uint8":
        value = quantized(value, args.parameters[Y_INVERSE], args.parameters[Y_ZERO_POINT], lanes)
    return value

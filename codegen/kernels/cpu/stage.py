"""Narrow panels wait for one another in scratch memory, until they fill vectors of adjacent outputs.

    for group of panels:
        for panel:
            stage[outputs of the panel] = sums
        for 16 outputs of the group:
            Y[16 outputs] = epilogue(stage[16 outputs])

A panel may stick out of its block row or of the matrix: what it leaves in its neighbour's place, the neighbour
overwrites; and what sticks out of the group is not stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .blocks import first_output
from .lanes import WIDE

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...problem import Problem
    from .abi import Arguments, Expr

# Outputs of a group, more or less: enough to spread the move of its last vector, few enough for the first-level cache.
_OUTPUTS = 64


def width(problem: Problem) -> int:
    """Outputs a panel that are worth computing: the padding of a block row of one panel is not."""
    return min(problem.block[0], problem.panel)


def _panels(problem: Problem) -> int:
    return -(-_OUTPUTS // width(problem))


def room(problem: Problem) -> int:
    """Outputs that a stage must hold."""
    return _panels(problem) * width(problem)


def each_group(
    problem: Problem, args: Arguments, compute: Callable[[Expr, Expr], None], store: Callable[[Expr, Expr], None]
) -> None:
    """Emit, for groups of the call's panels, `compute(panel, place in the stage)` and `store(first output, count)`."""
    from tvm.tirx.script import builder as T

    size = _panels(problem)
    with T.serial(T.ceildiv(args.panel_end - args.panel_begin, T.int64(size))) as i:
        begin = T.Bind(args.panel_begin + i * size)
        end = T.Bind(T.min(begin + size, args.panel_end))
        output = T.Bind(first_output(problem, begin))
        with T.serial(end - begin) as j:
            compute(begin + j, first_output(problem, begin + j) - output)
        store(output, T.Bind(T.min(first_output(problem, end), T.int64(problem.out_features)) - output))


def each_vector(count: Expr, vector: Callable[[Expr], None], single: Callable[[Expr], None]) -> None:
    """Emit `vector(n)` for outputs n to n+15 up to `count`, the last moved back; where `count` < 16, `single(n)`."""
    from tvm.tirx.script import builder as T

    with T.If(count >= WIDE):
        with T.Then(), T.serial(T.ceildiv(count, T.int64(WIDE))) as i:
            vector(T.Bind(T.min(i * WIDE, count - WIDE)))
        with T.Else(), T.serial(count) as n:
            single(n)

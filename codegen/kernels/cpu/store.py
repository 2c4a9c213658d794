"""From sums to Y: bias, activation and residual on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..elementwise import CHEAP, activate
from .lanes import adjacent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...problem import Problem
    from .abi import Arguments, Expr


def store(
    problem: Problem, args: Arguments, row: Expr, output: Expr, sums: Sequence[Sequence[Expr]], lanes: int
) -> None:
    """Emit Y[row + r, output + v * lanes ...] = epilogue(sums[r][v]) for vectors of `lanes` adjacent outputs."""
    from tvm.tirx.script import builder as T

    n, epilogue = problem.out_features, problem.epilogue
    cheap = epilogue.activation in CHEAP

    def finish(value: Expr, where: Expr) -> None:
        value = activate(value, epilogue, lanes)
        T.buffer_store(args.y, value + args.residual[where] if epilogue.residual else value, [where])

    for r, vectors in enumerate(sums):
        for v, value in enumerate(vectors):
            at = output + v * lanes
            where = adjacent((row + r) * n + at, lanes)
            value = value + args.bias[adjacent(at, lanes)] if epilogue.bias else value
            if cheap:
                finish(value, where)
            else:
                T.buffer_store(args.y, value, [where])
    if not cheap:
        # A second pass over what is still in the first-level cache: one copy of the activation's code, not one a row.
        with T.serial(T.int64(len(sums))) as r:
            for v in range(len(sums[0])):
                where = adjacent((row + r) * n + output + v * lanes, lanes)
                finish(args.y[where], where)

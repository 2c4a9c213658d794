"""Kernels for candidates: one for those that pose the same problem."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..codegen.problem import Problem
from .exporter import SparseOp

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ..codegen.kernel import Kernel
    from ..codegen.tune import Tuned
    from .context import Context
    from .plan import Candidate
    from .probe import Workload


def make_kernels(
    candidates: Mapping[str, Candidate], workload: Workload, context: Context, density: float | None = None
) -> dict[str, Tuned]:
    """A tuned kernel for each candidate; with `density` one for all that differ in nothing else."""
    problems: dict[str, tuple[Problem, tuple[int, ...]]] = {}
    for name, candidate in candidates.items():
        rows = tuple(dict.fromkeys(workload.rows(candidate.layer.name, batch) for batch in workload.batches))
        y = "float" if candidate.y_grid is None and candidate.layer.y_codes is None else "uint8"
        problem = Problem.of(candidate.matrix, candidate.layer.epilogue, candidate.x, y)
        problems[name] = (problem if density is None else replace(problem, density=density), rows)
    distinct = dict.fromkeys(problems.values())
    context.progress.start("tuning kernels", len(distinct))
    made = {}
    for problem, rows in distinct:
        made[problem, rows] = context.tuner.kernel(problem, rows)
        context.progress.advance(problem.key)
    return {name: made[key] for name, key in problems.items()}


def sparse_op(candidate: Candidate, tuned: Tuned, context: Context) -> SparseOp:
    """The operator that runs the kernel."""
    c, threads = candidate, context.config.thread_count
    # A grid that X lies on already rounds nothing.
    x_grid = (c.layer.x_grid or c.x_grid) if c.x in ("static", "uint8") else None
    y_grid = c.y_grid if c.layer.y_codes is None else c.layer.y_grid
    return SparseOp(c.matrix, tuned.kernel.name, threads, c.x, x_grid, y_grid)


def distinct_kernels(tuned: Iterable[Tuned]) -> tuple[Kernel, ...]:
    """Each kernel once, in order."""
    return tuple({one.kernel.name: one.kernel for one in tuned}.values())

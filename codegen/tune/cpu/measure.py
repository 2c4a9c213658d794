"""The time of one schedule on this machine: one thread's share of the work, on synthetic weights."""

from __future__ import annotations

import ctypes
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from ....ir import BlockPattern, SparseMatrix

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from ...kernels.cpu.schedule import Schedule
    from ...problem import Problem
    from ...target import CpuTarget

# A run is repeated until this much time has passed, in seconds.
_TIME = 0.015


class Workload:
    """Random weights and inputs of a problem; made once, timed with many schedules."""

    def __init__(self, problem: Problem, rows: int, threads: int) -> None:
        rng = np.random.default_rng(0)
        pattern = BlockPattern(*problem.block)
        shape = (problem.out_features, problem.in_features)
        blocks = rng.random(pattern.grid(shape)) < problem.density
        weight = rng.standard_normal(shape).astype(np.float32) * pattern.expand(blocks, shape)
        self.problem, self.rows, self.threads = problem, rows, threads
        self.matrix = SparseMatrix.from_dense(weight, pattern, kind=problem.kind, together=problem.together)
        x = rng.standard_normal((rows, problem.in_features)).astype(np.float32)
        self.x = _aligned(rng.integers(0, 256, x.shape, dtype=np.uint8) if problem.x == "uint8" else x)
        self.values = _aligned(self.matrix.values)
        self.sums = np.zeros(problem.out_features, dtype=np.int32)
        self.bias = np.zeros(problem.out_features, dtype=np.float32)
        self.residual = np.zeros((rows, problem.out_features), dtype=np.float32)
        y = np.zeros((rows, problem.out_features), dtype=np.float32)
        self.y = _aligned(y.astype(np.uint8) if problem.y == "uint8" else y)
        self.parameters = np.ones(5, dtype=np.float32)

    def seconds(self, schedule: Schedule, target: CpuTarget) -> float:
        """The least time of one thread's share; infinite where the schedule does not compile for this problem."""
        from ...generate.cpu import generate

        code = generate(self.problem, schedule, target)
        assert code.call is not None, "only code for this machine can be timed"
        workspace = _aligned(np.empty(code.workspace, dtype=np.float32))
        weight = self.matrix
        table = weight.kind.laid_out(weight.table, weight.panels * weight.panel)
        arrays: list[NDArray[Any]] = [self.x, self.values, weight.indices, weight.indptr, table, self.sums]
        arrays += [self.bias, self.residual, self.y, workspace, self.parameters]
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in arrays]
        return _least_time(code.call, pointers, self.share(schedule))

    def share(self, schedule: Schedule) -> list[tuple[int, int, int, int]]:
        """What the first of `threads` threads does, as the operator would split it: rows and panels, from and to."""
        grain, panels = schedule.tile_rows, self.problem.block_rows * self.problem.panels
        parts = self.threads * schedule.parts_per_thread
        tiles = -(-self.rows // grain)
        runs = min(tiles, parts)
        chunks = 1 if tiles >= parts else min(panels, -(-parts // tiles))
        tasks = [
            (
                run * tiles // runs * grain,
                min((run + 1) * tiles // runs * grain, self.rows),
                chunk * panels // chunks,
                (chunk + 1) * panels // chunks,
            )
            for run in range(runs)
            for chunk in range(chunks)
        ]
        return tasks[:: self.threads]


def _aligned(array: NDArray[Any]) -> NDArray[Any]:
    """A copy that begins with a cache line, as ONNX Runtime's and the operator's buffers do."""
    room = np.empty(array.nbytes + 64, dtype=np.uint8)
    start = -room.ctypes.data % 64
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _least_time(call: Callable[..., Any], pointers: list[Any], tasks: list[tuple[int, int, int, int]]) -> float:
    best = float("inf")
    runs = 0
    start = time.perf_counter()
    while runs < 3 or time.perf_counter() - start < _TIME:
        before = time.perf_counter()
        for task in tasks:
            call(*pointers, *task)
        best = min(best, time.perf_counter() - before)
        runs += 1
    return best

"""A prediction of a GPU kernel's time from its bytes, operations and grid: used where no GPU can be asked.

The time is the longest of three bounds, those of the roofline (Williams et al. 2009) for memory, second-level cache and
operations with what a kernel's grid can reach of them, plus the cost of the launches. Every constant is an assumption
until a GPU has measured it; a report that rests on this model says "predicted, not measured".
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ...kernels.gpu import EMITTERS
from ...problem import itemsize

if TYPE_CHECKING:
    from ...kernels.gpu.schedule import GpuSchedule, Grid
    from ...problem import Problem
    from ...target import CudaTarget

# Seconds of one launch in a captured graph.
LAUNCH = 2e-6
# Share of the datasheet's memory bandwidth that a copy reaches, and of the tensor cores' rate that cuBLAS does (an
# H200: 4.3 of 4.8 TB/s and 790 of 989 TFLOP/s).
COPY, CUBLAS = 0.9, 0.8
# Share of the rate of its unit that a kernel's inner loop reaches once its data is there. `simt` issues a load of X for
# every few multiply-adds; `mma.sync` cannot feed Hopper's tensor cores and reaches more of older ones; `wgmma` can.
SIMT, MMA, MMA_ON_HOPPER, WGMMA = 0.25, 0.55, 0.4, 0.65
# Seconds from a load's issue to its data, and bytes that a multiprocessor may have on the way.
LATENCY, MOST_IN_FLIGHT = 0.8e-6, 64 << 10
# Bytes a second that the second-level cache delivers to one multiprocessor (5.5 TB/s on an H200).
L2_PER_SM = 42e9
# Threads and shared memory of a multiprocessor.
SM_THREADS, SM_RESERVED = 2048, 1 << 10


def predict(problem: Problem, schedule: GpuSchedule, gpu: CudaTarget, rows: int) -> float:
    """Seconds of one run with `rows` rows of X, its weights not in the cache."""
    emitter = EMITTERS[schedule.kernel]
    main = emitter.grids(problem, schedule)[0]
    tiles = math.ceil(rows / main.tile_rows)
    blocks = main.units * tiles
    resident = min(blocks, gpu.sms * _blocks_per_sm(main, gpu))
    busy = min(blocks, gpu.sms) / gpu.sms

    # Memory: the weight once for all tiles of rows where the cache holds it between them, X and Y once.
    weight = _weight_bytes(problem)
    again = 0 if weight <= gpu.l2_bytes // 2 else tiles - 1
    moved = weight * (1 + again) + _activation_bytes(problem, rows)
    moved += 8 * rows * emitter.workspace(problem, schedule)
    flying = min(_in_flight(schedule, main) * resident / gpu.sms / busy, MOST_IN_FLIGHT) * gpu.sms * busy
    memory = moved / min(gpu.bandwidth * COPY, flying / LATENCY)

    # Cache: every tile of rows reads the weight, and every thread block the inputs that its block row keeps.
    kept = problem.density * problem.in_features / schedule.split
    inputs = main.units * tiles * main.tile_rows * kept * itemsize(problem.dtype)
    cache = (weight * tiles + inputs) / (L2_PER_SM * gpu.sms * busy)

    # Operations: whole tiles, and whole waves of thread blocks.
    rate = gpu.rate("float32" if schedule.kernel == "simt" else _tensor(problem)) * _reached(schedule, gpu)
    waves = max(1.0, math.ceil(blocks / resident) * resident / blocks)
    compute = 2 * problem.multiply_adds * tiles * main.tile_rows / (rate * busy) * waves

    return float(max(memory, cache, compute)) + LAUNCH * len(emitter.grids(problem, schedule))


def predict_dense(problem: Problem, gpu: CudaTarget, rows: int) -> float:
    """Seconds of the provider's own dense product, which takes float32 through TF32 tensor cores by default."""
    weight = problem.in_features * problem.out_features * itemsize(problem.dtype)
    memory = (weight + _activation_bytes(problem, rows)) / (gpu.bandwidth * COPY)
    operations = 2 * problem.in_features * problem.out_features * rows
    return max(memory, operations / (gpu.rate(_tensor(problem)) * CUBLAS)) + LAUNCH


def _tensor(problem: Problem) -> str:
    return "tfloat32" if problem.dtype == "float32" else problem.dtype


def _weight_bytes(problem: Problem) -> int:
    blocks = round(problem.density * problem.block_rows * problem.block_cols)
    return problem.multiply_adds * itemsize(problem.dtype) + 4 * blocks + 4 * problem.block_rows


def _activation_bytes(problem: Problem, rows: int) -> int:
    outputs = problem.out_features * (2 if problem.epilogue.residual else 1)
    return (problem.in_features + outputs) * rows * itemsize(problem.dtype)


def _blocks_per_sm(grid: Grid, gpu: CudaTarget) -> int:
    if grid.blocks_per_sm:
        return grid.blocks_per_sm
    by_shared = gpu.shared_bytes // (grid.shared_bytes + SM_RESERVED) if grid.shared_bytes else 32
    return max(1, min(SM_THREADS // grid.threads, by_shared))


def _in_flight(schedule: GpuSchedule, grid: Grid) -> float:
    """Bytes of weights that a thread block has on the way."""
    if schedule.kernel == "simt":
        return grid.threads * schedule.unroll * 16
    return grid.shared_bytes * (schedule.stages - 1) / schedule.stages


def _reached(schedule: GpuSchedule, gpu: CudaTarget) -> float:
    match schedule.kernel:
        case "simt":
            return SIMT
        case "mma":
            return MMA if gpu.capability < (9, 0) else MMA_ON_HOPPER
        case _:
            return WGMMA

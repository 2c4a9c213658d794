"""Which GPU schedules are worth trying: plain data, the one predicted to be the fastest first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...kernels.gpu import EMITTERS
from ...kernels.gpu.schedule import GpuSchedule
from .model import predict

if TYPE_CHECKING:
    from ...problem import Problem
    from ...target import CudaTarget

# Rows of X up to which one variant of a kernel serves, the last for any number.
ROW_CLASSES = (1, 8, 32, 2**63 - 1)
# Rows for which a class that nobody asked for is made.
TYPICAL_ROWS = (1, 8, 32, 512)


def row_class(rows: int) -> int:
    """Index into `ROW_CLASSES`."""
    return next(i for i, most in enumerate(ROW_CLASSES) if rows <= most)


def candidates(
    problem: Problem, gpu: CudaTarget, rows: int, tf32: bool = False, portable: bool = False
) -> list[GpuSchedule]:
    """Schedules for `rows` rows of X that serve the problem on this GPU, by predicted time.

    Args:
        problem: what is computed.
        gpu: the architecture.
        rows: of X.
        tf32: whether float32 operands may be rounded to TF32.
        portable: only kernels whose PTX later architectures run.
    """
    found = [*_simt(problem, gpu, rows)]
    if problem.dtype != "float32" or tf32:
        found += _mma(rows)
    if not portable:
        found += _wgmma()
    serving = [s for s in found if not EMITTERS[s.kernel].obstacle(problem, s, gpu.arch)]
    return sorted(serving, key=lambda schedule: predict(problem, schedule, gpu, rows))


def _simt(problem: Problem, gpu: CudaTarget, rows: int) -> list[GpuSchedule]:
    """Few rows: as many as registers hold; enough thread blocks for all multiprocessors by splitting the inputs."""
    tile = next((tile for tile in (1, 2, 4) if rows <= tile), 8)
    pieces = problem.block_rows * problem.panels
    splits = [1]
    while pieces * splits[-1] < 2 * gpu.sms and splits[-1] < 8:
        splits.append(2 * splits[-1])
    # Reading X bounds many rows: shorter pieces of a block row leave more thread blocks to hide it.
    if tile >= 4 and 4 not in splits:
        splits.append(4)
    return [
        GpuSchedule("simt", tile, warps=warps, unroll=unroll, split=split)
        for split in splits
        for warps in (4, 8)
        for unroll in (4, 2)
    ]


def _mma(rows: int) -> list[GpuSchedule]:
    tiles = [tile for tile in (8, 16, 32, 64, 128) if tile < 2 * max(rows, 8)]
    return [GpuSchedule("mma", tile, stages=stages) for tile in tiles for stages in (4, 3)]


def _wgmma() -> list[GpuSchedule]:
    """Tiles of as many rows as registers hold, and pipelines of which shared memory refuses what does not fit."""
    return [
        GpuSchedule("wgmma", tile, warps=12, stages=stages, blocks_per_sm=1)
        for tile in (384, 256, 192, 128, 64)
        for stages in (8, 6, 5, 4, 3)
    ]

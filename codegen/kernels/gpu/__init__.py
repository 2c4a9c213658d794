"""Kernels for GPUs, dynamic in the rows of X.

Every file offers

    obstacle(problem, schedule, arch) -> str     why it cannot serve this problem on this architecture, or ""
    grids(problem, schedule) -> tuple[Grid, ...] one a launch, in order
    workspace(problem, schedule) -> int          float32 of scratch memory for each row of X
    emit(problem, schedule, symbol) -> Any       the TVM function; its parameters are named as in `CUDA_ARGUMENTS`
"""

from __future__ import annotations

from types import ModuleType

from . import mma, simt, wgmma

EMITTERS: dict[str, ModuleType] = {"simt": simt, "mma": mma, "wgmma": wgmma}

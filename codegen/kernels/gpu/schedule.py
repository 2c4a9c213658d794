"""A schedule of a GPU kernel: its knobs as plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GpuSchedule:
    """How a GPU kernel goes about its work; two equal schedules of one problem give the same code.

    Attributes:
        kernel: the file in `codegen/kernels/gpu` that emits it.
        tile_rows: rows of X that a thread block computes.
        warps: a thread block.
        unroll: 16-byte loads of weights that a thread has in flight. For "simt".
        split: thread blocks that share the inputs of a block row; their sums meet in the workspace. For "simt".
        stages: tiles in flight between global and shared memory. For "mma" and "wgmma".
        blocks_per_sm: thread blocks a multiprocessor of a persistent kernel; 0 for a thread block a unit of work.
    """

    kernel: str
    tile_rows: int
    warps: int = 4
    unroll: int = 4
    split: int = 1
    stages: int = 0
    blocks_per_sm: int = 0

    def __str__(self) -> str:
        words = [self.kernel, f"rows {self.tile_rows}", f"warps {self.warps}"]
        words += [f"stages {self.stages}"] if self.stages else [f"loads {self.unroll}"]
        words += [f"split {self.split}"] if self.split != 1 else []
        words += [f"persistent {self.blocks_per_sm}"] if self.blocks_per_sm else []
        return ", ".join(words)


@dataclass(frozen=True, slots=True)
class Grid:
    """The grid of one of a kernel's launches; the attributes are those of `codegen.kernel.Launch`."""

    units: int
    tile_rows: int
    threads: int
    shared_bytes: int = 0
    blocks_per_sm: int = 0

"""A kernel for a problem, for all of a target's machines."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..kernel import Kernel
from .cpu import CpuTuner
from .gpu import GpuTuner

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..problem import Problem
    from ..target import Target
    from .database import Database
    from .gpu import Choice, Fleet


@dataclass(frozen=True, slots=True)
class Tuned:
    """A kernel, and what is known of it for the numbers of rows that were asked for.

    Attributes:
        kernel: with variants for any number of rows.
        schedules: by number of rows, in words.
        choices: by number of rows, one a GPU architecture; empty for a CPU target.
    """

    kernel: Kernel
    schedules: dict[int, str]
    choices: dict[int, tuple[Choice, ...]]


@dataclass(frozen=True, slots=True)
class Tuner:
    """Finds schedules and makes kernels.

    Attributes:
        target: the machines.
        threads: that a CPU will run with.
        effort: "off", "quick" or "thorough" (see `BUDGET`).
        database: where searches are kept.
        tf32: whether float32 operands may be rounded to TF32 on GPUs.
        general: as for `CpuTuner`.
        fleet: as for `GpuTuner`.
    """

    target: Target
    threads: int
    effort: str
    database: Database
    tf32: bool = False
    general: bool = True
    fleet: Fleet | None = None

    def kernel(self, problem: Problem, rows: Sequence[int]) -> Tuned:
        """A kernel for any number of rows, tuned for `rows`."""
        # Beside a GPU, the CPU's kernels are there to run at all.
        effort = "off" if self.target.cuda else self.effort
        cpu = CpuTuner(self.target.cpu, self.threads, effort, self.database, self.general)
        gpu = GpuTuner(self.target.cuda, self.effort, self.database, self.tf32, self.fleet)
        cpu_variants, schedules = cpu.variants(problem, rows) if problem.dtype == "float32" else ((), {})
        cuda_variants = gpu.variants(problem, rows) if self.target.cuda else ()
        choices = {n: tuple(gpu.choose(problem, one, n) for one in self.target.cuda) for n in rows}
        words = {
            n: " / ".join(dict.fromkeys(str(choice.schedule) for choice in choices[n])) or str(schedules[n])
            for n in rows
        }
        identity = "|".join([problem.key, *(v.symbol for v in cpu_variants), *(v.symbol for v in cuda_variants)])
        kernel = Kernel(
            name=f"linear_{hashlib.sha256(identity.encode()).hexdigest()[:12]}",
            in_features=problem.in_features,
            out_features=problem.out_features,
            block=problem.block,
            panel=problem.panel,
            epilogue=problem.epilogue,
            cpu=cpu_variants,
            cuda=cuda_variants,
            dtype=problem.dtype,
            kind=problem.kind,
            x=problem.x,
            y=problem.y,
        )
        return Tuned(kernel, words, choices if self.target.cuda else {})

"""The choice of GPU schedules, and the variants that come of it."""

from __future__ import annotations

import dataclasses
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...generate.cuda import generate
from ...generate.version import code_version
from ...kernel import ANY_ROWS
from ...kernels.gpu.schedule import GpuSchedule
from ..budget import BUDGET
from .measure import measure
from .model import predict, predict_dense
from .space import ROW_CLASSES, TYPICAL_ROWS, candidates, row_class

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ...kernel import CudaVariant
    from ...problem import Problem
    from ...target import CudaTarget
    from ..database import Database
    from .fleet import Fleet, Meter


@dataclass(frozen=True, slots=True)
class Choice:
    """A schedule for a number of rows, and what is known of it.

    Attributes:
        seconds, dense_seconds: of the sparse kernel and of the provider's dense product; the latter is predicted.
        measured: whether `seconds` was measured, on a GPU of this kind.
    """

    schedule: GpuSchedule
    seconds: float
    dense_seconds: float
    measured: bool


@dataclass(frozen=True, slots=True)
class GpuTuner:
    """Finds schedules for some GPU architectures.

    Attributes:
        gpus: oldest first.
        effort: "off", "quick" or "thorough"; where the GPU is neither here nor in the fleet, nothing is measured.
        database: where searches are kept, and looked up for GPUs that are elsewhere.
        tf32: whether float32 operands may be rounded to TF32.
        fleet: machines that have the GPUs with a number as `remote`.
    """

    gpus: tuple[CudaTarget, ...]
    effort: str
    database: Database
    tf32: bool = False
    fleet: Fleet | None = None

    def variants(self, problem: Problem, rows: Sequence[int]) -> tuple[CudaVariant, ...]:
        """Machine code for each architecture and any number of rows, and PTX of the newest for what comes after it."""
        found: list[CudaVariant] = []
        for gpu in self.gpus:
            found += self._classes(problem, gpu, rows, portable=False)
        return (*found, *self._classes(problem, self.gpus[-1], rows, portable=True))

    def _classes(self, problem: Problem, gpu: CudaTarget, rows: Sequence[int], portable: bool) -> list[CudaVariant]:
        """One variant a class of rows, neighbours with the same schedule joined; the largest row asked for decides."""
        asked = {row_class(n): n for n in sorted(rows)}
        variants: list[CudaVariant] = []
        for i, most in enumerate(ROW_CLASSES):
            schedule = self.choose(problem, gpu, asked.get(i, TYPICAL_ROWS[i]), portable).schedule
            variant = generate(problem, schedule, gpu, "ptx" if portable else "cubin")
            variant = dataclasses.replace(variant, max_rows=ANY_ROWS if i == len(ROW_CLASSES) - 1 else most)
            if variants and variants[-1].symbol == variant.symbol:
                variants.pop()
            variants.append(variant)
        return variants

    def choose(self, problem: Problem, gpu: CudaTarget, rows: int, portable: bool = False) -> Choice:
        """The fastest schedule that is known: measured on such a GPU before, measured here, or predicted."""
        guesses = candidates(problem, gpu, rows, self.tf32, portable)
        dense = predict_dense(problem, gpu, rows)
        key = f"{problem.key} rows {rows} {gpu.arch} {gpu.model} tf32 {self.tf32:d} code {code_version()}"
        record = None if portable else self.database.find("cuda schedule", key)
        if record is not None:
            return Choice(GpuSchedule(**record["schedule"]), record["seconds"], dense, measured=True)
        if portable or (gpu.device is None and gpu.remote is None) or self.effort == "off":
            return Choice(guesses[0], predict(problem, guesses[0], gpu, rows), dense, measured=False)
        best, seconds = self._search(problem, gpu, rows, guesses)
        self.database.store("cuda schedule", key, {"schedule": dataclasses.asdict(best), "seconds": seconds})
        return Choice(best, seconds, dense, measured=True)

    def _search(
        self, problem: Problem, gpu: CudaTarget, rows: int, guesses: Sequence[GpuSchedule]
    ) -> tuple[GpuSchedule, float]:
        """Time candidates, the most promising first, for as long as the budget allows."""
        start, slowest = time.perf_counter(), 0.0
        timed: list[tuple[float, GpuSchedule]] = []
        with self._meter(gpu) as seconds_of:
            for schedule in guesses:
                begun = time.perf_counter()
                if timed and begun - start + slowest > BUDGET[self.effort]:
                    break
                timed.append((seconds_of(problem, generate(problem, schedule, gpu, "cubin"), rows), schedule))
                slowest = max(slowest, time.perf_counter() - begun)
        seconds, best = min(timed, key=lambda pair: pair[0])
        return best, seconds

    @contextmanager
    def _meter(self, gpu: CudaTarget) -> Iterator[Meter]:
        """What times a variant: this machine's GPU, or one of the fleet's."""
        if gpu.device is not None:
            number = gpu.device
            yield lambda problem, variant, rows: measure(problem, variant, rows, number, self.tf32)
            return
        assert self.fleet is not None, "only its GPUs have a number there"
        with self.fleet.meter(gpu, self.tf32) as meter:
            yield meter

"""The search for a schedule, and the kernel that comes of it."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...generate.cpu import generate
from ...generate.version import code_version
from ...kernel import ANY_ROWS, CpuVariant
from ...kernels.cpu.schedule import Schedule
from ..budget import BUDGET
from .measure import Workload
from .space import ROW_CLASSES, candidates, row_class

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...problem import Problem
    from ...target import CpuTarget
    from ..database import Database


@dataclass(frozen=True, slots=True)
class CpuTuner:
    """Finds schedules for one target and number of threads.

    Attributes:
        effort: "off", "quick" or "thorough" (see `BUDGET`).
        database: where searches are kept.
        general: whether kernels are made for any number of rows, or in haste for those asked for only.
    """

    target: CpuTarget
    threads: int
    effort: str
    database: Database
    general: bool = True

    def variants(self, problem: Problem, rows: Sequence[int]) -> tuple[tuple[CpuVariant, ...], dict[int, Schedule]]:
        """Machine code for any number of rows, tuned for `rows`; and the schedule that each of these gets.

        Rows fall into classes (`ROW_CLASSES`); the largest of `rows` in a class decides it, and a class without any
        gets the schedule that fits most machines, so that a batch size nobody asked for meets no cliff.
        """
        asked = {row_class(n): n for n in sorted(rows)}
        schedules = {}
        for i in range(len(ROW_CLASSES)) if self.general else asked:
            if i in asked:
                schedules[i] = self.schedule(problem, asked[i], BUDGET[self.effort] / len(asked))
            else:
                schedules[i] = candidates(problem, self.target, ROW_CLASSES[i - 1] + 1 if i else 1)[0]
        variants = tuple(
            self._variant(problem, schedule, ANY_ROWS if i == max(schedules) else ROW_CLASSES[i])
            for i, schedule in schedules.items()
        )
        return variants, {n: schedules[row_class(n)] for n in rows}

    def _variant(self, problem: Problem, schedule: Schedule, max_rows: int) -> CpuVariant:
        code = generate(problem, schedule, self.target)
        return CpuVariant(
            symbol=code.symbol,
            max_rows=max_rows,
            row_grain=schedule.tile_rows,
            workspace=code.workspace,
            parts_per_thread=schedule.parts_per_thread,
            code=code.elf,
        )

    def schedule(self, problem: Problem, rows: int, seconds: float) -> Schedule:
        """The fastest schedule for `rows` rows: from the database, else by timing candidates, `seconds` long."""
        guesses = candidates(problem, self.target, rows)
        if self.effort == "off" or not self.target.host:
            return guesses[0]
        key = f"{problem.key} rows {rows} threads {self.threads} {self.target} {self.effort} code {code_version()}"
        record = self.database.find("schedule", key)
        if record is not None:
            return Schedule(**record["schedule"])
        best, taken = self._search(problem, rows, guesses, seconds)
        self.database.store("schedule", key, {"schedule": dataclasses.asdict(best), "seconds": taken})
        return best

    def _search(
        self, problem: Problem, rows: int, guesses: Sequence[Schedule], seconds: float
    ) -> tuple[Schedule, float]:
        start = time.perf_counter()
        workload = Workload(problem, rows, self.threads)
        best, least = guesses[0], workload.seconds(guesses[0], self.target)
        slowest = time.perf_counter() - start
        for schedule in guesses[1:]:
            begun = time.perf_counter()
            if begun - start + slowest > seconds:
                break
            taken = workload.seconds(schedule, self.target)
            slowest = max(slowest, time.perf_counter() - begun)
            if taken < least:
                best, least = schedule, taken
        return best, least

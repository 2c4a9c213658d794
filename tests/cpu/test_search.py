"""The search for a schedule keeps to its time."""

from pathlib import Path

import pytest

from sparsec.codegen.kernel import ANY_ROWS
from sparsec.codegen.problem import Problem
from sparsec.codegen.target import parse_cpu
from sparsec.codegen.tune import Database
from sparsec.codegen.tune.cpu import CpuTuner, search
from sparsec.codegen.tune.cpu.space import ROW_CLASSES, candidates


@pytest.mark.parametrize(("budget", "timed"), [(1.0, 1), (2.0, 2), (3.5, 3)])
def test_no_candidate_ends_after_the_budget(
    budget: float, timed: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each candidate takes a second of this clock: one that would end late is not begun."""
    now, seen = [0.0], []

    class Workload:
        def __init__(self, *_: object) -> None:
            pass

        def seconds(self, schedule: object, _: object) -> float:
            now[0] += 1.0
            seen.append(schedule)
            return 1.0 / len(seen)

    monkeypatch.setattr(search, "Workload", Workload)
    monkeypatch.setattr(search.time, "perf_counter", lambda: now[0])
    problem, target = Problem(1024, 1024, (16, 1), 16, 0.1), parse_cpu()
    assert len(candidates(problem, target, 128)) > timed
    tuner = CpuTuner(target, 2, "quick", Database(tmp_path / "tuning.sqlite"))
    best = tuner.schedule(problem, 128, budget)
    assert len(seen) == timed
    assert best == seen[-1]


def test_in_haste_there_is_code_for_the_rows_asked_for_only(tmp_path: Path) -> None:
    problem, target = Problem(32, 32, (16, 1), 16, 0.1), parse_cpu()
    tuner = CpuTuner(target, 2, "off", Database(tmp_path / "tuning.sqlite"), general=False)
    variants, schedules = tuner.variants(problem, (128, 1))
    assert [variant.max_rows for variant in variants] == [ROW_CLASSES[0], ANY_ROWS]
    assert schedules == {n: candidates(problem, target, n)[0] for n in (1, 128)}
    assert len(CpuTuner(target, 2, "off", tuner.database).variants(problem, (1,))[0]) == len(ROW_CLASSES)

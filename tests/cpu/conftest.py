"""For all tests on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from sparsec.codegen.tune.budget import BUDGET
from sparsec.compiler import runtime
from sparsec.compiler.removal import search
from sparsec.compiler.runtime import Comparison
from sparsec.ir import Timing


@pytest.fixture(autouse=True, scope="session")
def _short_searches() -> Iterator[None]:
    """Two seconds a problem are for users: hundreds of small models would take most of the time. The first few
    candidates are still timed; `test_search.py` has what a search does with its time.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BUDGET, "quick", 0.2)
        yield


@pytest.fixture
def smaller_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timings that do not depend on how busy the machine is."""
    monkeypatch.setattr(runtime, "compare", lambda dense, sparse, pairs=7: Comparison(2.0, 1.0, 2.0, (2.0, 2.0)))


@pytest.fixture
def as_fast_as_it_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model without half of its bytes is twice as fast."""

    def compare(program: Any, smaller: Any, workload: Any, context: Any) -> tuple[Timing, ...]:
        ratio = program.nbytes / smaller.program.nbytes
        return tuple(Timing(batch, batch, ratio, 1.0, ratio, (ratio, ratio)) for batch in workload.feeds)

    monkeypatch.setattr(search, "_compare", compare)

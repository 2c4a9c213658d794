"""For all tests on a CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sparsec.codegen.tune.budget import BUDGET


@pytest.fixture(autouse=True, scope="session")
def _short_searches() -> Iterator[None]:
    """Two seconds a problem are for users: hundreds of small models would take most of the time. The first few
    candidates are still timed; `test_search.py` has what a search does with its time.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BUDGET, "quick", 0.2)
        yield

"""How long to train."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ...ir import UsageError

_SECONDS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True, slots=True)
class Limit:
    """A time or a number of steps.

    Attributes:
        amount: seconds or steps.
        timed: whether it is seconds. How many steps these allow depends on the machine.
    """

    amount: float
    timed: bool

    def __str__(self) -> str:
        return f"{self.amount:.10g}s" if self.timed else f"{self.amount:.10g}"

    def spent(self, steps: float, seconds: float) -> float:
        """Which share of the limit so much is; 1 or more when it is over."""
        return (seconds if self.timed else steps) / self.amount

    def __mul__(self, share: float) -> Limit:
        """A share of it, at least one step."""
        return Limit(self.amount * share if self.timed else max(1, round(self.amount * share)), self.timed)


def parse_limit(text: str) -> Limit:
    """`5m`, `90s` and `1h` as seconds, `500` as steps.

    Raises:
        UsageError: it is neither, or nothing at all.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    amount = float(found[1]) * _SECONDS.get(found[2], 1) if found else math.nan
    whole = found is not None and (found[2] != "" or amount.is_integer())
    if not whole or not 0 < amount < math.inf:
        raise UsageError(
            f"'{text}' is no time: expected minutes such as 5m (90s, 1h), or a number of steps such as 500"
        )
    assert found is not None
    return Limit(amount, found[2] != "")

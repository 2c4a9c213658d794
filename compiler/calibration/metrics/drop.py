"""How much worse a metric may become."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ....ir import UsageError

if TYPE_CHECKING:
    from .metric import Metric


@dataclass(frozen=True, slots=True)
class Drop:
    """How much worse a metric may become; as text what the user wrote.

    Attributes:
        amount: a difference of the metric, or a share of the dense model's value.
        relative: whether it is the latter. Where that value is 0 (mse without labels), 1% allows a difference of 0.01.
    """

    amount: float
    relative: bool

    def __str__(self) -> str:
        return f"{100 * self.amount:.10g}%" if self.relative else f"{self.amount:.10g}"

    def allows(self, metric: Metric, dense: float, value: float) -> bool:
        """Whether `value` is at most this much worse than the dense model's."""
        difference, share = metric.drop(dense, value)
        # 0.76 - 0.75 is more than 0.01 in floats.
        if self.relative:
            return share <= self.amount + 1e-9
        return difference <= self.amount + 1e-9 * max(1.0, abs(dense))

    def lost(self, metric: Metric, dense: float, value: float) -> str:
        """How much worse `value` is, in the limit's own terms: "6.54%" or "0.0654"."""
        difference, share = metric.drop(dense, value)
        return f"{100 * share:.4g}%" if self.relative else f"{difference:.4g}"


def parse_drop(text: str) -> Drop:
    """`1%` as a share of the dense model's value, `0.01` as a difference of the metric.

    Raises:
        UsageError: it is no number of 0 or more.
    """
    number, percent = text.strip(), False
    if number.endswith("%"):
        number, percent = number[:-1], True
    try:
        amount = float(number)
    except ValueError:
        amount = math.nan
    if not (0 <= amount < math.inf):
        raise UsageError(
            f"'{text}' is no drop: expected a share of the dense model's value, such as 1%, or a difference of the "
            "metric, such as 0.01"
        )
    return Drop(amount / 100 if percent else amount, percent)

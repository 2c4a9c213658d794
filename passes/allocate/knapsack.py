"""Dynamic programming over layers: one choice each, the least sum of errors whose costs fit a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Into how many steps the budget above the cheapest choices is cut. Costs are rounded up to whole steps: with 50 layers
# at most 1.3 % of it is lost to rounding, and no allocation exceeds it.
STEPS = 4000


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the things that may become of a layer.

    Attributes:
        error: what it adds to the sum that is made small; not negative.
        cost: what it takes of the budget, in any unit; not negative.
    """

    error: float
    cost: float


def allocate(layers: Sequence[Sequence[Choice]], budget: float) -> list[int] | None:
    """For each layer the number of its choice: the least total error with total cost at most `budget`.

    The allocation of SPDY (Frantar and Alistarh, ICML 2022): a knapsack with one item of each layer, solved for all
    budgets up to this one at once.

    Args:
        layers: each layer's choices, at least one.
        budget: in the unit of the costs.

    Returns:
        None where even the cheapest choices cost more.
    """
    cheapest = [min(range(len(choices)), key=lambda i: (choices[i].cost, choices[i].error)) for choices in layers]
    fixed = sum(choices[i].cost for choices, i in zip(layers, cheapest, strict=True))
    if fixed > budget:
        return None
    unit = (budget - fixed) / STEPS
    best = np.zeros(STEPS + 1)
    picked: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []
    for choices, least in zip(layers, cheapest, strict=True):
        totals = np.full((len(choices), STEPS + 1), np.inf)
        for i, choice in enumerate(choices):
            above = choice.cost - choices[least].cost
            steps = 0 if above == 0 else int(np.ceil(above / unit - 1e-9)) if unit > 0 else STEPS + 1
            if steps <= STEPS:
                totals[i, steps:] = best[: STEPS + 1 - steps] + choice.error
        picked.append(np.argmin(totals, axis=0))
        best = np.min(totals, axis=0)
    chosen: list[int] = []
    left = STEPS
    for choices, least, table in zip(reversed(layers), reversed(cheapest), reversed(picked), strict=True):
        i = int(table[left])
        chosen.append(i)
        above = choices[i].cost - choices[least].cost
        left -= 0 if above == 0 else int(np.ceil(above / unit - 1e-9))
    return chosen[::-1]

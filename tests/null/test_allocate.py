"""The allocation of a budget over layers: against all allocations there are, on problems small enough to list them."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.passes.allocate import Choice, allocate
from sparsec.passes.allocate.knapsack import STEPS

Layers = list[list[Choice]]

NUMBER = st.floats(0, 100, allow_subnormal=False).map(lambda value: round(value, 3))
LAYERS = st.lists(st.lists(st.builds(Choice, NUMBER, NUMBER), min_size=1, max_size=4), min_size=1, max_size=4)
WHOLE = st.lists(
    st.lists(st.builds(Choice, st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4), min_size=1, max_size=5
)


def total(layers: Layers, chosen: list[int]) -> Choice:
    picked = [choices[i] for choices, i in zip(layers, chosen, strict=True)]
    return Choice(sum(choice.error for choice in picked), sum(choice.cost for choice in picked))


def brute_force(layers: Layers, budget: float) -> float | None:
    """The least error at this budget, over all allocations."""
    sums = (total(layers, list(chosen)) for chosen in product(*(range(len(choices)) for choices in layers)))
    return min((one.error for one in sums if one.cost <= budget), default=None)


def extremes(layers: Layers) -> tuple[float, float]:
    """The costs of the cheapest allocation and of the dearest."""
    least, most = ([bound(choice.cost for choice in choices) for choices in layers] for bound in (min, max))
    return sum(least), sum(most)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(layers=LAYERS, share=st.integers(-20, 120))
def test_no_allocation_is_better_by_more_than_the_steps(layers: Layers, share: int) -> None:
    cheapest, dearest = extremes(layers)
    budget = cheapest + (dearest - cheapest + 1) * share / 100
    chosen = allocate(layers, budget)
    if share < 0:
        assert chosen is None
        return
    assert chosen is not None and len(chosen) == len(layers)
    found = total(layers, chosen)
    assert found.cost <= budget * (1 + 1e-9)
    # Each layer loses less than one step to rounding.
    exact = brute_force(layers, budget - (budget - cheapest) * len(layers) / STEPS + 1e-9)
    assert exact is not None
    assert found.error <= exact + 1e-9


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(layers=WHOLE, above=st.sampled_from((0, 1, 2, 5, 8, 10, 20)))
def test_exact_where_costs_are_whole_steps(layers: Layers, above: int) -> None:
    """4000 steps are divided by these budgets without a rest, so nothing is rounded."""
    budget = extremes(layers)[0] + above
    chosen = allocate(layers, budget)
    assert chosen is not None
    found = total(layers, chosen)
    assert found.cost <= budget
    assert found.error == brute_force(layers, budget)


def test_none_where_even_the_cheapest_costs_more() -> None:
    layers = [[Choice(0, 5), Choice(1, 2)], [Choice(0, 3)]]
    assert allocate(layers, 4.999) is None
    assert allocate(layers, 5) == [1, 0]
    assert allocate(layers, -1) is None
    assert allocate([], 0) == []


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e9])
def test_budgets_of_any_size(scale: float) -> None:
    layers = [[Choice(0, 7 * scale), Choice(1, scale)], [Choice(0, 3 * scale), Choice(1, 0)]]
    assert allocate(layers, 10.01 * scale) == [0, 0]
    assert allocate(layers, 9.99 * scale) in ([0, 1], [1, 0])
    assert allocate(layers, 6.9 * scale) == [1, 0]
    assert allocate(layers, 3.9 * scale) == [1, 1]


def test_one_choice_each() -> None:
    assert allocate([[Choice(9, 4)]] * 3, 12) == [0, 0, 0]
    assert allocate([[Choice(9, 4)]] * 3, 11) is None


def test_of_choices_that_cost_nothing_the_best() -> None:
    free = [Choice(2, 0), Choice(1, 0), Choice(3, 0)]
    assert allocate([free, free], 0) == [1, 1]
    assert allocate([free, [Choice(0, 1), Choice(5, 0)]], 0) == [1, 1]
    assert allocate([free, [Choice(0, 1), Choice(5, 0)]], 1) == [1, 0]


def test_of_equals_the_first() -> None:
    """The dense layer stands first: nothing is pruned that brings nothing."""
    same = [Choice(1, 2), Choice(1, 2), Choice(1, 2)]
    assert allocate([same, same], 4) == [0, 0]
    assert allocate([same, same], 100) == [0, 0]


@pytest.mark.parametrize("layers", [50, 200])
def test_many_layers_lose_little_to_rounding(layers: int) -> None:
    """Errors and costs of pruning to 0, 10, .. 90 %; the relaxation, which may split layers, bounds what is best."""
    rng = np.random.default_rng(layers)
    size, harm = rng.uniform(1, 10, layers), rng.lognormal(0, 1, layers)
    zeros = np.linspace(0, 0.9, 10)
    problem = [[Choice(h * z**3, s * (1 - z)) for z in zeros] for s, h in zip(size, harm, strict=True)]
    budget = 0.5 * float(size.sum())
    chosen = allocate(problem, budget)
    assert chosen is not None
    found = total(problem, chosen)
    assert found.cost <= budget
    lost = (budget - extremes(problem)[0]) * layers / STEPS
    assert found.error <= 1.02 * relaxed(problem, budget - lost)


def relaxed(problem: Layers, budget: float) -> float:
    """Lagrange's lower bound: the largest over prices of the least (error + price x (cost - budget))."""
    errors = np.array([[choice.error for choice in choices] for choices in problem])
    costs = np.array([[choice.cost for choice in choices] for choices in problem])
    prices = np.geomspace(1e-4, 1e3, 400)
    return max(float((errors + price * costs).min(1).sum() - price * budget) for price in prices)

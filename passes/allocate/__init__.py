"""Which layer gets how much: the least error under a budget."""

from .knapsack import Choice, allocate

__all__ = ["Choice", "allocate"]

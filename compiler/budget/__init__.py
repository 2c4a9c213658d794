"""Budgets: what each layer could become, what that costs and brings, and the best of it for a whole model."""

from .fitting import PLANNED, Chosen, Fitting
from .options import Option, Options
from .patterns import with_pattern
from .search import Search

__all__ = ["PLANNED", "Chosen", "Fitting", "Option", "Options", "Search", "with_pattern"]

"""`structured`: channels left out of a model, and what that costs and brings."""

from .check import check_structured
from .removal import Removal, Smaller
from .search import Removed, remove_channels

__all__ = ["Removal", "Removed", "Smaller", "check_structured", "remove_channels"]

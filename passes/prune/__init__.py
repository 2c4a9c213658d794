"""Ways to choose which weights stay, one a file."""

from .keep import Found, find_pattern
from .magnitude import prune_by_norm

__all__ = ["Found", "find_pattern", "prune_by_norm"]

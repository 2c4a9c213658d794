"""Which channels lie along the axes of a model's values, and what keeps them together.

`find_channels` walks the model; its dimensions are channels that can be put into another order (`passes/permute`) or,
where nothing works across them, left out (`passes/remove`), the same for all that reads and writes them.
"""

from .dimensions import Channels, Dimension, Place, find_channels, find_dimensions

__all__ = ["Channels", "Dimension", "Place", "find_channels", "find_dimensions"]

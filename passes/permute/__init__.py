"""Channels in an order that brings saliency together in blocks, folded into the weights on both sides of them.

`passes/channels` says which channels are free, `search_all` looks for their orders before blocks are cut, and `reorder`
gives the model with the orders applied, which computes the same at the same cost.
"""

from .orders import layer_orders
from .reorder import reorder
from .search import kept, permuted, search, search_all

__all__ = [
    "kept",
    "layer_orders",
    "permuted",
    "reorder",
    "search",
    "search_all",
]

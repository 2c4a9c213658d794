"""Channels left out of a model, of all that writes and reads them: what comes out is a smaller dense model.

`removable` says of which dimensions channels can go and why of others none can, `mask_weights` gives the weights of
layers with zeros where channels would be left out (`mask_recurrence` those between the units of one), and `remove` the
smaller model, which computes the same as those. `live_channels` finds those that do not go without a difference.
"""

from .dead import live_channels
from .removable import Removable, removable
from .remove import layer_indices, mask_recurrence, mask_weights, remove

__all__ = ["Removable", "layer_indices", "live_channels", "mask_recurrence", "mask_weights", "removable", "remove"]

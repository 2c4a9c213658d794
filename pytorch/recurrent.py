"""LSTM and GRU run from a list of their weights, which knows nothing of parametrizations."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import parametrize


def compute_flat_weights(module: nn.RNNBase) -> None:
    """Have the list made of what the weights are now, whenever it is read; `restore_flat_weights` ends it.

    The module's class, which parametrizing has made for it alone, gets it as a property. The list in the module itself
    stays below, with the parameters: results of a computation could not be copied with the module.
    """
    type(module)._flat_weights = property(_current, lambda module, weights: None)


def restore_flat_weights(module: nn.RNNBase) -> None:
    """Leave the module as one that was never parametrized."""
    if not parametrize.is_parametrized(module):
        module._flat_weights = _current(module)


def _current(module: Any) -> list[Any]:
    return [getattr(module, name, None) for name in module._flat_weights_names]

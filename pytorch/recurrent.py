"""LSTM and GRU run from a list of their weights, which knows nothing of parametrizations."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import parametrize


def refresh_flat_weights(module: nn.RNNBase) -> None:
    """Have the list refreshed before each run, once for each module; `restore_flat_weights` ends it.

    After the run the list has the parameters again: a module that holds results of a computation cannot be copied.
    """
    if _before not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_before)
        module.register_forward_hook(_after, always_call=True)
    _after(module)


def restore_flat_weights(module: nn.RNNBase) -> None:
    """Leave the module as one that was never parametrized."""
    for hooks, own in ((module._forward_pre_hooks, _before), (module._forward_hooks, _after)):
        for key in [key for key, hook in hooks.items() if hook is own]:
            del hooks[key]
    module._forward_hooks_always_called.clear()
    _before(module)


def _before(module: Any, *_: Any) -> None:
    module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]


def _after(module: Any, *_: Any) -> None:
    module._flat_weights = [
        module.parametrizations[name].original
        if parametrize.is_parametrized(module, name)
        else getattr(module, name, None)
        for name in module._flat_weights_names
    ]

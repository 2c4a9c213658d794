"""The end of training: zeros become part of the weights."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from .methods.magnitude import Mask
from .methods.psp import StructureParameters
from .recurrent import restore_flat_weights

M = TypeVar("M", bound=nn.Module)


def finalize(model: M) -> M:
    """Take all masks of sparsec off `model`, in place: what it computed with becomes its weights. Returns `model`."""
    for module in list(model.modules()):
        names = pruned_parameters(module)
        if names:
            # A copy of a module shares the class that parametrizing has made, and removing takes properties off it.
            shared = type(module)
            module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
        for name in names:
            _take_off(module, name)
        if names and isinstance(module, nn.RNNBase):
            restore_flat_weights(module)
    return model


def _take_off(module: nn.Module, name: str) -> None:
    """The mask, which is the first on its parameter; what others have put on after it stays."""
    lists: Any = module.parametrizations
    found = lists[name]
    if len(found) == 1:
        parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        return
    with torch.no_grad():
        found.original.copy_(found[0](found.original))
    del found[0]


def pruned_parameters(module: nn.Module) -> list[str]:
    """Names of the parameters of this very module that have a mask of sparsec."""
    if not parametrize.is_parametrized(module):
        return []
    lists = module.parametrizations
    assert isinstance(lists, nn.ModuleDict)
    return [name for name, found in lists.items() if isinstance(found[0], (Mask, StructureParameters))]

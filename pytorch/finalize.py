"""The end of training: zeros become part of the weights."""

from __future__ import annotations

from typing import TypeVar

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
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        if names and isinstance(module, nn.RNNBase):
            restore_flat_weights(module)
    return model


def pruned_parameters(module: nn.Module) -> list[str]:
    """Names of the parameters of this very module that have a mask of sparsec."""
    if not parametrize.is_parametrized(module):
        return []
    lists = module.parametrizations
    assert isinstance(lists, nn.ModuleDict)
    return [name for name, found in lists.items() if isinstance(found[0], (Mask, StructureParameters))]

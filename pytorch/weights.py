"""Weights of modules that can be pruned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..ir import SparsecError
from .layout import Layout

if TYPE_CHECKING:
    from collections.abc import Iterator

# ONNX's order of the gates, as indices into PyTorch's: (i, f, g, o) -> (i, o, f, c) and (r, z, n) -> (z, r, h).
_GATES: dict[type[nn.Module], tuple[int, ...]] = {nn.LSTM: (0, 3, 1, 2), nn.GRU: (1, 0, 2)}
_KINDS = "Linear, Conv1d, Conv2d, LSTM, GRU and MultiheadAttention"
_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d)
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True, eq=False)
class Weight:
    """One weight of a module.

    Attributes:
        name: as in the model's `named_parameters`: "encoder.linear1.weight", "lstm.weight_hh_l0".
        module: that has it.
        parameter: its name there.
        layout: as a matrix.
    """

    name: str
    module: nn.Module
    parameter: str
    layout: Layout

    @property
    def value(self) -> torch.Tensor:
        """What the module computes with."""
        value: torch.Tensor = getattr(self.module, self.parameter)
        return value.detach()

    @property
    def size(self) -> int:
        """Number of weights."""
        out, inputs = self.layout.matrix
        return out * inputs

    @property
    def original(self) -> torch.Tensor:
        """What is trained."""
        original: torch.Tensor = self._parametrizations.original
        return original.detach()

    @property
    def mask(self) -> Any:
        """What was put on the parameter.

        Raises:
            SparsecError: it has been taken off.
        """
        return self._parametrizations[0]

    @property
    def _parametrizations(self) -> Any:
        if not parametrize.is_parametrized(self.module, self.parameter):
            raise SparsecError(f"{self.name}: its zeros are final already; to prune it again call prune() again")
        return self.module.parametrizations[self.parameter]


def find_weights(model: nn.Module, positions_first: bool) -> tuple[list[Weight], dict[str, str]]:
    """All weights that can be pruned, and why others cannot, by name; vectors and scalars are not mentioned."""
    # By module, each once: one that is used twice has one weight.
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, value in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(value), []).append(_joined(path, name))
    found: list[Weight] = []
    others: dict[str, str] = {}
    for path, module in model.named_modules():
        if "parametrizations" in path.split("."):
            continue
        names = list(_names(module))
        for parameter in names:
            value = getattr(module, parameter, None)
            if value is None:
                continue
            name = _joined(path, parameter)
            tied = [other for other in owners.get(id(value), ()) if other != name]
            reason = _obstacle(module, parameter, value, tied)
            if reason:
                others[name] = reason
            else:
                layout = Layout(tuple(value.shape), _gates(module, parameter), positions_first)
                found.append(Weight(name, module, parameter, layout))
        kind = f"{type(module).__name__} is none of {_KINDS}" if not names else f"it is no weight of {_KINDS}"
        for name, value in module.named_parameters(recurse=False):
            if name not in names and _is_matrix(value):
                others[_joined(path, name)] = kind
    return found, others


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Refuse what no norm can be taken of.

    Raises:
        SparsecError: a number is NaN or infinite.
    """
    if not bool(torch.isfinite(tensor).all()):
        raise SparsecError(f"{name}: a number is NaN or infinite, so it cannot be said what stays: did training fail?")


def _obstacle(module: nn.Module, parameter: str, value: Any, tied: list[str]) -> str:
    """Why a weight cannot be pruned, or ""."""
    if parametrize.is_parametrized(module, parameter):
        return "it is parametrized already: take that off first (finalize() does it with masks of sparsec)"
    if not isinstance(value, nn.Parameter):
        return "it is computed from other parameters (such as weight_norm makes it): remove that first"
    if isinstance(value, nn.parameter.UninitializedParameter) or value.is_meta:
        return "it has no values yet: run the model once first"
    if not value.is_floating_point() or not value.numel():
        return f"it has {value.numel()} weights of type {value.dtype}, which have no norm"
    return f"it is tied to {', '.join(tied)}, which would get the same zeros" if tied else ""


def _is_matrix(value: Any) -> bool:
    return not isinstance(value, nn.parameter.UninitializedParameter) and value.ndim > 1


def _joined(path: str, parameter: str) -> str:
    return f"{path}.{parameter}" if path else parameter


def _names(module: Any) -> Iterator[str]:
    """Of the weights that this module may have."""
    if isinstance(module, _PLAIN):
        yield "weight"
    elif isinstance(module, nn.MultiheadAttention):
        yield from _PROJECTIONS
    elif isinstance(module, (nn.LSTM, nn.GRU)):
        yield from (name for name in module._flat_weights_names if name.startswith("weight"))


def _gates(module: nn.Module, parameter: str) -> tuple[int, ...]:
    # weight_hr projects the state of an LSTM with proj_size: it has no gates.
    if parameter.startswith("weight_hr"):
        return ()
    return next((gates for kind, gates in _GATES.items() if isinstance(module, kind)), ())

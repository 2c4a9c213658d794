"""From a model and a configuration to a model with masks."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.utils import parametrize

from ..ir import SparsecError, UsageError
from .config import PruneConfig
from .pruner import Pruner
from .recurrent import compute_flat_weights
from .structures import Structure
from .weights import check_finite, find_weights

if TYPE_CHECKING:
    from .weights import Weight


def prune(model: nn.Module, config: PruneConfig) -> Pruner:
    """Put masks on the weights of `model`, in place, as parametrizations.

    Linear, Conv1d, Conv2d, LSTM, GRU and MultiheadAttention; biases, norms and embeddings stay. An optimizer that
    exists already goes on with the same parameters, unless the method brings new ones (`PSP`).

    Raises:
        UsageError: a name in `layer_sparsity` fits no weight, or one that cannot be pruned; the schedule goes back to
            weights that some module does not have yet.
        SparsecError: there is nothing to prune, or a weight is NaN or infinite.
    """
    _check_types(model, config)
    structure = config.structure
    found, skipped = find_weights(model, isinstance(structure, Structure) and structure.positions_first)
    _check_names([*(weight.name for weight in found), *skipped], skipped, config)
    chosen: list[Weight] = []
    shares: list[float | None] = []
    for weight in found:
        share, by_name = _share(weight.name, config)
        if by_name and share == 0:
            skipped[weight.name] = "as was asked for"
        elif share is None and config.sparsity is None and config.layer_sparsity:
            skipped[weight.name] = "not named in layer_sparsity"
        elif not by_name and weight.size < config.least_weights:
            skipped[weight.name] = f"{weight.size:,} weights, below least_weights={config.least_weights:,}"
        elif _is_one_block(weight, structure):
            skipped[weight.name] = f"all of it is one of its {structure}, without which nothing would be left"
        else:
            chosen.append(weight)
            shares.append(share)
    if not chosen:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:5]) or "it has no weights"
        raise SparsecError(f"prune: nothing of this {type(model).__name__} can be pruned ({reasons})")
    for weight in chosen:
        check_finite(weight.name, weight.value)
    for weight in chosen:
        _parametrize(weight, structure, config)
    pruner = Pruner(model, chosen, shares, config)
    pruner.skipped.update(skipped)
    return pruner


def _check_types(model: Any, config: Any) -> None:
    if not isinstance(model, nn.Module) or not isinstance(config, PruneConfig):
        raise UsageError(
            "prune: expected a torch.nn.Module and a PruneConfig, got "
            f"{type(model).__name__} and {type(config).__name__}"
        )
    lazy = [name for name, value in model.named_parameters() if isinstance(value, nn.parameter.UninitializedParameter)]
    if lazy and config.schedule.rewind_from() is not None:
        raise UsageError(f"prune: '{lazy[0]}' has no values yet that could be gone back to: run the model once first")


def _is_one_block(weight: Weight, structure: Any) -> bool:
    """Whether a structure, other than that of whole layers, is all of this weight."""
    if not isinstance(structure, Structure) or structure == Structure("layers"):
        return False
    layout = weight.layout
    block = structure.block(layout.matrix, layout.kernel)
    return (block.rows, block.cols) == layout.matrix


def _parametrize(weight: Weight, structure: Any, config: PruneConfig) -> None:
    layout = weight.layout
    pattern = structure.block(layout.matrix, layout.kernel) if isinstance(structure, Structure) else structure
    parametrize.register_parametrization(
        weight.module, weight.parameter, config.method.parametrization(weight.value, layout, pattern)
    )
    if isinstance(weight.module, nn.RNNBase):
        compute_flat_weights(weight.module)


def _share(name: str, config: PruneConfig) -> tuple[float | None, bool]:
    """The share of zeros asked for, and whether by name."""
    for pattern, share in reversed(config.layer_sparsity):
        if _fits(name, pattern):
            return share, True
    return config.sparsity, False


def _fits(name: str, pattern: str) -> bool:
    """Whether `pattern` means this weight, or a module that it lies in."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _check_names(names: list[str], skipped: dict[str, str], config: PruneConfig) -> None:
    for pattern, share in config.layer_sparsity:
        fitting = [name for name in names if _fits(name, pattern)]
        if not fitting:
            known = ", ".join(names[:8]) + (", .." if len(names) > 8 else "")
            raise UsageError(f"layer_sparsity: '{pattern}' fits no weight of the model: there are {known or 'none'}")
        if share and all(name in skipped for name in fitting):
            raise UsageError(f"layer_sparsity: '{fitting[0]}' cannot be pruned: {skipped[fitting[0]]}")

"""What each layer could become: which weights it would have, and which layers are not even tried, and why."""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import numpy as np

from ..ir import Layer, LayerKind, SparseMatrix, UsageError, parse_pattern
from ..passes.prune import find_pattern, prune_by_norm
from ..passes.prune.keep import LEAST_ZEROS
from .config import TINY_WEIGHTS
from .formats import Form, form_of, kinds_of, pack

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    import onnx_ir
    from numpy.typing import NDArray

    from ..codegen.target import Target
    from ..ir import Grid, Program
    from .calibration import Weights
    from .config import CompileConfig

# Operators between a classifier's last layer and the model's output.
_AFTER_LAST = frozenset(
    {"Softmax", "LogSoftmax", "Sigmoid", "ArgMax", "TopK", "Reshape", "Flatten", "Squeeze", "Identity", "Cast", "Add"}
    | {"QuantizeLinear", "DequantizeLinear"}
)


@dataclass(frozen=True)
class Candidate:
    """A layer that a sparse operator may take over.

    Attributes:
        layer: as found.
        matrix: the packed weight that it would have.
        pruned: whether sparsec set weights to zero.
        found: what the zeros that were already there look like, "" where sparsec chose them.
        x: how its kernel is given X, as in `codegen.problem.Problem`.
        x_grid: of X, where `x` is "static" or "uint8"; None for that of the layer.
        y_grid: that Y is rounded to; None for that of the layer, or floats.
    """

    layer: Layer
    matrix: SparseMatrix
    pruned: bool
    found: str = ""
    x: str = "float"
    x_grid: Grid | None = None
    y_grid: Grid | None = None


@dataclass(frozen=True)
class Pruned:
    """A weight with zeros that sparsec put there.

    Attributes:
        layer: as found.
        sparsity: share of zeros aimed at.
        weight: [out, in] float32.
        bias: [out] float32 that goes with it; None for the layer's own.
    """

    layer: Layer
    sparsity: float
    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Plan:
    """What becomes of each layer; all by layer name, in the graph's order.

    Attributes:
        candidates: layers that a sparse operator may take over.
        reasons: why each of the others is none.
        pruned: new weights, of candidates and, with `prune_all`, of layers that stay dense.
    """

    candidates: dict[str, Candidate]
    reasons: dict[str, str]
    pruned: dict[str, Pruned]


def make_plan(program: Program, config: CompileConfig, target: Target | None = None) -> Plan:
    """Choose the weights that each layer would have, by the configuration.

    Args:
        program: what was read.
        config: what to prune, and how.
        target: what is compiled for; None for any target that could run a layer.

    Raises:
        UsageError: a sparsity was asked for by a name that no layer has.
    """
    check_names(program, config)
    candidates: dict[str, Candidate] = {}
    reasons: dict[str, str] = {}
    pruned: dict[str, Pruned] = {}
    last = last_layers(program)
    for layer in program.layers:
        outcome = _consider(layer, config, layer.name in last, _obstacle(layer, target))
        if isinstance(outcome, Candidate):
            candidates[layer.name] = outcome
        elif isinstance(outcome, Pruned):
            pruned[layer.name] = outcome
            matrix, x = pack(layer, outcome.weight, form_of(layer, config), config)
            candidates[layer.name] = Candidate(layer, matrix, pruned=True, x=x)
        else:
            reasons[layer.name] = outcome
            sparsity = _wanted_dense(layer, config) if config.prune_all else None
            if sparsity is not None:
                pruned[layer.name] = _prune(layer, config, sparsity)
    return Plan(candidates, reasons, pruned)


def with_weights(
    plan: Plan,
    weights: Mapping[str, Weights],
    forms: Mapping[str, Form],
    tried: Collection[str],
    config: CompileConfig,
) -> Plan:
    """The plan with weights that were fitted to data.

    Args:
        plan: made without data.
        weights: by layer name.
        forms: of these weights, by layer name.
        tried: layers that could have been pruned; those without weights stay as they came.
        config: kind of activations.
    """
    candidates, reasons, pruned = dict(plan.candidates), dict(plan.reasons), dict(plan.pruned)
    for name in tried:
        new = weights.get(name)
        if new is None:
            del pruned[name]
            if candidates.pop(name, None) is not None:
                reasons[name] = "pruning it costs more than it brings here"
            continue
        sparsity = float((new.matrix == 0).mean())
        pruned[name] = replace(pruned[name], sparsity=sparsity, weight=new.matrix, bias=new.bias)
        if name in candidates:
            matrix, x = pack(candidates[name].layer, new.matrix, forms[name], config, new.table)
            candidates[name] = replace(candidates[name], matrix=matrix, x=x)
    return Plan(candidates, reasons, pruned)


def check_names(program: Program, config: CompileConfig) -> None:
    """Refuse a sparsity for layers that are not there.

    Raises:
        UsageError: no layer has such a name.
    """
    names = [layer.name for layer in program.layers]
    for glob, _ in config.layer_sparsity:
        if names and not any(fnmatchcase(name, glob) for name in names):
            close = get_close_matches(glob, names, n=3, cutoff=0.3) or names[:3]
            known = ", ".join(f"'{name}'" for name in close)
            raise UsageError(f"--sparsity '{glob}=...' names no layer; the model has {known}: see sparsec inspect")


def _obstacle(layer: Layer, target: Target | None) -> str:
    """Why the layer can have no sparse operator on `target`, or ""."""
    # ONNX Runtime's CPU provider has no 16-bit products that a sparse one could be faster than.
    if not layer.obstacle and layer.dtype != "float32" and target is not None and not target.cuda:
        return f"{layer.dtype} weights; their sparse operators need a GPU (--target cuda:sm_90)"
    if not layer.obstacle and layer.stored and target is not None and target.cuda:
        return f"weights of {layer.stored}; their sparse operators need a CPU so far (--target cpu)"
    return layer.obstacle


def _prune(layer: Layer, config: CompileConfig, sparsity: float) -> Pruned:
    """By norm, as long as there is no data."""
    return Pruned(layer, sparsity, prune_by_norm(layer.weight, parse_pattern(form_of(layer, config).pattern), sparsity))


def _consider(layer: Layer, config: CompileConfig, is_last: bool, obstacle: str) -> Candidate | Pruned | str:
    """What is kept of zeros that are there, what is pruned, or why neither."""
    sparsity, by_name = config.wanted_sparsity(layer.name)
    if obstacle:
        zeros = f" ({find_pattern(layer.weight)})" if layer.weight.size and layer.zeros >= LEAST_ZEROS else ""
        return f"{obstacle}{zeros}"
    if not by_name and layer.weight.size < TINY_WEIGHTS:
        return f"{layer.weight.size:,} weights, below {TINY_WEIGHTS:,}"
    if sparsity is None or layer.zeros >= sparsity > 0:
        return _keep(layer, config)
    if sparsity == 0:
        return "no pruning asked for here"
    if layer.fixed and config.calib is not None:
        return f"{layer.op_type}: its weight cannot be fitted to data; quantise the model in QDQ form for that"
    if is_last and not by_name:
        return f"the model's last layer; --sparsity '{layer.name}={sparsity:g}' prunes it too"
    return _prune(layer, config, sparsity)


def _keep(layer: Layer, config: CompileConfig) -> Candidate | str:
    """The zeros that are there, in the block shape that wastes least."""
    if layer.zeros < LEAST_ZEROS:
        return f"{layer.zeros:.1%} zeros, too few to use"
    found = find_pattern(layer.weight)
    if not found.usable:
        return str(found)
    form = Form(str(found.pattern), kinds_of(layer, config)[0])
    matrix, x = pack(layer, layer.weight, form, config)
    return Candidate(layer, matrix, pruned=False, found=str(found), x=x)


def _wanted_dense(layer: Layer, config: CompileConfig) -> float | None:
    """The sparsity that `prune_all` gives a layer that stays dense; None where it stays as it is."""
    sparsity, by_name = config.wanted_sparsity(layer.name)
    tiny = layer.weight.size < TINY_WEIGHTS and not by_name
    fixed = layer.fixed or layer.kind is LayerKind.RECURRENT or not layer.weight.size or not layer.rewritable
    if not sparsity or tiny or layer.zeros >= sparsity or fixed:
        return None
    return sparsity


def last_layers(program: Program) -> set[str]:
    """Names of the linear layers whose output is the model's, but for a softmax or a change of shape."""
    outputs = set(program.model.graph.outputs)
    return {
        layer.name
        for layer in program.layers
        if layer.kind is LayerKind.LINEAR and _reaches_output(layer.nodes[-1].outputs[0], outputs)
    }


def _reaches_output(value: onnx_ir.Value, outputs: set[onnx_ir.Value]) -> bool:
    if value in outputs:
        return True
    users = [node for node, _ in value.uses()]
    return bool(users) and all(
        node.op_type in _AFTER_LAST and any(_reaches_output(output, outputs) for output in node.outputs)
        for node in users
    )

"""What a model holds and what sparsec could do with it; nothing is compiled or measured."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir

from ..passes.prune import find_pattern
from ..passes.prune.keep import LEAST_ZEROS
from .config import TINY_WEIGHTS, CompileConfig
from .frontend import read
from .frontend.tensors import external_tensors, held_tensors
from .plan import last_layers, make_plan

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..ir import Layer, Program
    from .plan import Plan


@dataclass(frozen=True, slots=True)
class TensorSummary:
    """An input or output. `shape` has names for dynamic dimensions and "?" where nothing is known; None: no shape."""

    name: str
    dtype: str
    shape: tuple[int | str, ...] | None


@dataclass(frozen=True, slots=True)
class LayerSummary:
    """One layer.

    Attributes:
        dtype: of the weight.
        shape: (out, in).
        block: the block shape that stores its zeros at least cost, "none" where they are scattered, "" where there
            are too few to look.
        fused: the activation that goes with it, "none" without.
        outlook: "zeros" where they can be compiled as they are, "prune" where pruning is needed first, "stays dense".
        reason: why, in words.
    """

    name: str
    op_type: str
    kind: str
    dtype: str
    shape: tuple[int, int]
    zeros: float
    block: str
    fused: str
    outlook: str
    reason: str


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """The model and its layers.

    Attributes:
        bytes: of the file and its external data.
        parameters: elements of all tensors that it holds.
        nodes: of all graphs, those inside nodes included.
        opsets: version by domain; ONNX's own is "ai.onnx".
    """

    file: str
    bytes: int
    parameters: int
    nodes: int
    ir_version: int
    opsets: dict[str, int]
    producer: str
    inputs: tuple[TensorSummary, ...]
    outputs: tuple[TensorSummary, ...]
    layers: tuple[LayerSummary, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return dataclasses.asdict(self)


def inspect(model: str | Path) -> ModelSummary:
    """Read the model and look at its layers, by the rules by which it would be compiled.

    Raises:
        SparsecError: it cannot be read.
    """
    path = Path(model)
    program = read(path)
    graph = program.model.graph
    # Before IR version 4 every initialiser is listed as an input too.
    inputs = [value for value in graph.inputs if not value.is_initializer()]
    version = program.model.producer_version
    return ModelSummary(
        file=str(path),
        bytes=_file_bytes(path, program),
        parameters=sum(int(tensor.size) for tensor, _ in held_tensors(program.model)),
        nodes=sum(len(g) for g in program.model.graphs()),
        ir_version=program.model.ir_version,
        opsets={domain or "ai.onnx": version for domain, version in program.model.opset_imports.items()},
        producer=" ".join(filter(None, (program.model.producer_name, version))),
        inputs=_tensors(inputs),
        outputs=_tensors(graph.outputs),
        layers=_layers(program),
    )


def _file_bytes(path: Path, program: Program) -> int:
    files = {Path(tensor.path) for tensor, _ in external_tensors(program.model)}
    return path.stat().st_size + sum(file.stat().st_size for file in files)


def _tensors(values: Iterable[onnx_ir.Value]) -> tuple[TensorSummary, ...]:
    return tuple(TensorSummary(value.name or "", _dtype(value), _shape(value)) for value in values)


def _dtype(value: onnx_ir.Value) -> str:
    if isinstance(value.type, onnx_ir.TensorType):
        name = value.type.dtype.name.lower()
        return {"float": "float32", "double": "float64"}.get(name, name)
    return "unknown" if value.type is None else str(value.type)


def _shape(value: onnx_ir.Value) -> tuple[int | str, ...] | None:
    if value.shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else dim.value or "?" for dim in value.shape)


def _layers(program: Program) -> tuple[LayerSummary, ...]:
    plan, last = make_plan(program, CompileConfig()), last_layers(program)
    return tuple(_summary(layer, plan, layer.name in last) for layer in program.layers)


def _summary(layer: Layer, plan: Plan, is_last: bool) -> LayerSummary:
    outlook, reason = _outlook(layer, plan, is_last)
    if layer.dtype != "float32" and not layer.obstacle:
        reason += f"; {layer.dtype}, so for GPUs only (--target cuda:sm_90)"
    return LayerSummary(
        name=layer.name,
        op_type=layer.op_type,
        kind=layer.kind.value,
        dtype=layer.stored or layer.dtype,
        shape=(layer.out_features, layer.in_features),
        zeros=layer.zeros,
        block=_block(layer),
        fused=layer.epilogue.activation.value,
        outlook=outlook,
        reason=reason,
    )


def _block(layer: Layer) -> str:
    if layer.zeros < LEAST_ZEROS or not layer.weight.size:
        return ""
    found = find_pattern(layer.weight)
    return str(found.pattern) if found.usable else "none"


def _outlook(layer: Layer, plan: Plan, is_last: bool) -> tuple[str, str]:
    """What could become of a layer, and why."""
    if layer.name in plan.candidates:
        return "zeros", plan.candidates[layer.name].found
    reason = plan.reasons[layer.name]
    if layer.obstacle:
        return "stays dense", reason
    if is_last or layer.weight.size < TINY_WEIGHTS:
        why = "the model's last layer" if is_last else reason
        return "stays dense", f"{why}; --sparsity '{layer.name}=0.8' prunes it"
    return "prune", f"{reason}; --sparsity prunes it"

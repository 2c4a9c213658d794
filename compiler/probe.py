"""What the model is run on: its inputs at each batch size, and how many rows each layer sees of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir

from ..ir import SparsecError, UsageError
from .exporter import session_source
from .machine import Cpu
from .runtime import load_feeds, random_feeds, run_session

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import onnxruntime
    from numpy.typing import NDArray

    from ..ir import Layer, Program
    from .config import CompileConfig
    from .machine import Machine

    Feeds = dict[str, NDArray[Any]]

# Sizes for dynamic dimensions that nobody named, tried in turn: sequences, audio frames, images.
_SIZES = (128, 512, 256, 224, 64, 32, 16, 8)


@dataclass(frozen=True)
class Workload:
    """Inputs and shapes by batch size.

    Attributes:
        feeds: inputs of the whole model by batch size.
        shapes: by batch size and layer, the leading sizes of X as the product sees it: X is [*shape, in].
        inputs: "random, seed 0" or the file that they came from.
        failure: why the model could not be run, or ""; `feeds` is then empty.
    """

    feeds: dict[int, Feeds]
    shapes: dict[int, dict[str, tuple[int, ...]]]
    inputs: str
    failure: str = ""

    @property
    def batches(self) -> tuple[int, ...]:
        """Batch sizes, in the order they were asked for."""
        return tuple(self.feeds)

    def rows(self, layer: str, batch: int) -> int:
        """Rows of X that the layer multiplies."""
        return math.prod(self.shapes[batch][layer])


def probe(program: Program, config: CompileConfig, folder: Path, machine: Machine | None = None) -> Workload:
    """Run the model once at each batch size, and note the shapes that reach its layers.

    Args:
        program: what was read.
        config: batch sizes, dimensions, inputs.
        folder: scratch space.
        machine: where it runs; this machine's processor where none is given.

    Raises:
        UsageError: a batch size was asked for that the model's fixed one is not; inputs do not fit the model.
        SparsecError: ONNX Runtime cannot load the model.
    """
    layers = [layer for layer in program.layers if not layer.obstacle]
    inputs = f"random, seed {config.seed}" if config.inputs is None else str(config.inputs)
    try:
        machine = machine or Cpu(config.thread_count)
        session = machine.open(session_source(_with_shapes(program, layers), folder))
    except SparsecError as error:
        # ONNX Runtime's CPU provider has next to no operator in bfloat16: no fault of the model.
        if any(layer.dtype == "bfloat16" for layer in layers):
            return Workload({}, {}, inputs, failure=str(error))
        raise
    feeds: dict[int, Feeds] = {}
    shapes: dict[int, dict[str, tuple[int, ...]]] = {}
    for batch in _batches(session, config):
        try:
            feeds[batch], results = _first_that_runs(program, session, batch, config)
        except UsageError:
            raise
        except SparsecError as error:
            return Workload({}, {}, inputs, failure=str(error))
        observed = results[len(program.model.graph.outputs) :]
        shapes[batch] = {layer.name: _leading(layer, shape) for layer, shape in zip(layers, observed, strict=True)}
    return Workload(feeds, shapes, inputs)


def _with_shapes(program: Program, layers: list[Layer]) -> onnx_ir.Model:
    """A copy of the model with the shape of each layer's X as one more output."""
    model = program.model.clone()
    copies = dict(zip(program.model.graph, model.graph, strict=True))
    for number, layer in enumerate(layers):
        first = copies[layer.nodes[0]]
        x = first.inputs[list(layer.nodes[0].inputs).index(layer.x)]
        node = onnx_ir.node("Shape", [x])
        node.outputs[0].name = f"sparsec.shape.{number}"
        node.outputs[0].type = onnx_ir.TensorType(onnx_ir.DataType.INT64)
        node.outputs[0].shape = onnx_ir.Shape([None])
        model.graph.insert_before(first, node)
        model.graph.outputs.append(node.outputs[0])
    return model


def _leading(layer: Layer, shape: NDArray[np.int64]) -> tuple[int, ...]:
    sizes = tuple(int(size) for size in shape)
    return (*sizes[:-2], sizes[-1]) if layer.transpose_x else sizes[:-1]


def _batches(session: onnxruntime.InferenceSession, config: CompileConfig) -> tuple[int, ...]:
    """The batch sizes asked for, checked; else the model's own, or 1."""
    first = [value.shape[0] for value in session.get_inputs() if value.shape]
    dynamic = any(not isinstance(size, int) for size in first)
    if config.batch and not dynamic and any(batch not in first for batch in config.batch):
        wanted = ", ".join(map(str, config.batch))
        raise UsageError(
            f"--batch {wanted}: the model's first dimension is fixed ({first[0] if first else 'no inputs'}). "
            "Export it with a dynamic batch, or leave --batch out."
        )
    if config.batch:
        return tuple(dict.fromkeys(config.batch))
    if config.inputs is not None:
        sizes = [array.shape[0] for array in load_feeds(config.inputs).values() if array.ndim]
        return (int(sizes[0]),) if sizes else (1,)
    return (1,) if dynamic or not first else (int(first[0]),)


def _first_that_runs(
    program: Program, session: onnxruntime.InferenceSession, batch: int, config: CompileConfig
) -> tuple[Feeds, list[Any]]:
    """Inputs on which the model runs, and its outputs."""
    if config.inputs is not None:
        given = load_feeds(config.inputs)
        _check_names(session, given)
        feeds = {name: _resize(array, batch, session, name) for name, array in given.items()}
        return feeds, run_session(session, feeds)
    limits = _table_rows(program)
    failure: SparsecError | None = None
    for size in _SIZES:
        feeds = random_feeds(session, batch, config.dims, config.seed, limits, size)
        try:
            return feeds, run_session(session, feeds)
        except SparsecError as error:
            failure = failure or error
            if all(isinstance(d, int) or d in config.dims for v in session.get_inputs() for d in v.shape[1:]):
                break  # no other size to try
    assert failure is not None
    raise SparsecError(
        f"{failure}. Give the sizes of its dynamic dimensions (--dim NAME=SIZE) "
        "or inputs on which it runs (--inputs FILE.npz)."
    )


def _check_names(session: onnxruntime.InferenceSession, given: Mapping[str, Any]) -> None:
    expected = {value.name for value in session.get_inputs()}
    if set(given) != expected:
        raise UsageError(f"inputs: the file has {sorted(given)}, the model expects {sorted(expected)}")


def _resize(array: NDArray[Any], batch: int, session: onnxruntime.InferenceSession, name: str) -> NDArray[Any]:
    """Repeat or cut along the first dimension to `batch`, where the model lets it change."""
    shape = next(value.shape for value in session.get_inputs() if value.name == name)
    if not shape or isinstance(shape[0], int) or array.shape[0] == batch:
        return array
    return np.resize(array, (batch, *array.shape[1:]))


def _table_rows(program: Program) -> dict[str, int]:
    """For inputs that index a constant table: its rows."""
    limits: dict[str, int] = {}
    for value in program.model.graph.inputs:
        for node, index in value.uses():
            table = node.inputs[0] if node.op_type == "Gather" and index == 1 else None
            if table is not None and table.const_value is not None and value.name is not None:
                limits[value.name] = min(int(table.const_value.shape.numpy()[0]), limits.get(value.name, 2**31))
    return limits

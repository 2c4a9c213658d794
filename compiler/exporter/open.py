"""The model with layers laid open: their weights as inputs, what flows into them as outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir

from ..frontend.constants import Constants
from ..frontend.weights import from_matrix, weight_index
from .rewrite import bias_place, bias_shape, data_type

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ...ir import Layer, Program


@dataclass(frozen=True)
class Slot:
    """An input that takes a layer's weight or bias.

    Attributes:
        name: of the input.
        shape, dtype: of the array that the layer's node wants.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class OpenModel:
    """A model whose layers can be fed and watched.

    Attributes:
        model: the weights of the layers are inputs, each layer's X is one more output.
        weights, biases: by layer name; a layer whose bias stands where it cannot be set has none.
        nodes: by layer name, the first of its nodes, which reads X.
        x: by layer name, the name of X, if it is watched of an output that equals it; layers may share it.
    """

    model: onnx_ir.Model
    weights: dict[str, Slot]
    biases: dict[str, Slot]
    nodes: dict[str, onnx_ir.Node]
    x: dict[str, str]

    def feeds(self, layer: Layer, weight: NDArray[np.float32], bias: NDArray[np.float32] | None) -> dict[str, Any]:
        """What to feed for `weight` [out, in] and `bias` [out]; None leaves the layer's own."""
        slot = self.weights[layer.name]
        array = from_matrix(layer.nodes[0], weight_index(layer), weight, slot.shape, slot.dtype)
        feeds = {slot.name: array}
        if layer.name in self.biases:
            slot = self.biases[layer.name]
            own = np.zeros(layer.out_features, np.float32) if layer.bias is None else layer.bias
            chosen = own if bias is None else bias
            feeds[slot.name] = np.ascontiguousarray(chosen.reshape(slot.shape), dtype=slot.dtype)
        return feeds


def open_model(program: Program, layers: Sequence[Layer], watched: bool) -> OpenModel:
    """Lay open `layers`; with `watched`, their inputs too."""
    model = program.model.clone()
    copies = dict(zip(program.model.graph, model.graph, strict=True))
    constants = Constants(program.model)
    opened = OpenModel(model, {}, {}, {}, {})
    taps: dict[onnx_ir.Value, str] = {}
    for number, layer in enumerate(layers):
        node = opened.nodes[layer.name] = copies[layer.nodes[0]]
        if layer.x not in taps:
            x = node.inputs[list(layer.nodes[0].inputs).index(layer.x)]
            assert x is not None and x.name is not None
            taps[layer.x] = _tap(model, x, node, f"sparsec.x.{number}", data_type(layer)) if watched else x.name
        opened.x[layer.name] = taps[layer.x]
        index = weight_index(layer)
        raw = constants.array(layer.nodes[0].inputs[index])
        assert raw is not None, "the layer was found by reading it"
        slot = Slot(f"sparsec.weight.{number}", raw.shape, raw.dtype)
        _feed(model, node, index, slot)
        opened.weights[layer.name] = slot
        place = bias_place(layer)
        if place is not None:
            adder, index = place
            slot = Slot(f"sparsec.bias.{number}", bias_shape(layer), raw.dtype)
            _feed(model, copies[adder], index, slot)
            opened.biases[layer.name] = slot
    return opened


def _tap(model: onnx_ir.Model, x: onnx_ir.Value, user: onnx_ir.Node, name: str, dtype: onnx_ir.DataType) -> str:
    """One more output that is `x`, through an Identity: `x` may be an input or an output of the model already.

    Where the model does not say what `x` is, it has the type `dtype`, as what it is multiplied by.
    """
    node = onnx_ir.node("Identity", [x])
    node.outputs[0].name = name
    node.outputs[0].type = x.type or onnx_ir.TensorType(dtype)
    model.graph.insert_before(user, node)
    model.graph.outputs.append(node.outputs[0])
    return name


def _feed(model: onnx_ir.Model, node: onnx_ir.Node, index: int, slot: Slot) -> None:
    """A new graph input in the place of input `index`, which may not be there yet."""
    kind = onnx_ir.TensorType(onnx_ir.DataType.from_numpy(slot.dtype))
    value = onnx_ir.Value(name=slot.name, type=kind, shape=onnx_ir.Shape(slot.shape))
    model.graph.inputs.append(value)
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    old = node.inputs[index]
    node.replace_input_with(index, value)
    if old is not None and old.is_initializer() and not old.uses() and not old.is_graph_input():
        assert old.name is not None
        if not old.is_graph_output():
            model.graph.initializers.pop(old.name)

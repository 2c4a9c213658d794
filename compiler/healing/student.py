"""The pruned model as something to train, and the dense one that it learns from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir
import torch

from ...ir import SparsecError
from ..calibration import Weights
from ..exporter import open_model
from ..frontend.constants import overridable
from ..frontend.weights import to_matrix, weight_index
from .healed import Healed
from .network import Network

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...ir import Program
    from .batches import Tensors

# Which inputs of which operators are a number a channel that is trained with the weights.
_VECTORS = {
    "Add": (0, 1),
    "BatchNormalization": (1, 2),
    "Conv": (2,),
    "ConvTranspose": (2,),
    "Gemm": (2,),
    "GroupNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "LayerNormalization": (1, 2),
    "Mul": (0, 1),
    "RMSNormalization": (1,),
    "Sub": (0, 1),
}
_FLOATS = (onnx_ir.DataType.FLOAT, onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16)
_DOUBLE = onnx_ir.DataType.DOUBLE


class Student:
    """A model with the weights of some layers, all biases and norm parameters to be trained.

    Attributes:
        network: computes it; what is trained are its inputs.
        teacher: the dense model's own values of what is trained, by name.
        parameters: the student's, by name; leaves of the gradient, on the device that computes.
        masks: of the weights, by name: where they may be other than zero.
        hidden: names of what the pruned layers make.
        outputs: names of the model's outputs of floats.
    """

    def __init__(self, program: Program, weights: Mapping[str, Weights], device: str = "cpu") -> None:
        """Begin with `weights`, by layer name; where a matrix is zero it stays zero.

        Raises:
            SparsecError: an operator has no mapping, or no output is of floats.
        """
        self._weights, self._device = dict(weights), device
        self._layers = [layer for layer in program.layers if layer.name in weights]
        self._open = open_model(program, self._layers, watched=False)
        vectors = _vectors(self._open.model)
        self.network = Network(self._open.model, vectors, device=device)
        self.teacher: Tensors = {}
        self.parameters: Tensors = {}
        self.masks: Tensors = {}
        for layer in self._layers:
            new = weights[layer.name]
            slot = self._open.weights[layer.name].name
            self.teacher |= self._tensors(self._open.feeds(layer, layer.weight, None))
            self.parameters |= self._tensors(self._open.feeds(layer, new.matrix, new.bias))
            self.masks[slot] = self.parameters[slot] != 0
        self._own = {name: array.astype(np.float32) for name, array in vectors.items()}
        self.teacher |= self._tensors(self._own)
        self.parameters |= self._tensors(self._own)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        self.hidden = list(dict.fromkeys(layer.nodes[-1].outputs[0].name or "" for layer in self._layers))
        self.outputs = [
            value.name or "" for value in program.model.graph.outputs if value.dtype in (None, _DOUBLE, *_FLOATS)
        ]
        if not self.outputs:
            raise SparsecError("--heal: the model has no output of floats, from which could be learned. Leave it out")

    def in_float64(self) -> Network:
        """The same network, in twice as many digits."""
        return Network(self._open.model, self._own, torch.float64, self._device)

    def healed(self) -> Healed:
        """What the parameters are now."""
        arrays = {name: parameter.detach().cpu().numpy().copy() for name, parameter in self.parameters.items()}
        weights = {}
        for layer in self._layers:
            slot = self._open.weights[layer.name].name
            matrix = to_matrix(layer.nodes[0], weight_index(layer), arrays[slot])
            place = self._open.biases.get(layer.name)
            bias = self._weights[layer.name].bias if place is None else arrays[place.name].reshape(-1)
            weights[layer.name] = Weights(matrix, bias)
        return Healed(weights, {name: arrays[name] for name in self._own})

    def _tensors(self, arrays: Mapping[str, Any]) -> Tensors:
        return {name: torch.tensor(array, dtype=torch.float32, device=self._device) for name, array in arrays.items()}


def _vectors(model: onnx_ir.Model) -> dict[str, Any]:
    """Initialisers with a number a channel that nothing but layers and norms read, by name."""
    found = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.dtype not in _FLOATS or overridable(value, model) or value.is_graph_output():
            continue
        shape = tuple(tensor.shape.numpy())
        users = [
            use.idx in _VECTORS.get(use.node.op_type, ()) and use.node.graph is model.graph for use in value.uses()
        ]
        if users and all(users) and max(shape, default=1) == tensor.size > 1:
            found[name] = tensor.numpy()
    return found

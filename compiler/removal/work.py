"""How much of a model is left when channels go: weights, or products of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir

from ...passes.remove import layer_indices
from ..exporter import session_source
from ..runtime import run_session

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from ...ir import Program
    from ...passes.channels import Channels, Dimension
    from ..machine import Machine

    Kept = Mapping[Dimension, NDArray[np.int64]]


GATES = {"GRU": 3, "LSTM": 4}


@dataclass(frozen=True)
class Work:
    """Weights of layers, each counted as often as it is used.

    Attributes:
        program, channels: whose they are.
        uses: by layer name; layers that no channel can leave are not counted.
    """

    program: Program
    channels: Channels
    uses: Mapping[str, float]

    @property
    def whole(self) -> float:
        """With all channels."""
        return sum(self._sizes().values())

    def left(self, kept: Kept) -> float:
        """With only these."""
        sizes = self._sizes()
        for name, (rows, columns) in layer_indices(self.program, self.channels, kept).items():
            sizes[name] = self.uses.get(name, 0.0) * len(rows) * len(columns)
        return sum(sizes.values())

    def gone(self, kept: Kept) -> float:
        """The share that goes."""
        return 1 - self.left(kept) / self.whole

    def _sizes(self) -> dict[str, float]:
        return {layer.name: self.uses.get(layer.name, 0.0) * layer.weight.size for layer in self.program.layers}


def uses(
    program: Program, feeds: Mapping[str, NDArray[np.generic]], machine: Machine, folder: Path
) -> dict[str, float]:
    """How often each weight of a layer is multiplied in a run: rows of a product, places of a convolution."""
    model = program.model.clone()
    copies = dict(zip(program.model.graph, model.graph, strict=True))
    names = []
    for number, layer in enumerate(program.layers):
        node = onnx_ir.node("Size", [copies[layer.nodes[0]].outputs[0]])
        node.outputs[0].name = f"sparsec.size.{number}"
        node.outputs[0].type = onnx_ir.TensorType(onnx_ir.DataType.INT64)
        node.outputs[0].shape = onnx_ir.Shape([])
        model.graph.append(node)
        model.graph.outputs.append(node.outputs[0])
        names.append(node.outputs[0].name)
    sizes = run_session(machine.open(session_source(model, folder)), dict(feeds), names)
    # A recurrent layer's weight has several rows for each output.
    return {
        layer.name: float(size) * GATES.get(layer.op_type, 1) / max(layer.out_features, 1)
        for layer, size in zip(program.layers, sizes, strict=True)
    }

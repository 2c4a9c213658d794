"""The second moments of layers' inputs, in one streaming pass through ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...ir import SparsecError
from ...passes.solve import Statistics
from ..exporter import session_source
from ..runtime import run_session

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import onnx_ir
    from numpy.typing import NDArray

    from ...ir import Layer, Program
    from ..machine import Machine
    from .samples import Samples


@dataclass(frozen=True)
class Calibration:
    """What the samples say about the layers.

    Attributes:
        statistics: by layer name; layers with the same input share one.
        rows: by layer name, the rows of X that were seen.
        samples: how many there were.
        source: where they came from.
    """

    statistics: dict[str, Statistics]
    rows: dict[str, int]
    samples: int
    source: str

    @property
    def scarce(self) -> dict[str, tuple[int, int]]:
        """Rows seen and inputs of the layers that saw fewer rows than they have inputs: damping makes up for it."""
        sizes = {name: (self.rows[name], len(found.dead)) for name, found in self.statistics.items()}
        return {name: (rows, inputs) for name, (rows, inputs) in sizes.items() if rows < inputs}


def gather(program: Program, layers: Sequence[Layer], samples: Samples, machine: Machine, folder: Path) -> Calibration:
    """Run the model on all samples and sum Xᵀ X over the inputs X [rows, in] of each layer, in float64.

    Memory: one [in, in] an input, and the activations of one run.

    Raises:
        SparsecError: the model cannot be run on the samples, or an activation is NaN or infinite.
    """
    sources = dict.fromkeys((layer.x, layer.transpose_x) for layer in layers)
    session = machine.open(session_source(_with_inputs(program, layers), folder))
    plain = len(program.model.graph.outputs)
    names = [output.name for output in session.get_outputs()]
    moments: dict[tuple[onnx_ir.Value, bool], NDArray[np.float64]] = {}
    seen = dict.fromkeys(sources, 0)
    values = list(dict.fromkeys(layer.x for layer in layers))
    by_name = dict(zip(values, names[plain:], strict=True))
    for feeds in samples.runs:
        results = dict(zip(names, run_session(session, feeds), strict=True))
        for source in sources:
            value, transposed = source
            x = _rows(results[by_name[value]], transposed)
            if not np.isfinite(x).all():
                owner = next(layer.name for layer in layers if (layer.x, layer.transpose_x) == source)
                raise SparsecError(
                    f"calibration data '{samples.name}': the input of layer '{owner}' has NaN or infinite values; "
                    "check the data with the dense model"
                )
            moment = x.T @ x
            moments[source] = moments[source] + moment if source in moments else moment
            seen[source] += len(x)
    statistics = {source: Statistics.of(moment / max(seen[source], 1)) for source, moment in moments.items()}
    return Calibration(
        statistics={layer.name: statistics[layer.x, layer.transpose_x] for layer in layers},
        rows={layer.name: seen[layer.x, layer.transpose_x] for layer in layers},
        samples=samples.count,
        source=samples.name,
    )


def _with_inputs(program: Program, layers: Sequence[Layer]) -> onnx_ir.Model:
    """A copy of the model with each layer's X as one more output; an X that several share once."""
    import onnx_ir

    model = program.model.clone()
    copies = dict(zip(program.model.graph, model.graph, strict=True))
    values: dict[onnx_ir.Value, onnx_ir.Value] = {}
    for number, layer in enumerate(layers):
        if layer.x in values:
            continue
        user = copies[layer.nodes[0]]
        x = user.inputs[list(layer.nodes[0].inputs).index(layer.x)]
        assert x is not None
        # Through an Identity: X may be an input or an output of the model already.
        node = onnx_ir.node("Identity", [x])
        node.outputs[0].name = f"sparsec.x.{number}"
        node.outputs[0].type = x.type or onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
        model.graph.insert_before(user, node)
        model.graph.outputs.append(node.outputs[0])
        values[layer.x] = node.outputs[0]
    return model


def _rows(x: NDArray[np.float32], transposed: bool) -> NDArray[np.float64]:
    """[..., in], or [..., in, rows] where transposed, as float64 [rows, in]."""
    wide = x.astype(np.float64)
    if transposed:
        wide = np.swapaxes(wide, -1, -2)
    return wide.reshape(-1, wide.shape[-1])

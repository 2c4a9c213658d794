"""What healing changes in a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir

from ...ir import Program
from ..frontend import find_layers

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from ..calibration import Weights


@dataclass(frozen=True, eq=False)
class Healed:
    """Trained weights.

    Attributes:
        weights: of the pruned layers, by name.
        vectors: of other layers and norms, biases and scales by the name of their initialiser: float32, in the shapes
            that they have in the graph.
    """

    weights: dict[str, Weights]
    vectors: dict[str, NDArray[np.float32]]


def with_vectors(program: Program, vectors: Mapping[str, NDArray[np.float32]]) -> Program:
    """The program with other values of these initialisers; nothing else changes."""
    if not vectors:
        return program
    model = program.model.clone()
    for name, array in vectors.items():
        value = model.graph.initializers[name]
        old = value.const_value
        assert old is not None, "it was read"
        value.const_value = onnx_ir.Tensor(
            array.astype(old.dtype.numpy()),
            dtype=old.dtype,
            name=name,
            doc_string=old.doc_string,
            metadata_props=dict(old.metadata_props) or None,
        )
    return Program(model, find_layers(model), program.source)

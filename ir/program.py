"""A model and the layers found in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir

    from .layer import Layer


@dataclass(frozen=True, eq=False)
class Program:
    """The model, which is the only mutable thing, and what sparsec understands of it.

    Attributes:
        model: the graph as it came. What no layer covers leaves as it came.
        layers: in the order of the graph.
        source: the file it was read from; None for a model given as bytes or a `ModelProto`.
    """

    model: onnx_ir.Model
    layers: tuple[Layer, ...]
    source: Path | None = None

    @property
    def nbytes(self) -> int:
        """Of the model's tensors, which is nearly its size as a file."""
        tensors = (value.const_value for graph in self.model.graphs() for value in graph.initializers.values())
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

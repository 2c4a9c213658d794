"""ONNX in: a file, bytes or a `ModelProto` becomes a `Program`, the model and the layers found in it."""

from __future__ import annotations

from ...ir import Program
from .find import find_layers
from .load import Source, load, naming

__all__ = ["Source", "find_layers", "load", "read"]


def read(source: Source) -> Program:
    """Load `source` and find its layers.

    Raises:
        SparsecError: it is no model that can be compiled; one paragraph says what, where and what to do.
    """
    model, path = load(source)
    with naming(source):
        return Program(model, find_layers(model), path)

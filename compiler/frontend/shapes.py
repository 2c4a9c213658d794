"""Shapes that the file states or ONNX's shape inference finds; the model itself is not touched."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import onnx_ir
from onnx_ir.passes.common import ShapeInferencePass

if TYPE_CHECKING:
    from collections.abc import Mapping


class Shapes:
    """Shapes of the values of a model's main graph; inference runs once, when a shape is first missing."""

    def __init__(self, model: onnx_ir.Model) -> None:
        self._model = model

    def of(self, value: onnx_ir.Value) -> onnx_ir.Shape | None:
        """The shape of `value`, some dimensions perhaps symbolic, or None where its rank is unknown."""
        if value.shape is not None:
            return value.shape
        if value.const_value is not None and value.is_initializer():
            return onnx_ir.Shape(value.const_value.shape.numpy())
        return self._inferred.get(value.name or "")

    def rank(self, value: onnx_ir.Value) -> int | None:
        """How many axes `value` has, or None."""
        shape = self.of(value)
        return None if shape is None else len(shape)

    @cached_property
    def _inferred(self) -> Mapping[str, onnx_ir.Shape]:
        # Nothing inferred may leave with the exported model, so inference works on a copy (the tensors are shared).
        copy = self._model.clone()
        ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(copy)
        return {
            value.name: value.shape
            for node in copy.graph
            for value in node.outputs
            if value.name and value.shape is not None
        }

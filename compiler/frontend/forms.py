"""Operators that multiply integers, and where each has its scales and zero points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...ir import LayerKind


@dataclass(frozen=True, slots=True)
class Form:
    """Where an operator has what: numbers of inputs, None for what it leaves to others.

    Attributes:
        kind: what it computes.
        weight, scale, zero_point: of the weight.
        x_scale, x_zero_point: of the codes X.
        bias: what is added: floats, or int32 in steps of both scales where Y may be codes.
        y_scale: of Y; its zero point is the next input.
    """

    kind: LayerKind
    weight: int
    scale: int | None
    zero_point: int
    x_scale: int | None = None
    x_zero_point: int | None = None
    bias: int | None = None
    y_scale: int | None = None


FORMS: Mapping[tuple[str, str], Form] = {
    ("", "ConvInteger"): Form(LayerKind.CONV, 1, None, 3),
    ("", "MatMulInteger"): Form(LayerKind.LINEAR, 1, None, 3, x_zero_point=2),
    ("", "QLinearConv"): Form(LayerKind.CONV, 3, 4, 5),
    ("", "QLinearMatMul"): Form(LayerKind.LINEAR, 3, 4, 5, x_scale=1, x_zero_point=2, y_scale=6),
    ("com.microsoft", "DynamicQuantizeMatMul"): Form(LayerKind.LINEAR, 1, 2, 3, bias=4),
    ("com.microsoft", "MatMulIntegerToFloat"): Form(LayerKind.LINEAR, 1, 3, 5, x_scale=2, x_zero_point=4, bias=6),
    ("com.microsoft", "QGemm"): Form(LayerKind.LINEAR, 3, 4, 5, x_scale=1, x_zero_point=2, bias=6, y_scale=7),
}

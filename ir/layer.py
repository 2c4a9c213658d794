"""One operator with a constant weight, as found in a graph."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

from .epilogue import Epilogue
from .values.floats import DTYPES

if TYPE_CHECKING:
    import onnx_ir
    from numpy.typing import NDArray

    from .grid import Grid
    from .values import Values


class LayerKind(str, Enum):
    """What the layer computes; the words appear in reports."""

    LINEAR = "linear"
    CONV = "conv"
    RECURRENT = "recurrent"


@dataclass(frozen=True, eq=False)
class Layer:
    """A constant weight and the nodes around it that one sparse operator can stand for.

    Attributes:
        name: the node's name, or its output's where nodes have no names; unique in the program.
        kind: linear, conv or recurrent.
        op_type: the ONNX operator that holds the weight.
        weight: [out, in] float32, which holds 16-bit weights exactly; a convolution's is [out, in/groups * kh * kw], a
            recurrent one's its input weight. For a linear layer all of transA, transB, alpha and the weight's own side
            are already applied.
        bias: [out] float32, or None; it can be stored as `dtype` without rounding, as the weight can.
        epilogue: what the covered nodes do after the product.
        nodes: the nodes that the operator replaces, first the one with the weight; the last one's output is the
            layer's output.
        x: the activation that flows in, as it is in the graph.
        residual: the value added last, or None.
        transpose_x: the operator works on X with its last two axes swapped (Gemm's transA, `MatMul(W, X)`).
        transpose_y: its output is swapped back (`MatMul(W, X)`).
        rank: the number of axes of X, where shape inference knows it.
        dtype: of the weight in the graph, and so of X, Y, bias and residual: "float32", "float16" or "bfloat16". Any
            other is an obstacle.
        obstacle: why no sparse operator can take the layer's place whatever the speed ("a convolution; no sparse
            operator yet"), or "" where one can.
        stored: ONNX's name of the codes that the weight is dequantised from, such as "int8"; "" for numbers.
        values, table: of such a weight, where `values` holds it exactly; `table` as `values` has it.
        x_grid: that X lies on, where it is dequantised from 8-bit codes; signed ones are the same numbers, shifted.
        x_codes: these codes, where they are uint8, or signed and nothing but DequantizeLinear reads them, so that they
            can be.
        y_grid: that Y is rounded to, where a QuantizeLinear to 8 bits alone reads it.
        y_codes: what that node makes, on the same condition: the layer covers the node, and this is its output.
        fixed: whether the operator multiplies integers itself (QLinearMatMul), so that no weight can be fitted to what
            flows in; X and `x` then are codes.
        dynamic: whether X is rounded by a scale that is found when the model runs (DynamicQuantizeLinear).
        product: of such a layer what its operator of integers makes, in floats: before what was fused to it.
    """

    name: str
    kind: LayerKind
    op_type: str
    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None
    epilogue: Epilogue
    nodes: tuple[onnx_ir.Node, ...]
    x: onnx_ir.Value
    residual: onnx_ir.Value | None = None
    transpose_x: bool = False
    transpose_y: bool = False
    rank: int | None = None
    dtype: str = "float32"
    obstacle: str = ""
    stored: str = ""
    values: Values | None = None
    table: NDArray[np.float32] | None = None
    x_grid: Grid | None = None
    x_codes: onnx_ir.Value | None = None
    y_grid: Grid | None = None
    y_codes: onnx_ir.Value | None = None
    fixed: bool = False
    dynamic: bool = False
    product: onnx_ir.Value | None = None

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return int(self.weight.shape[0])

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return int(self.weight.shape[1])

    @property
    def rewritable(self) -> bool:
        """Whether new weights can take the place of the graph's: those that `weight` only rounds stay as they are."""
        return self.dtype in DTYPES

    @property
    def nbytes(self) -> int:
        """Bytes of the weight in the graph, without what codes share."""
        if not self.stored:
            return self.weight.size * np.dtype(self.dtype).itemsize
        # The first number in the name of a type is that of its bits.
        bits = re.search(r"\d+", self.stored)
        return -(-self.weight.size * int(bits[0] if bits else 8) // 8)

    @property
    def coded(self) -> str:
        """Which of its tensors are codes, for keys: ONNX Runtime then has other operators for the same nodes."""
        sides = (("x", self.x_grid, self.x_codes), ("y", self.y_grid, self.y_codes))
        kinds = [
            f" {side} {'signed' if codes is None else 'unsigned'}" for side, grid, codes in sides if grid is not None
        ]
        return "".join([f" weight {self.stored}", *kinds]) if self.stored else ""

    @property
    def zeros(self) -> float:
        """Share of the weight that is zero."""
        return float((self.weight == 0).sum()) / max(self.weight.size, 1)

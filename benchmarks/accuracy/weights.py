"""The weights that an accuracy table counts: every constant matrix or filter of a Conv, Gemm or MatMul.

First and last layers are counted, biases and embedding tables (Gather) are not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

LAYERS = ("Conv", "Gemm", "MatMul")


def weights(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    """Initialisers that are the second input of a layer, by name; at least two dimensions."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer if len(tensor.dims) >= 2}
    names = [node.input[1] for node in model.graph.node if node.op_type in LAYERS]
    return {name: onnx.numpy_helper.to_array(constants[name]) for name in names if name in constants}


def sparsity(model: onnx.ModelProto) -> float:
    """The share of zeros in all of them, 0 to 1."""
    arrays = weights(model).values()
    return 1 - sum(int(np.count_nonzero(array)) for array in arrays) / sum(array.size for array in arrays)

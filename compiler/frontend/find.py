"""Find the layers of a model: operators with a constant weight, and the nodes that can be fused into them.

Only the main graph is searched. Subgraphs (If, Loop, Scan) and model-local functions stay as they are; a value that
they read is in use, so no layer covers it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ...ir import Epilogue, Layer, LayerKind, SparsecError
from ...ir.values.floats import DTYPES
from .constants import Constants, overridable
from .forms import FORMS
from .fuse import Context, as_bias, fuse
from .integers import find_integer
from .nodes import attribute, operand, read_tensor
from .quantized import check_zero_points, with_input_coding, with_weight_coding
from .shapes import Shapes
from .versions import OLDEST_BFLOAT16_OPSET, OLDEST_OPSET
from .weights import alpha, is_exact, to_matrix

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import onnx_ir
    from numpy.typing import NDArray


def find_layers(model: onnx_ir.Model) -> tuple[Layer, ...]:
    """The layers of `model` in the order of its graph; no node belongs to two.

    Raises:
        SparsecError: a weight cannot be read, or holds NaN or infinity.
    """
    context = Context(model, Constants(model), Shapes(model))
    layers: list[Layer] = []
    names: set[str] = set()
    opset = model.opset_imports.get("", OLDEST_OPSET)
    for node in model.graph:
        finder = FINDERS.get((node.domain, node.op_type))
        if finder is None or node.op_identifier() in model.functions:
            continue
        layer = finder(node, context)
        if layer is None:
            continue
        oldest = OLDEST_BFLOAT16_OPSET if layer.dtype == "bfloat16" else OLDEST_OPSET
        if not layer.obstacle and opset < oldest:
            layer = replace(layer, obstacle=f"opset {opset}; sparse operators from opset {oldest} on")
        if not layer.stored:
            layer = with_input_coding(with_weight_coding(layer, context.constants), context.constants)
        layer = layer if layer.obstacle else fuse(layer, context)
        layers.append(replace(layer, name=_unique(layer.name, names)))
    return tuple(layers)


def _find_matmul(node: onnx_ir.Node, context: Context) -> Layer | None:
    """`MatMul(X, W)`, and `MatMul(W, X)` as the transpose of `X.T W.T`."""
    index = _constant_side(node, context)
    if index is None:
        return None
    layer = _layer(node, index, LayerKind.LINEAR, context)
    if layer is None or layer.obstacle:
        return layer
    rank = context.shapes.rank(layer.x)
    if index == 0 and (rank is None or rank < 2):
        words = "its input is a vector" if rank else "the rank of its input is unknown"
        return replace(layer, obstacle=f"the weight stands on the left and {words}; no sparse operator yet")
    return replace(layer, rank=rank, transpose_x=index == 0, transpose_y=index == 0)


def _find_gemm(node: onnx_ir.Node, context: Context) -> Layer | None:
    """`alpha * A' B' + beta * C` with A or B constant; C becomes the bias or the residual."""
    index = _constant_side(node, context)
    if index is None:
        return None
    layer = _layer(node, index, LayerKind.LINEAR, context)
    if layer is None or layer.obstacle:
        return layer
    if alpha(node) == 0 or not np.isfinite(alpha(node)):
        return replace(layer, obstacle=f"alpha is {alpha(node)}, so nothing can be folded into the weight")
    if alpha(node) != 1 and not is_exact(layer.weight, layer.dtype):
        return replace(layer, obstacle=_rounds("alpha", alpha(node), layer))
    # The operator reads X as [rows, in]: A as it is, B transposed.
    turned = bool(attribute(node, ("transA", "transB")[1 - index], 0))
    layer = replace(layer, rank=2, transpose_x=turned == (index == 1), transpose_y=index == 0)
    return _with_c(layer, node, context)


def _with_c(layer: Layer, node: onnx_ir.Node, context: Context) -> Layer:
    """Gemm's C: as the bias where it is constant and the same for every row, else as the residual."""
    c, beta = operand(node, 2), attribute(node, "beta", 1.0)
    if c is None or beta == 0:
        return layer
    constant = context.constants.array(c)
    if constant is not None and constant.ndim <= 2:
        bias = as_bias(constant, layer.out_features, axis=-2 if layer.transpose_y else -1)
        if bias is not None:
            scaled = bias if beta == 1 else np.asarray(bias * np.float32(beta))
            if beta != 1 and not is_exact(scaled, layer.dtype):
                return replace(layer, obstacle=_rounds("beta", beta, layer))
            return replace(layer, bias=scaled, epilogue=Epilogue(bias=True))
    if layer.transpose_y:
        return replace(
            layer, obstacle="the weight stands on the left and C varies along the rows; no sparse operator yet"
        )
    if not is_exact(np.array(beta, dtype=np.float32), layer.dtype):
        return replace(layer, obstacle=_rounds("beta", beta, layer))
    return replace(layer, residual=c, epilogue=Epilogue(residual=True))


def _rounds(name: str, factor: float, layer: Layer) -> str:
    return f"{name} is {factor:g}, which {layer.dtype} cannot take in without rounding"


def _find_conv(node: onnx_ir.Node, context: Context) -> Layer | None:
    return _standing(node, LayerKind.CONV, "a convolution; no sparse operator yet", context)


def _find_recurrent(node: onnx_ir.Node, context: Context) -> Layer | None:
    return _standing(node, LayerKind.RECURRENT, "a recurrent layer; no sparse operator yet", context)


def _find_integer(node: onnx_ir.Node, context: Context) -> Layer | None:
    return find_integer(node, context)


FINDERS: Mapping[tuple[str, str], Callable[[onnx_ir.Node, Context], Layer | None]] = {
    ("", "Conv"): _find_conv,
    ("", "ConvTranspose"): _find_conv,
    ("", "GRU"): _find_recurrent,
    ("", "Gemm"): _find_gemm,
    ("", "LSTM"): _find_recurrent,
    ("", "MatMul"): _find_matmul,
    ("", "RNN"): _find_recurrent,
    **dict.fromkeys(FORMS, _find_integer),
}


def _standing(node: onnx_ir.Node, kind: LayerKind, words: str, context: Context) -> Layer | None:
    """A layer that is reported and stays as it is."""
    if not _weight(operand(node, 1), context):
        return None
    layer = _layer(node, 1, kind, context)
    return None if layer is None else replace(layer, obstacle=layer.obstacle or words)


def _layer(node: onnx_ir.Node, index: int, kind: LayerKind, context: Context) -> Layer | None:
    """The layer of `node` alone, with its weight checked; None where the weight is no matrix at all."""
    value, x = node.inputs[index], operand(node, 1 - index if kind is LayerKind.LINEAR else 0)
    assert value is not None
    array = context.constants.array(value)
    if array is None and value.const_value is not None:
        array = read_tensor(value.const_value, value.name)
    if array is None:
        check_zero_points(value, context.constants)
    least = {LayerKind.LINEAR: 2, LayerKind.CONV: 3, LayerKind.RECURRENT: 3}[kind]
    if array is None or x is None or array.ndim < least or not _is_numeric(array) or not node.outputs:
        return None
    name = node.name or node.outputs[0].name or node.op_type
    _check_finite(array, name, value)
    bias = None
    if kind is LayerKind.CONV:
        bias = context.constants.array(operand(node, 2))
        bias = None if bias is None else np.asarray(bias, dtype=np.float32)
    return Layer(
        name=name,
        kind=kind,
        op_type=node.op_type,
        weight=to_matrix(node, index, array),
        bias=bias,
        epilogue=Epilogue(bias=bias is not None),
        nodes=(node,),
        x=x,
        dtype=array.dtype.name,
        obstacle=_obstacle(array, value, kind, context),
    )


def _obstacle(array: NDArray[Any], value: onnx_ir.Value, kind: LayerKind, context: Context) -> str:
    """What keeps any layer from having a sparse operator, in words; "" for nothing."""
    if overridable(value, context.model):
        return f"its weight '{value.name}' is also an input of the model, so a caller may replace it"
    if array.dtype.name not in DTYPES:
        return f"{array.dtype} weights; no sparse operator yet"
    if array.size == 0:
        return "its weight is empty"
    if kind is LayerKind.LINEAR and array.ndim > 2:
        return f"a stack of {int(np.prod(array.shape[:-2]))} weights; no sparse operator yet"
    return ""


def _is_numeric(array: NDArray[Any]) -> bool:
    return array.dtype.kind in "fiuV"


def _check_finite(array: NDArray[Any], name: str, value: onnx_ir.Value) -> None:
    """Refuse NaN and infinity; by the extremes first, which needs no memory."""
    # bfloat16 and its like come from ml_dtypes, whose kind is "V" as that of small integers is.
    floating = array.dtype.kind == "f" or "float" in array.dtype.name
    if not floating or array.size == 0 or (np.isfinite(array.min()) and np.isfinite(array.max())):
        return
    places = np.argwhere(~np.isfinite(array))
    raise SparsecError(
        f"layer '{name}': its weight, initialiser '{value.name}', holds {array[tuple(places[0])]} at "
        f"{places[0].tolist()} ({len(places):,} such in all). A model with such weights computes nothing of use; check "
        "the training run or the export."
    )


def _constant_side(node: onnx_ir.Node, context: Context) -> int | None:
    """Which of a product's two inputs is the weight; None where neither is, or both (which ONNX Runtime folds)."""
    if len(node.inputs) < 2 or None in node.inputs[:2] or len(node.outputs) != 1:
        return None
    sides = [index for index in (1, 0) if _weight(node.inputs[index], context)]
    fixed = [index for index in sides if context.constants.known(node.inputs[index])]
    if len(fixed) == 2:
        return None
    return next(iter(fixed or sides), None)


def _weight(value: onnx_ir.Value | None, context: Context) -> bool:
    return value is not None and (context.constants.known(value) or overridable(value, context.model))


def _unique(name: str, names: set[str]) -> str:
    """`name`, or with the first free number behind it; noted as used."""
    unique, number = name, 1
    while unique in names:
        number += 1
        unique = f"{name}_{number}"
    names.add(unique)
    return unique

"""What follows of the channels that an operator makes from those that it reads: `PROOFS`, one rule an operator.

A rule gives the numbers of one segment along one axis of one output, NaN where it proves none. Elements that are not
known are taken to be finite: zero times one of them is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, reduce
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ..channels.constants import small_constant
from ..channels.recurrent import C0, H0, B

if TYPE_CHECKING:
    import onnx_ir

    from ..channels.axes import Segment
    from .known import Along, Known, Numbers

    Proof: TypeAlias = Callable[[Known, onnx_ir.Node, Along, Segment], Numbers | float]


def contractions(known: Known, node: onnx_ir.Node) -> list[tuple[Along, Along]]:
    """The axes over which a node sums products, of both factors."""
    x, weight, *_ = (*node.inputs, None, None)
    if x is None or weight is None or node.domain != "":
        return []
    rank = known.rank(weight)
    if node.op_type == "MatMul":
        return [((x, -1), (weight, -2))]
    if node.op_type == "Gemm":
        return [((x, -2 if _number(node, "transA", 0) else -1), (weight, -1 if _number(node, "transB", 0) else -2))]
    if node.op_type in ("Conv", "ConvTranspose") and _number(node, "group", 1) == 1:
        return [((x, 1 - rank), (weight, 1 - rank if node.op_type == "Conv" else -rank))]
    if node.op_type in _ACTIVATIONS and node.inputs[2] is not None:
        return [((x, -1), (weight, -1)), ((node.outputs[0], -1), (node.inputs[2], -1))]
    return []


def _moved(known: Known, node: onnx_ir.Node, along: Along, segment: Segment) -> Numbers | float:
    """Every element is one of the same channel."""
    x = node.inputs[0]
    source = None if x is None else known.home(x, segment)
    return np.nan if source is None or known.home(along[0], segment) != along else known.get(source, segment)


def _kept_zero(known: Known, node: onnx_ir.Node, along: Along, segment: Segment) -> Numbers | float:
    """What is made of zeros is zero."""
    return np.where(_moved(known, node, along, segment) == 0, 0.0, np.nan)


def _pad(known: Known, node: onnx_ir.Node, along: Along, segment: Segment) -> Numbers | float:
    """With what is there, or with zeros."""
    given = node.inputs[2] if len(node.inputs) > 2 else None
    filler = np.array(_number(node, "value", 0.0)) if given is None else small_constant(given)
    return np.nan if filler is None or filler.any() else _kept_zero(known, node, along, segment)


def _by_element(
    compute: Callable[[list[Any]], Any], known: Known, node: onnx_ir.Node, along: Along, segment: Segment
) -> Numbers | float:
    operands = [known.operand(value, along[1], segment) for value in node.inputs if value is not None]
    result: Numbers | float = compute(operands)
    return result


def _clip(known: Known, node: onnx_ir.Node, along: Along, segment: Segment) -> Numbers | float:
    """To attributes or, from opset 11 on, inputs."""
    x, low, high, *_ = (*node.inputs, None, None)
    ends = [
        _number(node, name, default) if value is None else known.operand(value, along[1], segment)
        for value, name, default in ((low, "min", -np.inf), (high, "max", np.inf))
    ]
    assert x is not None, "its rule of channels read it"
    return np.minimum(np.maximum(known.operand(x, along[1], segment), ends[0]), ends[1])


def _filled(known: Known, node: onnx_ir.Node, along: Along, segment: Segment) -> Numbers | float:
    """ConstantOfShape: with the number that it names, or with zeros."""
    value = node.attributes.get("value")
    return 0.0 if value is None else float(value.as_tensor().numpy().item())


def _concat(known: Known, node: onnx_ir.Node, along: Along, segment: Segment) -> Numbers | float:
    """What all inputs agree on that have the channels there."""
    places = [(value, along[1]) for value in node.inputs if value is not None]
    found = [known.get(place, segment) for place in places if segment in known.segments(place)]
    return reduce(lambda a, b: np.where(a == b, a, np.nan), found, found[0])


def _product(known: Known, node: onnx_ir.Node, along: Along, segment: Segment) -> Numbers | float:
    """Where either factor is zero what is left is the bias."""
    if known.home(along[0], segment) != along:
        return np.nan
    summed = {side for pair in contractions(known, node) for side in pair}
    sides = [(x, i) for x in node.inputs[:2] if x is not None for i in range(-known.rank(x), 0)]
    free = [side for side in sides if side not in summed and segment in known.segments(side)]
    bias: Numbers | float = 0.0
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        # A convolution's has one axis, that of Gemm is broadcast and scaled.
        axis = along[1] if node.op_type == "Gemm" else -1
        bias = _number(node, "beta", 1.0) * known.operand(node.inputs[2], axis, segment)
    return np.where(np.any([known.is_zero(side, segment) for side in free], axis=0), bias, np.nan)


def _normalised(known: Known, node: onnx_ir.Node, along: Along, segment: Segment) -> Numbers | float:
    """By the mean and variance of training; a scale of zero leaves the bias, whatever it scales."""
    if along[1] != 1 - known.rank(along[0]):
        return np.nan
    x, scale, bias, mean, variance = (
        np.nan if value is None else known.operand(value, along[1] if i == 0 else -1, segment)
        for i, value in enumerate(node.inputs)
    )
    made = scale * (x - mean) / np.sqrt(variance + _number(node, "epsilon", 1e-5)) + bias
    return np.where(scale == 0, bias, made)


def _recurrent(known: Known, node: onnx_ir.Node, along: Along, segment: Segment) -> Numbers | float:
    """A unit of which all weights, biases and first states are zero stays zero: Tanh(0) does."""
    names = [name.lower() for name in _number(node, "activations", ())]
    own = _ACTIVATIONS[node.op_type]
    if along[1] != -1 or any(names[i :: len(own)] != [own[i]] * (len(names) // len(own)) for i in range(len(own))):
        return np.nan
    made = [(i, value) for i, value in enumerate(node.inputs) if i in (1, 2, B, H0, C0)]
    rows = [(value, -2 if i < B else -1) for i, value in made if value is not None]
    return np.where(np.all([known.is_zero(row, segment) for row in rows], axis=0), 0.0, np.nan)


def _times(factors: list[Any]) -> Any:
    zero = reduce(np.logical_or, (factor == 0 for factor in factors))
    return np.where(zero, 0.0, reduce(np.multiply, factors))


def _number(node: onnx_ir.Node, name: str, default: Any) -> Any:
    found = node.attributes.get(name)
    return default if found is None else found.value


# Of recurrent layers the activations of each direction, as they are unless the node says otherwise.
_ACTIVATIONS = {"GRU": ("sigmoid", "tanh"), "LSTM": ("sigmoid", "tanh", "tanh"), "RNN": ("tanh",)}
_MOVES = "Expand Flatten Gather Identity Reshape Slice Split Squeeze Transpose Unsqueeze"
_ZEROS = (
    "Abs Asin Asinh Atan Atanh AveragePool Cast Ceil Celu Dropout Elu Erf Floor Gelu GlobalAveragePool GlobalLpPool "
    "GlobalMaxPool HardSwish LeakyRelu LpPool MaxPool Mish Neg PRelu ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin "
    "ReduceProd ReduceSum ReduceSumSquare Resize Round Selu Sign Sin Sinh Softsign Sqrt Swish Tan Tanh "
    "ThresholdedRelu Upsample"
)
_BY_ELEMENT: Mapping[str, Callable[[list[Any]], Any]] = {
    "Add": partial(reduce, np.add),
    "Div": partial(reduce, np.divide),
    "Max": partial(reduce, np.maximum),
    "Min": partial(reduce, np.minimum),
    "Mul": _times,
    "Relu": lambda operands: np.maximum(operands[0], 0),
    "Sub": partial(reduce, np.subtract),
    "Sum": partial(reduce, np.add),
}
PROOFS: Mapping[str, Proof] = {
    **dict.fromkeys(_MOVES.split(), _moved),
    **dict.fromkeys(_ZEROS.split(), _kept_zero),
    **{name: partial(_by_element, compute) for name, compute in _BY_ELEMENT.items()},
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm", "MatMul"), _product),
    **dict.fromkeys(_ACTIVATIONS, _recurrent),
    "BatchNormalization": _normalised,
    "Clip": _clip,
    "Concat": _concat,
    "ConstantOfShape": _filled,
    "Pad": _pad,
}

"""What each operator does to the channels along its inputs' axes: `RULES`, one rule an operator.

A rule ties axes that must keep one order, freezes those whose order matters, keeps those whole that something works
across (but for products with weights, whose columns can be left out), and returns its output's axes. An operator
without a rule, or with an output that the rule does not speak of, freezes all it reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from .call import Axes, Call
from .elements import broadcast, by_channel, keep, normalise, softmax
from .moves import (
    concat,
    expand,
    fill,
    flatten,
    gather,
    measure,
    pad,
    resize,
    slice_,
    split,
    squeeze,
    to_shape,
    transpose,
    unsqueeze,
)
from .products import conv, conv_transpose, gemm, global_pool, matmul, pool, reduce
from .recurrent import recurrent

Rule: TypeAlias = "Callable[[Call], list[Axes]]"  # the axes of each output that it speaks of


def _first(rule: Callable[[Call], Axes]) -> Rule:
    return lambda call: [rule(call)]


_ANY = 1_000_000

_ONE = (
    "Abs Acos Acosh Asin Asinh Atan Atanh Cast Ceil Celu Clip Cos Cosh Dropout Elu Erf Exp Floor Gelu HardSigmoid "
    "HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Sigmoid Sign Sin "
    "Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu"
)
_SEVERAL = (
    "Add And Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod Mul Or PRelu Pow Sub Sum Where Xor"
)
_REDUCTIONS = "L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare"

_OF_ONE_OUTPUT: dict[str, tuple[Callable[[Call], Axes], int]] = {
    **dict.fromkeys(_ONE.split(), (keep, 1)),
    **dict.fromkeys(_SEVERAL.split(), (broadcast, _ANY)),
    **{f"Reduce{name}": (reduce, 1) for name in _REDUCTIONS.split()},
    **dict.fromkeys(("AveragePool", "LpPool", "MaxPool"), (pool, 1)),
    **dict.fromkeys(("LogSoftmax", "Softmax"), (softmax, 1)),
    **dict.fromkeys(("GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool"), (global_pool, 1)),
    "BatchNormalization": (by_channel, 5),
    "Concat": (concat, _ANY),
    "ConstantOfShape": (fill, 1),
    "Conv": (conv, 3),
    "ConvTranspose": (conv_transpose, 3),
    "Expand": (expand, 1),
    "Flatten": (flatten, 1),
    "Gather": (gather, 2),
    "Gemm": (gemm, 3),
    "InstanceNormalization": (by_channel, 3),
    "LayerNormalization": (normalise, 3),
    "MatMul": (matmul, 2),
    "Pad": (pad, 1),
    "RMSNormalization": (normalise, 2),
    "Reshape": (to_shape, 1),
    "Resize": (resize, 1),
    "Shape": (measure, 1),
    "Size": (measure, 1),
    "Slice": (slice_, 1),
    "Squeeze": (squeeze, 1),
    "Transpose": (transpose, 1),
    "Unsqueeze": (unsqueeze, 1),
    "Upsample": (resize, 1),
}


# Operators of which inputs may be left out in front of others.
GAPS = frozenset({"GRU", "LSTM", "RNN"})
# To each operator its rule, and how many of its inputs carry data; what it reads besides keeps its order.
RULES: dict[str, tuple[Rule, int]] = {
    **{name: (_first(rule), count) for name, (rule, count) in _OF_ONE_OUTPUT.items()},
    "Split": (split, 1),
    **dict.fromkeys(sorted(GAPS), (recurrent, 8)),
}

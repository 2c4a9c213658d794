"""What a fused operator does to its sums before it stores them: `activation(sum + bias) + residual`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Activation(str, Enum):
    """Element-wise functions that a kernel can fuse. Formulas as in the ONNX operators of the same name."""

    NONE = "none"
    RELU = "relu"
    CLIP = "clip"  # min(max(x, alpha), beta)
    LEAKY_RELU = "leaky_relu"  # x if x >= 0 else alpha * x
    SIGMOID = "sigmoid"
    TANH = "tanh"
    GELU = "gelu"  # x * (1 + erf(x / sqrt(2))) / 2
    GELU_TANH = "gelu_tanh"  # x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))) / 2
    SILU = "silu"  # x * sigmoid(alpha * x)


@dataclass(frozen=True, slots=True)
class Epilogue:
    """`activation(x @ W.T + bias) + residual`, each part optional.

    Attributes:
        activation: the function; `alpha` and `beta` are its parameters (see `Activation`), otherwise 0.
        bias: whether a bias [out] is added.
        residual: whether a tensor is added last, broadcast as ONNX's Add does.
    """

    activation: Activation = Activation.NONE
    alpha: float = 0.0
    beta: float = 0.0
    bias: bool = False
    residual: bool = False

"""Operators that take tensors number by number."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from .call import dtype_of, numbers

if TYPE_CHECKING:
    from .call import Call, Op, Tensor


def plain(function: Any) -> Op:
    """An operator without attributes that PyTorch has as it is."""
    return lambda call, *inputs: function(*inputs)


def variadic(function: Any) -> Op:
    """An operator of two inputs that takes any number."""
    return lambda call, *inputs: functools.reduce(function, inputs)


def div(call: Call, a: Tensor, b: Tensor) -> Tensor:
    """Integers are divided as in C."""
    return torch.div(a, b) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def power(call: Call, a: Tensor, b: Tensor) -> Tensor:
    """The result has the type of the base."""
    return torch.pow(a, b).to(a.dtype)


def mod(call: Call, a: Tensor, b: Tensor) -> Tensor:
    """The sign is the divisor's, or with fmod the dividend's."""
    return torch.fmod(a, b) if call.get("fmod", 0) else torch.remainder(a, b)


def clip(call: Call, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """Limits are inputs, before opset 11 attributes."""
    if call.opset < 11:
        return torch.clamp(x, call.get("min", -math.inf), call.get("max", math.inf))
    x = x if low is None else torch.maximum(x, low)
    return x if high is None else torch.minimum(x, high)


def cast(call: Call, x: Tensor) -> Tensor:
    """Floats of every width are one type here."""
    return x.to(dtype_of(call.get("to", 0), call.floats))


def cast_like(call: Call, x: Tensor, like: Tensor) -> Tensor:
    """The type is that of the second input."""
    return x.to(like.dtype)


def gelu(call: Call, x: Tensor) -> Tensor:
    """Exact, or by a hyperbolic tangent."""
    return F.gelu(x, approximate=call.get("approximate", "none"))


def hard_sigmoid(call: Call, x: Tensor) -> Tensor:
    """max(0, min(1, alpha x + beta))."""
    return torch.clamp(call.get("alpha", 0.2) * x + call.get("beta", 0.5), 0, 1)


def prelu(call: Call, x: Tensor, slope: Tensor) -> Tensor:
    """A slope of any shape that can be spread over x."""
    return torch.where(x < 0, slope * x, x)


def softmax(function: Any) -> Op:
    """Before opset 13 over all axes from `axis` on, which is 1 by default."""

    def run(call: Call, x: Tensor) -> Tensor:
        if call.opset >= 13:
            return function(x, dim=call.get("axis", -1))
        axis = call.get("axis", 1) % max(x.dim(), 1)
        return function(x.flatten(axis), dim=axis).reshape(x.shape)

    return run


def mean(call: Call, *inputs: Tensor) -> Tensor:
    """Of the inputs, which are spread over each other."""
    return functools.reduce(torch.add, inputs) / len(inputs)


def is_inf(call: Call, x: Tensor) -> Tensor:
    """Of both signs, or one."""
    positive, negative = call.get("detect_positive", 1), call.get("detect_negative", 1)
    return torch.isinf(x) & ((x > 0) & bool(positive) | (x < 0) & bool(negative))


def cumsum(call: Call, x: Tensor, axis: Tensor) -> Tensor:
    """Forwards or backwards, with or without the number itself."""
    at = [numbers(axis)[0]]
    turned = torch.flip(x, at) if call.get("reverse", 0) else x
    sums = torch.cumsum(turned, at[0])
    sums = sums - turned if call.get("exclusive", 0) else sums
    return torch.flip(sums, at) if call.get("reverse", 0) else sums


OPS: dict[str, Op] = {
    "Abs": plain(torch.abs),
    "Acos": plain(torch.acos),
    "Add": plain(torch.add),
    "And": plain(torch.logical_and),
    "Asin": plain(torch.asin),
    "Atan": plain(torch.atan),
    "Cast": cast,
    "CastLike": cast_like,
    "Ceil": plain(torch.ceil),
    "Celu": lambda call, x: F.celu(x, call.get("alpha", 1.0)),
    "Clip": clip,
    "Cos": plain(torch.cos),
    "Cosh": plain(torch.cosh),
    "CumSum": cumsum,
    "Div": div,
    "Dropout": lambda call, x, *_: x,
    "Elu": lambda call, x: F.elu(x, call.get("alpha", 1.0)),
    "Equal": plain(torch.eq),
    "Erf": plain(torch.erf),
    "Exp": plain(torch.exp),
    "Floor": plain(torch.floor),
    "Gelu": gelu,
    "Greater": plain(torch.gt),
    "GreaterOrEqual": plain(torch.ge),
    "HardSigmoid": hard_sigmoid,
    "HardSwish": plain(F.hardswish),
    "Identity": lambda call, x: x,
    "IsInf": is_inf,
    "IsNaN": plain(torch.isnan),
    "LeakyRelu": lambda call, x: F.leaky_relu(x, call.get("alpha", 0.01)),
    "Less": plain(torch.lt),
    "LessOrEqual": plain(torch.le),
    "Log": plain(torch.log),
    "LogSoftmax": softmax(torch.log_softmax),
    "Max": variadic(torch.maximum),
    "Mean": mean,
    "Min": variadic(torch.minimum),
    "Mish": plain(F.mish),
    "Mod": mod,
    "Mul": plain(torch.mul),
    "Neg": plain(torch.neg),
    "Not": plain(torch.logical_not),
    "Or": plain(torch.logical_or),
    "PRelu": prelu,
    "Pow": power,
    "Reciprocal": plain(torch.reciprocal),
    "Relu": plain(torch.relu),
    "Round": plain(torch.round),
    "Selu": lambda call, x: call.get("gamma", 1.0507009873554805) * F.elu(x, call.get("alpha", 1.6732632423543772)),
    "Sigmoid": plain(torch.sigmoid),
    "Sign": plain(torch.sign),
    "Sin": plain(torch.sin),
    "Sinh": plain(torch.sinh),
    "Softmax": softmax(torch.softmax),
    "Softplus": lambda call, x: torch.logaddexp(x, torch.zeros_like(x)),
    "Softsign": plain(F.softsign),
    "Sqrt": plain(torch.sqrt),
    "Sub": plain(torch.sub),
    "Sum": variadic(torch.add),
    "Swish": lambda call, x: x * torch.sigmoid(call.get("alpha", 1.0) * x),
    "Tan": plain(torch.tan),
    "Tanh": plain(torch.tanh),
    "ThresholdedRelu": lambda call, x: torch.where(x > call.get("alpha", 1.0), x, torch.zeros_like(x)),
    "Where": plain(torch.where),
    "Xor": plain(torch.logical_xor),
}

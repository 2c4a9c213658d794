"""Operators that networks are made of: products, convolutions, pooling, normalisation."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .call import Call, Op, Tensor

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
# The ways of rounding that give the same for whole factors.
_NEAREST = (
    ("asymmetric", "floor"),
    ("half_pixel", "round_prefer_floor"),
    ("half_pixel", "round_prefer_ceil"),
    ("pytorch_half_pixel", "round_prefer_floor"),
)


def gemm(call: Call, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """The product, alpha A B + beta C."""
    a = a.t() if call.get("transA", 0) else a
    b = b.t() if call.get("transB", 0) else b
    y = a @ b
    alpha, beta = call.get("alpha", 1.0), call.get("beta", 1.0)
    y = y if alpha == 1 else alpha * y
    return y if c is None else y + (c if beta == 1 else beta * c)


def einsum(call: Call, *inputs: Tensor) -> Tensor:
    """By its equation."""
    return torch.einsum(call.get("equation", ""), *inputs)


def conv(call: Call, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """Of one to three axes."""
    axes = x.dim() - 2
    strides, dilations = call.ints("strides") or [1] * axes, call.ints("dilations") or [1] * axes
    reach = [(size - 1) * dilation + 1 for size, dilation in zip(w.shape[2:], dilations, strict=True)]
    pads = _pads(call, x.shape[2:], reach, strides)
    x, padding = _padded(x, pads, 0.0)
    return _CONV[axes](x, w, b, strides, padding, dilations, call.get("group", 1))


def conv_transpose(call: Call, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """Of one to three axes.

    Raises:
        ValueError: the size is asked for in another way than by pads.
    """
    axes = x.dim() - 2
    if call.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or call.ints("output_shape"):
        raise ValueError("its size is given by auto_pad or output_shape")
    strides, dilations = call.ints("strides") or [1] * axes, call.ints("dilations") or [1] * axes
    more = call.ints("output_padding") or [0] * axes
    pads = call.ints("pads") or [0] * (2 * axes)
    # Without pads the whole result; what pads name is then cut off, and output_padding is added at the end.
    y = _CONV_TRANSPOSE[axes](x, w, None, strides, 0, 0, call.get("group", 1), dilations)
    cut = [(-low, extra - high) for low, high, extra in zip(pads[:axes], pads[axes:], more, strict=True)]
    y = F.pad(y, [one for pair in reversed(cut) for one in pair])
    return y if b is None else y + b.reshape(-1, *(1,) * axes)


def max_pool(call: Call, x: Tensor) -> Tensor:
    """Of one to three axes."""
    axes, kernel, strides, dilations = _window(call, x)
    reach = [(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True)]
    pads = _pads(call, x.shape[2:], reach, strides)
    pads = _up(pads, x.shape[2:], reach, strides) if call.get("ceil_mode", 0) else pads
    # PyTorch pads by at most half a window, and on both sides by the same.
    x, _ = _padded(x, pads, -math.inf, always=True)
    return _MAX_POOL[axes](x, kernel, strides, 0, dilations)


def average_pool(call: Call, x: Tensor) -> Tensor:
    """Of one to three axes: a mean over what is inside, or with pads.

    Raises:
        ValueError: windows have holes.
    """
    axes, kernel, strides, dilations = _window(call, x)
    if any(one != 1 for one in dilations):
        raise ValueError("its windows have holes (dilations)")
    pads = _pads(call, x.shape[2:], kernel, strides)
    more = _up(pads, x.shape[2:], kernel, strides) if call.get("ceil_mode", 0) else pads
    y = _AVERAGE[axes](_padded(x, more, 0.0, always=True)[0], kernel, strides)
    if not any(itertools.chain(*more)):
        return y
    # How much of each window counts: what lies beyond the pads never does.
    inside = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype)
    beyond = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(pads, more, strict=True)]
    if call.get("count_include_pad", 0):
        counted = _padded(_padded(inside, pads, 1.0, always=True)[0], beyond, 0.0, always=True)[0]
    else:
        counted = _padded(inside, more, 0.0, always=True)[0]
    return y / _AVERAGE[axes](counted, kernel, strides)


def global_pool(function: Any) -> Op:
    """Over all axes behind the channels."""
    return lambda call, x: function(x, list(range(2, x.dim())), keepdim=True)


def _window(call: Call, x: Tensor) -> tuple[int, list[int], list[int], list[int]]:
    axes = x.dim() - 2
    ones = [1] * axes
    return axes, call.ints("kernel_shape") or ones, call.ints("strides") or ones, call.ints("dilations") or ones


def _pads(call: Call, sizes: Sequence[int], reach: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """Before and after each axis."""
    auto, axes = call.get("auto_pad", "NOTSET"), len(sizes)
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        missing = [max((-(-n // s) - 1) * s + r - n, 0) for n, s, r in zip(sizes, strides, reach, strict=True)]
        halves = [(m // 2, m - m // 2) for m in missing]
        return halves if auto == "SAME_UPPER" else [(b, a) for a, b in halves]
    pads = (call.ints("pads") if auto == "NOTSET" else None) or [0] * (2 * axes)
    return list(zip(pads[:axes], pads[axes:], strict=True))


def _up(
    pads: list[tuple[int, int]], sizes: Sequence[int], reach: Sequence[int], strides: Sequence[int]
) -> list[tuple[int, int]]:
    """So many more at the end that the last window, which begins inside, is whole."""
    more = []
    for (low, high), n, r, s in zip(pads, sizes, reach, strides, strict=True):
        count = -(-(n + low + high - r) // s)
        count -= count * s >= n + low  # a window that begins in the pads at the end is none
        more.append((low, max(high, count * s + r - n - low)))
    return more


def _padded(x: Tensor, pads: list[tuple[int, int]], value: float, always: bool = False) -> tuple[Tensor, list[int]]:
    """X with these pads, and those that are left to the operator: equal ones, unless all are to be there."""
    if not always and all(low == high for low, high in pads):
        return x, [low for low, _ in pads]
    flat = [one for pair in reversed(pads) for one in pair]
    return (F.pad(x, flat, value=value) if any(flat) else x), [0] * len(pads)


def batch_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """As in inference: the statistics are those of the model."""
    factor = scale * torch.rsqrt(var + call.get("epsilon", 1e-5))
    shape = (-1, *(1,) * (x.dim() - 2))
    return x * factor.reshape(shape) + (bias - mean * factor).reshape(shape)


def instance_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Each channel of each sample."""
    shape = (-1, *(1,) * (x.dim() - 2))
    axes = list(range(2, x.dim()))
    return _normalised(x, axes, call.get("epsilon", 1e-5)) * scale.reshape(shape) + bias.reshape(shape)


def group_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Groups of channels; scale and bias are one a group before opset 21, one a channel from then on."""
    groups, channels = call.get("num_groups", 1), x.shape[1]
    grouped = x.reshape(x.shape[0], groups, -1)
    y = _normalised(grouped, [2], call.get("epsilon", 1e-5)).reshape(x.shape)
    scale, bias = (one.repeat_interleave(channels // one.shape[0]) for one in (scale, bias))
    shape = (-1, *(1,) * (x.dim() - 2))
    return y * scale.reshape(shape) + bias.reshape(shape)


def layer_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Over the axes from `axis` on."""
    axis = call.get("axis", -1) % x.dim()
    y = _normalised(x, list(range(axis, x.dim())), call.get("epsilon", 1e-5)) * scale
    return y if bias is None else y + bias


def rms_norm(call: Call, x: Tensor, scale: Tensor) -> Tensor:
    """By the root of the mean square, over the axes from `axis` on."""
    axes = list(range(call.get("axis", -1) % x.dim(), x.dim()))
    return x * torch.rsqrt((x * x).mean(axes, keepdim=True) + call.get("epsilon", 1e-5)) * scale


def _normalised(x: Tensor, axes: list[int], epsilon: float) -> Tensor:
    centred = x - x.mean(axes, keepdim=True)
    return centred * torch.rsqrt((centred * centred).mean(axes, keepdim=True) + epsilon)


def lp_norm(call: Call, x: Tensor) -> Tensor:
    """Divided by the first or second norm along an axis; zeros stay zeros."""
    norm = torch.linalg.vector_norm(x, call.get("p", 2), call.get("axis", -1), keepdim=True)
    return torch.where(norm == 0, x, x / norm)


def lrn(call: Call, x: Tensor) -> Tensor:
    """By the sum of squares of neighbouring channels."""
    size = call.get("size", 1)
    low = (size - 1) // 2
    squares = F.pad((x * x).movedim(1, -1), [low, size - 1 - low]).movedim(-1, 1)
    sums = squares.unfold(1, size, 1).sum(-1)
    return x / torch.pow(call.get("bias", 1.0) + call.get("alpha", 1e-4) / size * sums, call.get("beta", 0.75))


def resize(call: Call, x: Tensor, *inputs: Tensor | None) -> Tensor:
    """To a size or by factors, in the forms of which PyTorch has the same.

    Raises:
        ValueError: it has not.
    """
    mode = call.get("mode", "nearest")
    new = call.opset >= 11 and call.node.op_type == "Resize"
    position = call.get("coordinate_transformation_mode", "half_pixel" if new else "asymmetric")
    rounding = call.get("nearest_mode", "round_prefer_floor" if new else "floor")
    scales, sizes = (*inputs[1 if new else 0 :], None, None)[:2]
    if sizes is not None and sizes.numel():
        target = [int(one) for one in sizes.tolist()]
    else:
        factors = call.get("scales", (1.0,) * x.dim()) if scales is None else scales.tolist()
        target = [math.floor(n * factor) for n, factor in zip(x.shape, factors, strict=False)]
    whole = all(wanted % n == 0 for n, wanted in zip(x.shape, target, strict=False))
    if len(target) != x.dim() or tuple(target[:2]) != tuple(x.shape[:2]):
        raise ValueError("it resizes other axes than those behind the channels")
    if mode == "nearest" and whole and (position, rounding) in _NEAREST:
        return F.interpolate(x, target[2:], mode="nearest")
    if mode == "linear" and whole and position in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        name = {1: "linear", 2: "bilinear", 3: "trilinear"}[x.dim() - 2]
        return F.interpolate(x, target[2:], mode=name, align_corners=position == "align_corners")
    raise ValueError(f"mode '{mode}' with '{position}' and '{rounding}'")


OPS: dict[str, Op] = {
    "AveragePool": average_pool,
    "BatchNormalization": batch_norm,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Einsum": einsum,
    "Gemm": gemm,
    "GlobalAveragePool": global_pool(torch.mean),
    "GlobalMaxPool": global_pool(torch.amax),
    "GroupNormalization": group_norm,
    "InstanceNormalization": instance_norm,
    "LRN": lrn,
    "LayerNormalization": layer_norm,
    "LpNormalization": lp_norm,
    "MatMul": lambda call, a, b: a @ b,
    "MaxPool": max_pool,
    "RMSNormalization": rms_norm,
    "Resize": resize,
    "Upsample": resize,
}

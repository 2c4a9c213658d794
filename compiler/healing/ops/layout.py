"""Operators that move, make and cut tensors without computing with their numbers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from .call import axes_of, numbers, tensor_of

if TYPE_CHECKING:
    from .call import Call, Op, Tensor

# How updates are combined with what is there: PyTorch's names by ONNX's.
_COMBINED = {"mul": "prod", "max": "amax", "min": "amin"}


def constant(call: Call) -> Tensor:
    """Of any of the attributes that ONNX has for it."""
    attributes = call.node.attributes
    if "value" in attributes:
        return tensor_of(attributes["value"].as_tensor(), call.floats)
    if "value_float" in attributes or "value_floats" in attributes:
        return torch.tensor(next(iter(attributes.values())).value, dtype=call.floats)
    if "value_int" in attributes or "value_ints" in attributes:
        return torch.tensor(next(iter(attributes.values())).value, dtype=torch.int64)
    raise TypeError(f"a constant of {', '.join(attributes)}")


def constant_of_shape(call: Call, shape: Tensor) -> Tensor:
    """Zeros of float32 where nothing else is said."""
    found = call.node.attributes.get("value")
    value = torch.zeros(1, dtype=call.floats) if found is None else tensor_of(found.as_tensor(), call.floats)
    return torch.full(numbers(shape), value.item(), dtype=value.dtype)


def shape(call: Call, x: Tensor) -> Tensor:
    """From opset 15 on a part of it, too."""
    sizes = list(x.shape)
    return torch.tensor(sizes[call.get("start", 0) : call.get("end", len(sizes))], dtype=torch.int64)


def size(call: Call, x: Tensor) -> Tensor:
    """The number of elements."""
    return torch.tensor(math.prod(x.shape), dtype=torch.int64)


def reshape(call: Call, x: Tensor, target: Tensor | None = None) -> Tensor:
    """0 is the size that was there."""
    sizes = call.ints("shape") or [] if target is None else numbers(target)
    if not call.get("allowzero", 0):
        sizes = [x.shape[axis] if wanted == 0 else wanted for axis, wanted in enumerate(sizes)]
    return x.reshape(sizes)


def flatten(call: Call, x: Tensor) -> Tensor:
    """To two axes."""
    axis = call.get("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def squeeze(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """The named axes, or all of size 1."""
    found = axes_of(call, axes, x.dim())
    return x.squeeze() if found is None else x.squeeze(tuple(found))


def unsqueeze(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Axes are counted in the result."""
    count = len(call.ints("axes") or ()) if axes is None else axes.numel()
    for axis in sorted(axes_of(call, axes, x.dim() + count) or ()):
        x = x.unsqueeze(axis)
    return x


def transpose(call: Call, x: Tensor) -> Tensor:
    """Back to front where nothing is said."""
    return x.permute(call.ints("perm") or list(range(x.dim()))[::-1])


def concat(call: Call, *inputs: Tensor) -> Tensor:
    """Along one axis."""
    return torch.cat(inputs, call.get("axis", 1))


def split(call: Call, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    """Into parts of the sizes that are named, else equal ones, of which the last may be smaller."""
    axis = call.get("axis", 0)
    parts = call.ints("split") if sizes is None else numbers(sizes)
    count = len(call.node.outputs)
    return tuple(torch.split(x, parts or -(-x.shape[axis] // count), axis))


def slices(
    call: Call,
    x: Tensor,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    """As Python's slices, clamped; PyTorch knows no negative steps."""
    begin = call.ints("starts") or [] if starts is None else numbers(starts)
    end = call.ints("ends") or [] if ends is None else numbers(ends)
    along = axes_of(call, axes, x.dim()) or list(range(len(begin)))
    step = [1] * len(begin) if steps is None else numbers(steps)
    for axis, *bounds in zip(along, begin, end, step, strict=True):
        chosen = range(*_slice(*bounds).indices(x.shape[axis]))
        if chosen.step > 0:
            x = x.narrow(axis, chosen.start, len(range(chosen.start, max(chosen.stop, chosen.start))))
            x = x[(slice(None),) * axis + (slice(None, None, chosen.step),)] if chosen.step > 1 else x
        else:
            x = x.index_select(axis, torch.tensor(list(chosen), dtype=torch.int64))
    return x


def _slice(start: int, end: int, step: int) -> slice:
    # Going backwards, an end far below zero is "beyond the first", which Python says by None.
    return slice(start, None if step < 0 and end < -(2**30) else end, step)


def gather(call: Call, x: Tensor, index: Tensor) -> Tensor:
    """Whole slices along an axis, in the shape of `index`."""
    axis = call.get("axis", 0) % x.dim()
    wrapped = torch.where(index < 0, index + x.shape[axis], index)
    found = torch.index_select(x, axis, wrapped.reshape(-1).to(torch.int64))
    return found.reshape([*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]])


def gather_elements(call: Call, x: Tensor, index: Tensor) -> Tensor:
    """Single numbers along an axis."""
    axis = call.get("axis", 0) % x.dim()
    return torch.gather(x, axis, torch.where(index < 0, index + x.shape[axis], index).to(torch.int64))


def gather_nd(call: Call, x: Tensor, index: Tensor) -> Tensor:
    """By tuples along the last axis of `index`; the first axes may be a batch."""
    batch, index = call.get("batch_dims", 0), index.to(torch.int64)
    if not batch:
        return x[tuple(index.unbind(-1))]
    pairs = zip(x.flatten(0, batch - 1), index.flatten(0, batch - 1), strict=True)
    found = torch.stack([one[tuple(at.unbind(-1))] for one, at in pairs])
    return found.reshape(*index.shape[:batch], *found.shape[1:])


def scatter_nd(call: Call, x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    """Put slices in, or combine them with those that are there."""
    kind, index = call.get("reduction", "none"), index.to(torch.int64)
    if kind in ("none", "add"):
        return x.index_put(tuple(index.unbind(-1)), updates, accumulate=kind == "add")
    # As rows of a matrix, by one number each.
    sizes = x.shape[: index.shape[-1]]
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    at = (torch.where(index < 0, index + torch.tensor(sizes), index) * torch.tensor(strides)).sum(-1).reshape(-1)
    new = updates.reshape(len(at), -1)
    rows = x.reshape(math.prod(sizes), -1)
    return rows.scatter_reduce(0, at[:, None].expand_as(new), new, _COMBINED[kind]).reshape(x.shape)


def scatter_elements(call: Call, x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    """Put single numbers in along an axis, or combine them with those that are there."""
    kind, axis = call.get("reduction", "none"), call.get("axis", 0) % x.dim()
    index = torch.where(index < 0, index + x.shape[axis], index).to(torch.int64)
    if kind == "none":
        return x.scatter(axis, index, updates)
    return x.scatter_reduce(axis, index, updates, "sum" if kind == "add" else _COMBINED[kind])


def expand(call: Call, x: Tensor, target: Tensor) -> Tensor:
    """Either side may have the larger size."""
    return x.expand(torch.broadcast_shapes(x.shape, numbers(target)))


def tile(call: Call, x: Tensor, repeats: Tensor) -> Tensor:
    """Each axis so many times."""
    return x.repeat(numbers(repeats))


def pad(
    call: Call, x: Tensor, pads: Tensor | None = None, value: Tensor | None = None, axes: Tensor | None = None
) -> Tensor:
    """Negative pads cut; reflections and edges of any axes, one after the other.

    Raises:
        ValueError: ONNX has no such mode.
    """
    found = (call.ints("pads") or call.ints("paddings") or []) if pads is None else numbers(pads)
    along = list(range(x.dim())) if axes is None else [axis % x.dim() for axis in numbers(axes)]
    mode = call.get("mode", "constant")
    before, after = found[: len(along)], found[len(along) :]
    if mode == "constant":
        fill = call.get("value", 0.0) if value is None else value.item()
        sides = dict(zip(along, zip(before, after, strict=True), strict=True))
        flat = [one for axis in reversed(range(x.dim())) for one in sides.get(axis, (0, 0))]
        return torch.nn.functional.pad(x, flat, value=fill)
    for axis, low, high in zip(along, before, after, strict=True):
        if low or high:
            x = x.index_select(axis, _places(mode, x.shape[axis], low, high))
    return x


def _places(mode: str, length: int, low: int, high: int) -> Tensor:
    """Where each place of a padded axis comes from."""
    at = torch.arange(-low, length + high)
    if mode == "edge":
        return at.clamp(0, length - 1)
    if mode == "wrap":
        return at % length
    if mode != "reflect":
        raise ValueError(f"mode '{mode}', expected constant, reflect, edge or wrap")
    period = max(2 * (length - 1), 1)
    at = at % period
    return torch.where(at >= length, period - at, at)


def arange(call: Call, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    """Of the inputs' type."""
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def triangle(call: Call, x: Tensor, k: Tensor | None = None) -> Tensor:
    """The upper or lower one."""
    diagonal = 0 if k is None else numbers(k)[0]
    return torch.triu(x, diagonal) if call.get("upper", 1) else torch.tril(x, diagonal)


def one_hot(call: Call, index: Tensor, depth: Tensor, values: Tensor) -> Tensor:
    """Indices outside give no one at all."""
    count = numbers(depth)[0]
    index = torch.where(index < 0, index + count, index).to(torch.int64)
    found = index.unsqueeze(-1) == torch.arange(count)
    axis = call.get("axis", -1)
    return torch.where(found, values[1], values[0]).movedim(-1, axis)


def depth_to_space(call: Call, x: Tensor) -> Tensor:
    """[N, C, H, W] to [N, C / b², H b, W b]."""
    n, c, h, w = x.shape
    b = call.get("blocksize", 1)
    if call.get("mode", "DCR") == "DCR":
        return x.reshape(n, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c // b**2, h * b, w * b)
    return x.reshape(n, c // b**2, b, b, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // b**2, h * b, w * b)


def space_to_depth(call: Call, x: Tensor) -> Tensor:
    """[N, C, H, W] to [N, C b², H / b, W / b]."""
    n, c, h, w = x.shape
    b = call.get("blocksize", 1)
    order = (0, 3, 5, 1, 2, 4) if call.get("mode", "DCR") == "DCR" else (0, 1, 3, 5, 2, 4)
    return x.reshape(n, c, h // b, b, w // b, b).permute(order).reshape(n, c * b * b, h // b, w // b)


OPS: dict[str, Op] = {
    "Concat": concat,
    "Constant": constant,
    "ConstantOfShape": constant_of_shape,
    "DepthToSpace": depth_to_space,
    "Expand": expand,
    "Flatten": flatten,
    "Gather": gather,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    "OneHot": one_hot,
    "Pad": pad,
    "Range": arange,
    "Reshape": reshape,
    "ScatterElements": scatter_elements,
    "ScatterND": scatter_nd,
    "Shape": shape,
    "Size": size,
    "Slice": slices,
    "SpaceToDepth": space_to_depth,
    "Split": split,
    "Squeeze": squeeze,
    "Tile": tile,
    "Transpose": transpose,
    "Trilu": triangle,
    "Unsqueeze": unsqueeze,
}

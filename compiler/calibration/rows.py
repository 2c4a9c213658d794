"""The rows that a layer multiplies, from the tensor that flows into it: a convolution's by unfolding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ...ir import LayerKind
from ..frontend.nodes import attribute

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    from numpy.typing import NDArray

    from ...ir import Layer

# Rows of one sample that are looked at: neighbouring pixels and tokens say much the same, other samples do not.
ROWS_A_SAMPLE = 256


def groups_of(layer: Layer) -> int:
    """Into how many independent products a layer falls: a convolution's groups, else 1."""
    return int(attribute(layer.nodes[0], "group", 1)) if layer.kind is LayerKind.CONV else 1


def has_rows(layer: Layer) -> bool:
    """Whether `rows` knows the layer: products of floats with one matrix, and convolutions, but for transposed ones."""
    linear = layer.kind is LayerKind.LINEAR and not layer.fixed and not layer.obstacle.startswith("a stack")
    return linear or layer.op_type == "Conv"


def source_of(layer: Layer) -> Hashable:
    """Equal for layers whose rows are the same."""
    if layer.kind is not LayerKind.CONV:
        return layer.x, layer.transpose_x
    geometry = (attribute(layer.nodes[0], name, ()) for name in ("strides", "dilations", "pads"))
    auto = attribute(layer.nodes[0], "auto_pad", "NOTSET")
    return layer.x, groups_of(layer), layer.in_features, _kernel(layer), *geometry, auto


def rows(layer: Layer, x: NDArray[Any], seed: int, keep: NDArray[np.bool_] | None = None) -> NDArray[np.float32]:
    """X of a layer as the matrices that its weight multiplies.

    Args:
        layer: linear, or a Conv of any number of axes, groups, strides, dilations and pads.
        x: what flows in: [..., in] ([..., in, rows] where transposed), or [N, C, ...].
        seed: of the choice of rows, at most `ROWS_A_SAMPLE` a sample; the same seed chooses the same.
        keep: [leading axes of x] tokens that count, where the model has a mask of that shape.

    Returns:
        [groups, rows, in / groups] float32.
    """
    if layer.kind is LayerKind.CONV:
        return _unfold(layer, x, seed)
    if layer.transpose_x:
        x = np.swapaxes(x, -1, -2)
    flat = x.reshape(-1, x.shape[-1])
    if keep is not None and keep.shape == x.shape[:-1] and keep.any():
        flat = flat[keep.reshape(-1)]
    most = ROWS_A_SAMPLE * (x.shape[0] if x.ndim > 2 else len(flat))
    chosen = _choose(len(flat), most, seed)
    return np.asarray(flat if chosen is None else flat[chosen], dtype=np.float32)[None]


def _unfold(layer: Layer, x: NDArray[Any], seed: int) -> NDArray[np.float32]:
    """The patches under the kernel: [groups, rows, channels of a group * kernel positions]."""
    node, axes = layer.nodes[0], x.ndim - 2
    groups = groups_of(layer)
    kernel = _kernel(layer)
    strides = attribute(node, "strides", (1,) * axes)
    dilations = attribute(node, "dilations", (1,) * axes)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    padded = np.pad(x, [(0, 0), (0, 0), *_pads(layer, x.shape[2:], reach, strides)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=tuple(range(2, 2 + axes)))
    at = (
        slice(None),
        slice(None),
        *(slice(None, None, s) for s in strides),
        *(slice(None, None, d) for d in dilations),
    )
    windows = windows[at]
    # [N, positions.., C, kernel..]; only the rows that are looked at are copied.
    turned = windows.transpose(0, *range(2, 2 + axes), 1, *range(2 + axes, 2 + 2 * axes))
    places = turned.shape[: 1 + axes]
    chosen = _choose(int(np.prod(places)), ROWS_A_SAMPLE * len(x), seed)
    index = np.arange(int(np.prod(places))) if chosen is None else chosen
    patches = turned[np.unravel_index(index, places)].reshape(len(index), groups, -1)
    return np.ascontiguousarray(patches.transpose(1, 0, 2), dtype=np.float32)


def _kernel(layer: Layer) -> tuple[int, ...]:
    """The kernel's sizes: from the attribute, which may be left out, else from the weight."""
    found = tuple(attribute(layer.nodes[0], "kernel_shape", ()))
    value = layer.nodes[0].inputs[1]
    assert value is not None
    shape = value.shape if value.const_value is None else value.const_value.shape
    if not found and shape is not None:
        found = tuple(int(size) for size in shape.numpy()[2:])
    return found


def _pads(layer: Layer, sizes: tuple[int, ...], reach: list[int], strides: tuple[int, ...]) -> list[tuple[int, int]]:
    """Zeros before and after each axis."""
    node, axes = layer.nodes[0], len(sizes)
    auto = attribute(node, "auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        missing = [max((-(-n // s) - 1) * s + r - n, 0) for n, s, r in zip(sizes, strides, reach, strict=True)]
        halves = [(m // 2, m - m // 2) for m in missing]
        return halves if auto == "SAME_UPPER" else [(b, a) for a, b in halves]
    pads = attribute(node, "pads", (0,) * (2 * axes)) if auto == "NOTSET" else (0,) * (2 * axes)
    return [(pads[axis], pads[axis + axes]) for axis in range(axes)]


def _choose(count: int, most: int, seed: int) -> NDArray[np.int64] | None:
    """`most` of `count` rows in their order, or None for all."""
    if count <= most:
        return None
    return np.sort(np.random.default_rng(seed).choice(count, most, replace=False))


def masks(feeds: Mapping[str, NDArray[Any]]) -> NDArray[np.bool_] | None:
    """Which tokens of a batch count, by an input [batch, tokens] of zeros and ones that calls itself a mask."""
    for name, array in feeds.items():
        if "mask" in name.lower() and array.ndim == 2 and array.dtype.kind in "iub" and np.isin(array, (0, 1)).all():
            keep: NDArray[np.bool_] = array != 0
            return keep
    return None

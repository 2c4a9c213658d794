"""Operators that make one number of many along axes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .call import axes_of, numbers

if TYPE_CHECKING:
    from .call import Call, Op, Tensor


def reduction(function: Any) -> Op:
    """Over the axes that are named; over all where none are, unless the node says that this means nothing."""

    def run(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
        found = axes_of(call, axes, x.dim())
        if not found and call.get("noop_with_empty_axes", 0):
            return x
        over = found or list(range(x.dim()))
        return function(x, over, bool(call.get("keepdims", 1))) if over else x

    return run


def product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """One axis after the other, the last first, so that the others keep their numbers."""
    for axis in sorted(axes, reverse=True):
        x = torch.prod(x, axis, keepdim=keep)
    return x


def extreme(function: Any) -> Op:
    """The index of the largest or smallest along an axis."""

    def run(call: Call, x: Tensor) -> Tensor:
        axis, keep = call.get("axis", 0), bool(call.get("keepdims", 1))
        if not call.get("select_last_index", 0):
            return function(x, axis, keepdim=keep)
        return x.shape[axis] - 1 - function(torch.flip(x, [axis]), axis, keepdim=keep)

    return run


def top_k(call: Call, x: Tensor, k: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k largest or smallest along an axis, and where they were."""
    count = call.get("k", 1) if k is None else numbers(k)[0]
    axis = call.get("axis", -1)
    # Of equal numbers the first: torch.topk promises nothing there.
    values, places = torch.sort(x, dim=axis, descending=bool(call.get("largest", 1)), stable=True)
    return values.narrow(axis, 0, count), places.narrow(axis, 0, count)


def _sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.sum(x, axes, keepdim=keep).to(x.dtype)


OPS: dict[str, Op] = {
    "ArgMax": extreme(torch.argmax),
    "ArgMin": extreme(torch.argmin),
    "ReduceL1": reduction(lambda x, axes, keep: torch.sum(torch.abs(x), axes, keepdim=keep)),
    "ReduceL2": reduction(lambda x, axes, keep: torch.sqrt(torch.sum(x * x, axes, keepdim=keep))),
    "ReduceLogSum": reduction(lambda x, axes, keep: torch.log(torch.sum(x, axes, keepdim=keep))),
    "ReduceLogSumExp": reduction(lambda x, axes, keep: torch.logsumexp(x, axes, keepdim=keep)),
    "ReduceMax": reduction(lambda x, axes, keep: torch.amax(x, axes, keepdim=keep)),
    "ReduceMean": reduction(lambda x, axes, keep: torch.mean(x, axes, keepdim=keep)),
    "ReduceMin": reduction(lambda x, axes, keep: torch.amin(x, axes, keepdim=keep)),
    "ReduceProd": reduction(product),
    "ReduceSum": reduction(_sum),
    "ReduceSumSquare": reduction(lambda x, axes, keep: torch.sum(x * x, axes, keepdim=keep)),
    "TopK": top_k,
}

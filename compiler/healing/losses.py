"""How far the student is from the teacher, and from the labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from .ops import Tensor

# Numbers that are not negative are probabilities where their sums are so near to 1.
ONE = 1e-3
# What a target counts that does not vary at all.
STILL = 1e-3


def relative_error(x: Tensor, target: Tensor, keep: Tensor | None = None) -> Tensor:
    """The squared difference as a share of what the target varies by, from sample to sample.

    Tokens [samples, tokens] that `keep` leaves out do not count.
    """
    if keep is not None and x.shape[:2] == keep.shape:
        x, target = x[keep], target[keep]
    finite = torch.isfinite(target)
    if not bool(finite.all()):  # such as logits of what is left out
        x, target = (torch.where(finite, one, 0) for one in (x, target))
    error, power = torch.square(x - target).sum(), torch.square(target).sum()
    varying = torch.square(target - target.mean(0, keepdim=True)).sum() if len(target) > 1 else power
    scale = varying + STILL * power
    return error / scale if float(scale) > 0 else error / max(x.numel(), 1)


def distance(x: Tensor, target: Tensor, keep: Tensor | None = None) -> Tensor:
    """Of outputs: probabilities along the last axis diverge, all others have a relative error."""
    if x.dim() > 1 and bool((target >= 0).all()) and bool((target.sum(-1) - 1).abs().max() < ONE):
        least = torch.finfo(x.dtype).tiny
        return divergence(x.clamp_min(least).log(), target.clamp_min(least).log())
    return relative_error(x, target, keep)


def divergence(x: Tensor, target: Tensor) -> Tensor:
    """Kullback-Leibler's, from the target's distribution to x's, of logits along the last axis: nats a sample."""
    log, log_target = torch.log_softmax(x, -1), torch.log_softmax(target, -1)
    return (log_target.exp() * (log_target - log)).sum(-1).mean()


def task_loss(x: Tensor, labels: Tensor) -> Tensor | None:
    """Cross entropy of logits [samples, ..., classes] for whole numbers, relative error for labels of x's shape.

    None where the labels are neither; negative ones do not count.
    """
    x = x.reshape(x.shape[0], *(size for size in x.shape[1:] if size != 1))
    labels = labels.reshape(labels.shape[0], *(size for size in labels.shape[1:] if size != 1))
    if not labels.is_floating_point() and labels.shape == x.shape[:-1] and bool((labels >= 0).any()):
        classes = x.shape[-1]
        if int(labels.max()) < classes:
            flat = labels.reshape(-1).to(torch.int64)
            return F.cross_entropy(x.reshape(-1, classes)[flat >= 0], flat[flat >= 0])
    if labels.shape == x.shape:
        return relative_error(x, labels.to(x.dtype))
    return None

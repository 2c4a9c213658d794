"""Parameterized structured pruning: what stays is learned (Schindler et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import nn

from ...ir import UsageError
from ..weights import check_finite
from .method import Method

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...ir import Pattern
    from ..layout import Layout
    from ..weights import Weight


class StructureParameters(nn.Module):
    """The weight times a factor alpha for each block: alpha = nu where abs(nu) >= epsilon, else 0.

    The gradient goes straight through the threshold, to nu as if alpha were nu; so a block may come back.

    Attributes:
        nu: [block rows, block columns], in the weight's dtype; at first the root mean square of each block as a share
            of the layer's, which the weights are divided by: their product does not change.
        kept: bool, like nu: where it was not below epsilon when that was last looked at.
    """

    kept: torch.Tensor

    def __init__(self, value: torch.Tensor, layout: Layout, pattern: Pattern) -> None:
        super().__init__()
        self._layout, self._pattern = layout, pattern
        squares = layout.to_matrix(value).double().square().cpu().numpy()
        # How many weights each block has.
        self.sizes = pattern.reduce(np.ones(squares.shape))
        norms = np.sqrt(pattern.reduce(squares) / self.sizes / (squares.mean() or 1.0))
        self.nu = nn.Parameter(torch.from_numpy(norms).to(value))
        self.register_buffer("kept", torch.ones_like(self.nu, dtype=torch.bool))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        alpha = self.nu + (torch.where(self.kept, self.nu, 0.0) - self.nu).detach()
        return weight * self._expanded(alpha)

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        """What to store to get `weight`; below a nu of zero, where nothing can, the weight itself."""
        factors = self._expanded(self.nu)
        return torch.where(factors != 0, weight / torch.where(factors != 0, factors, 1.0), weight)

    def cut(self, epsilon: float) -> None:
        """Drop the blocks below `epsilon`; the largest of the layer stays, unless the layer is one block."""
        sizes = self.nu.detach().abs()
        # What a decay has drawn to zero stays there, even where that is more than was asked for.
        reached = sizes >= epsilon if sizes.numel() == 1 else sizes >= sizes.max().clamp_max(epsilon)
        self.kept.copy_(reached & (sizes > 0))

    def _expanded(self, blocks: torch.Tensor) -> torch.Tensor:
        """A factor for each weight."""
        out, inputs = self._layout.matrix
        rows = blocks.repeat_interleave(self._pattern.rows, 0)[:out]
        return self._layout.from_matrix(rows.repeat_interleave(self._pattern.cols, 1)[:, :inputs])


@dataclass(frozen=True)
class PSP(Method):
    """Structure parameters nu, one a block, trained with the weights and drawn to zero by a decay of their own.

    Make the optimizer after `prune`: it has to know them.

    Attributes:
        decay: of nu in each step, whatever the learning rate: "l2" takes this share of it, "l1" this much.
        penalty: "l2", under which those that the loss needs and those that it does not separate; "l1" to compare.
        epsilon: where `PruneConfig.sparsity` is None, what abs(nu) must reach to stay; nu begins around 1. With a
            sparsity epsilon is whatever gives it, over all layers together.
    """

    decay: float = 1e-4
    penalty: Literal["l2", "l1"] = "l2"
    epsilon: float = 0.1

    def __post_init__(self) -> None:
        if not all(isinstance(number, (int, float)) for number in (self.decay, self.epsilon)):
            raise UsageError(f"PSP: expected numbers for decay and epsilon, got {self.decay!r} and {self.epsilon!r}")
        if not 0 <= self.decay < 1 or not 0 <= self.epsilon < float("inf"):
            raise UsageError(f"PSP: expected 0 <= decay < 1 and epsilon >= 0, got {self.decay} and {self.epsilon}")
        if self.penalty not in ("l1", "l2"):
            raise UsageError(f"PSP: '{self.penalty}' is no penalty: expected l2 or l1")

    def parametrization(self, value: torch.Tensor, layout: Layout, pattern: Pattern) -> StructureParameters:
        return StructureParameters(value, layout, pattern)

    def choose(self, weights: Sequence[Weight], shares: Sequence[float | None], regrow: bool) -> None:
        for weight in weights:
            check_finite(weight.name, weight.mask.nu)
        # Layers that are asked for the same share compete.
        for share in dict.fromkeys(shares):
            group = [weight.mask for weight, own in zip(weights, shares, strict=True) if own == share]
            epsilon = self.epsilon if share is None else _epsilon(group, share)
            for mask in group:
                mask.cut(epsilon)

    @torch.no_grad()
    def after_step(self, weights: Sequence[Weight]) -> None:
        for nu in (weight.mask.nu for weight in weights):
            nu.copy_(nu * (1 - self.decay) if self.penalty == "l2" else torch.nn.functional.softshrink(nu, self.decay))


def _epsilon(masks: Sequence[StructureParameters], share: float) -> float:
    """What drops the share of their weights that is nearest to `share`."""
    values = np.concatenate([mask.nu.detach().abs().double().cpu().numpy().ravel() for mask in masks])
    sizes = np.concatenate([mask.sizes.ravel() for mask in masks])
    order = np.argsort(values, kind="stable")
    gone = np.cumsum(sizes[order])
    count = int((gone - sizes[order] / 2 <= share * gone[-1]).sum()) if share else 0
    return float(values[order][count]) if count < len(order) else float("inf")

"""The blocks of largest norm stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..weights import check_finite
from .method import Method

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...ir import Pattern
    from ..layout import Layout
    from ..weights import Weight


class Mask(nn.Module):
    """The weight where the mask is true, else zero. What is zero gets no gradient; its value is kept and may come back.

    Attributes:
        mask: bool, in the weight's shape; a buffer, so that it is saved, moved and broadcast with the model.
    """

    mask: torch.Tensor

    def __init__(self, value: torch.Tensor, layout: Layout, pattern: Pattern) -> None:
        super().__init__()
        self._layout, self._pattern = layout, pattern
        self.register_buffer("mask", torch.ones_like(value, dtype=torch.bool))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return torch.where(self.mask, weight, 0.0)

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        """What to store for a `weight` that is assigned: itself."""
        return weight

    def choose(self, weight: torch.Tensor, sparsity: float) -> None:
        """The mask with this share of zeros, by the norms in `weight`."""
        squares = self._layout.to_matrix(weight).double().square().cpu().numpy()
        kept = torch.from_numpy(self._pattern.project(squares, 1.0 - sparsity))
        self.mask.copy_(self._layout.from_matrix(kept))


@dataclass(frozen=True)
class Magnitude(Method):
    """The same share of zeros in every layer, those of least Euclidean norm (Hartenstein et al. 2020 for groups)."""

    def parametrization(self, value: torch.Tensor, layout: Layout, pattern: Pattern) -> Mask:
        return Mask(value, layout, pattern)

    def choose(self, weights: Sequence[Weight], shares: Sequence[float | None], regrow: bool) -> None:
        for weight, share in zip(weights, shares, strict=True):
            assert share is not None, "the configuration was checked"
            check_finite(weight.name, weight.original)
            weight.mask.choose(weight.original if regrow else weight.value, share)

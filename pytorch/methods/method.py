"""What every way to choose does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import nn

    from ...ir import Pattern
    from ..layout import Layout
    from ..weights import Weight


class Method(ABC):
    """How it is chosen which weights stay."""

    @abstractmethod
    def parametrization(self, value: torch.Tensor, layout: Layout, pattern: Pattern) -> nn.Module:
        """What is put on a weight: dense at first, it computes the weight as the model sees it.

        Args:
            value: the weight.
            layout: as a matrix.
            pattern: of that matrix.
        """

    @abstractmethod
    def choose(self, weights: Sequence[Weight], shares: Sequence[float | None], regrow: bool) -> None:
        """Choose anew what stays.

        Args:
            weights: with a `parametrization` of this method on each.
            shares: of zeros, of each; None where the method finds it.
            regrow: whether weights that are zero now compete with the values they had.

        Raises:
            SparsecError: a weight is NaN or infinite.
        """

    def after_step(self, weights: Sequence[Weight]) -> None:
        """What has to be done after each step of the optimizer, as long as masks may still change."""
        return

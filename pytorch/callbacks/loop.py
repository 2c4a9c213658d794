"""What a callback does in any training loop."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..pruner import Pruner


class Loop:
    """A step of the pruner for each of the optimizer; where weights are set back, the optimizer is, too.

    Optimizers and schedules of learning rates are PyTorch's, or look like them.
    """

    def __init__(self, pruner: Pruner) -> None:
        self.pruner = pruner
        # Learning rates and the state of their schedules at the step that is gone back to.
        self._start: dict[str, Any] = {}

    def begin(self, optimizers: Sequence[Any], schedulers: Sequence[Any]) -> None:
        """Before the first step."""
        if self.pruner.at_start:
            rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
            self._start = {"rates": rates, "schedulers": [deepcopy(scheduler.state_dict()) for scheduler in schedulers]}

    def step(self, optimizers: Sequence[Any], schedulers: Sequence[Any]) -> None:
        """After each step of the optimizer and of the schedules."""
        if not self.pruner.step():
            self.begin(optimizers, schedulers)
            return
        for optimizer, rates in zip(optimizers, self._start["rates"], strict=True):
            optimizer.state.clear()
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
        for scheduler, state in zip(schedulers, self._start["schedulers"], strict=True):
            scheduler.load_state_dict(deepcopy(state))

    def state_dict(self) -> dict[str, Any]:
        """All that the model's and the optimizer's checkpoints do not have."""
        return {"pruner": self.pruner.state_dict(), "start": self._start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.pruner.load_state_dict(state["pruner"])
        self._start = dict(state["start"])

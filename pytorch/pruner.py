"""The masks of a model through its training."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed, nn

from ..ir import SparsecError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .config import PruneConfig
    from .weights import Weight

# How a mask and a weight that has one are called.
_MASK = re.compile(r"parametrizations\.\w+\.\d")
_ORIGINAL = re.compile(r"parametrizations\.(\w+)\.original\b")


class Pruner:
    """What `prune` put on a model.

    Masks and structure parameters are part of the model: its `state_dict`, `to`, `torch.compile` and
    `DistributedDataParallel` (made after `prune`) treat them as their own. The pruner itself only knows how many steps
    were taken, and with rewinding the weights to go back to: `state_dict` has these.

    Attributes:
        weights: that are pruned.
        skipped: why other weights are not, by name.
        steps: of the optimizer, so far.
    """

    def __init__(
        self, model: nn.Module, weights: Sequence[Weight], shares: Sequence[float | None], config: PruneConfig
    ) -> None:
        """Begin; masks that are due before the first step are chosen."""
        self._model, self._config, self._shares = model, config, list(shares)
        self.weights, self.skipped, self.steps = tuple(weights), dict[str, str](), 0
        self._rewind: dict[str, torch.Tensor] = {}
        self._choose()

    def step(self) -> bool:
        """Call this after each step of the optimizer.

        Returns:
            Whether the weights were set back (`Iterative`): then begin the optimizer's state and the learning rate's
            schedule anew.

        Raises:
            SparsecError: a weight is NaN or infinite, or the zeros are final already.
        """
        for weight in self.weights:
            _ = weight.mask  # that has been taken off is an error here, not training in which zeros get lost
        self.steps += 1
        if None in self._shares or self.steps <= self._config.schedule.last:
            self._config.method.after_step(self.weights)
        rewound: bool = self._choose()
        return rewound

    @property
    def at_start(self) -> bool:
        """Whether this is the step that rewinding goes back to."""
        return self.steps == self._config.schedule.rewind_from()

    @property
    def sparsity(self) -> float:
        """Share of zeros in the weights that are pruned."""
        zeros = sum(int((weight.value == 0).sum()) for weight in self.weights)
        return zeros / max(1, sum(weight.size for weight in self.weights))

    def state_dict(self) -> dict[str, Any]:
        """Steps, and the weights to go back to."""
        return {"steps": self.steps, "rewind": dict(self._rewind)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; the model's own state has the masks.

        Raises:
            SparsecError: it is the state of another schedule, or of another model.
        """
        if not {"steps", "rewind"} <= set(state):
            raise SparsecError(
                f"expected what Pruner.state_dict() returns, got {', '.join(map(str, state)) or 'nothing'}"
            )
        steps, rewind, start = int(state["steps"]), dict(state["rewind"]), self._config.schedule.rewind_from()
        missing = [] if start is None or steps < start else [name for name in self._trained() if name not in rewind]
        if missing:
            raise SparsecError(
                f"the pruner's state has no value of '{missing[0]}' to go back to: was it saved with another schedule "
                "or of another model? Call prune() with the configuration that it was saved with"
            )
        self.steps, self._rewind = steps, rewind

    def __str__(self) -> str:
        """A line for each weight: its zeros, or why it is not pruned."""
        lines = [
            f"{w.name}: {float((w.value == 0).double().mean()):.1%} zeros, {self._config.pattern}" for w in self.weights
        ]
        return "\n".join([*lines, *(f"{name}: dense, {reason}" for name, reason in self.skipped.items())])

    @torch.no_grad()
    def _choose(self) -> bool:
        """What is due after this many steps."""
        schedule, method = self._config.schedule, self._config.method
        if self.at_start:
            self._rewind = {name: tensor.clone() for name, tensor in self._trained().items()}
        if None in self._shares:
            method.choose(self.weights, self._shares, schedule.regrows)
            return False
        wanted = [schedule.sparsity(self.steps, share) for share in self._shares if share is not None]
        if None not in wanted and wanted:
            method.choose(self.weights, wanted, schedule.regrows)
        if not schedule.rewinds(self.steps):
            return False
        for name, tensor in self._trained().items():
            before = self._rewind.get(name)
            # What counts and observes may have another shape by now, or be there only since: it was not learned.
            if before is not None and before.shape == tensor.shape:
                tensor.copy_(_of_first_process(before))
        return True

    def _trained(self) -> dict[str, torch.Tensor]:
        """All parameters, and what norms have seen, by names that no parametrization changes."""
        parameters = {n: p for n, p in self._model.named_parameters() if not _MASK.search(n)}
        saved = self._model.state_dict()
        buffers = {n: b for n, b in self._model.named_buffers() if n in saved and not _MASK.search(n)}
        return {_ORIGINAL.sub(r"\1", name): tensor.detach() for name, tensor in {**parameters, **buffers}.items()}


def _of_first_process(tensor: torch.Tensor) -> torch.Tensor:
    """The first process's values: DistributedDataParallel has begun with these, whatever the others were made with."""
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        tensor = tensor.contiguous()
        distributed.broadcast(tensor, 0)
    return tensor

"""When masks are chosen, and how many zeros they have then. Steps are those of the optimizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from ..ir import UsageError


class Schedule(ABC):
    """How the share of zeros grows."""

    @abstractmethod
    def sparsity(self, step: int, final: float) -> float | None:
        """The share of zeros from after `step` steps on, 0 being before the first; None where masks stay as they are.

        Args:
            step: how many steps have been taken.
            final: the share in the end, 0 to 1.
        """

    @property
    @abstractmethod
    def last(self) -> int:
        """The step after which masks are chosen for the last time."""

    @property
    def regrows(self) -> bool:
        """Whether weights that are zero take part with the values they had when masks are chosen anew by norm."""
        return True

    def rewind_from(self) -> int | None:
        """The step to whose weights `rewinds` goes back; None where no weight is ever set back."""
        return None

    def rewinds(self, step: int) -> bool:
        """Whether the weights that stay are set back after `step` steps."""
        return False


@dataclass(frozen=True, slots=True)
class OneShot(Schedule):
    """All zeros at once, after `step` steps; the training that follows is fine-tuning."""

    step: int = 0

    def __post_init__(self) -> None:
        _at_least(0, "OneShot", step=self.step)

    def sparsity(self, step: int, final: float) -> float | None:
        return final if step == self.step else None

    @property
    def last(self) -> int:
        return self.step


@dataclass(frozen=True, slots=True)
class Gradual(Schedule):
    """s(t) = s_final (1 - (1 - (t - begin) / steps)^3) (Zhu & Gupta 2017, "To prune, or not to prune").

    Attributes:
        steps: from no zeros to all of them. A third to a half of the training leaves time to recover.
        begin: the first step after which there are zeros.
        updates: how often masks are chosen anew on the way.
    """

    steps: int
    begin: int = 0
    updates: int = 100

    def __post_init__(self) -> None:
        _at_least(1, "Gradual", steps=self.steps, updates=self.updates)
        _at_least(0, "Gradual", begin=self.begin)

    def sparsity(self, step: int, final: float) -> float | None:
        done = step - self.begin
        if not 0 < done <= self.steps:
            return None
        updates = min(self.updates, self.steps)
        if done * updates // self.steps == (done - 1) * updates // self.steps:
            return None
        return final * (1 - (1 - done / self.steps) ** 3)

    @property
    def last(self) -> int:
        return self.begin + self.steps


@dataclass(frozen=True, slots=True)
class Iterative(Schedule):
    """Train, prune, set the weights that stay back, and again (Frankle & Carbin 2019; Frankle et al. 2020).

    After round k of n the share of weights that stay is (1 - s_final)^(k/n); what is zero stays zero. After the last
    pruning training goes on for as long as the user's loop does.

    Attributes:
        rounds: how often is pruned.
        steps: of training before each pruning.
        rewind: the step to whose values all parameters go back at each pruning, 0 for those before training; None
            keeps them as they are (fine-tuning).
    """

    rounds: int
    steps: int
    rewind: int | None = 0

    def __post_init__(self) -> None:
        _at_least(1, "Iterative", rounds=self.rounds, steps=self.steps)
        _at_least(0, "Iterative", rewind=self.rewind or 0)
        if self.rewind is not None and self.rewind >= self.steps:
            raise UsageError(
                f"Iterative: rewind={self.rewind} must lie inside the first round of steps={self.steps} steps"
            )

    def sparsity(self, step: int, final: float) -> float | None:
        return 1 - (1 - final) ** (step / self.steps / self.rounds) if self._prunes(step) else None

    @property
    def last(self) -> int:
        return self.rounds * self.steps

    @property
    def regrows(self) -> bool:
        return False

    def rewind_from(self) -> int | None:
        return self.rewind

    def rewinds(self, step: int) -> bool:
        return self.rewind is not None and self._prunes(step)

    def _prunes(self, step: int) -> bool:
        return step > 0 and step % self.steps == 0 and step <= self.rounds * self.steps


def _at_least(least: int, schedule: str, **numbers: int) -> None:
    for name, number in numbers.items():
        if not isinstance(number, int) or isinstance(number, bool):
            raise UsageError(f"{schedule}: expected {name} as a whole number, got {number!r}")
        if number < least:
            raise UsageError(f"{schedule}: expected {name} of at least {least}, got {number}")

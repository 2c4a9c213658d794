"""Training of a chosen model, and whether that made it better."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...ir import SparsecError
from ..calibration import Trial, Weights
from ..healing import check_operators, make_trainer, with_vectors
from ..report import Healing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ...ir import Program
    from ..calibration import Samples
    from ..context import Context
    from ..formats import Form
    from ..healing import Healed, Limit
    from ..machine import Machine
    from .cache import Cache
    from .fitting import Chosen
    from .judge import Judge

    Forms = Mapping[str, Form]
    Rounding = Callable[[Forms, Mapping[str, Weights], Mapping[str, NDArray[np.float32]]], dict[str, Weights]]


@dataclass(frozen=True)
class Healer:
    """What training needs besides weights.

    Attributes:
        program: the dense model.
        samples: to train with.
        judge: on samples that nothing is fitted to.
        trial: runs the dense model.
        rounding: of weights to what they are stored as.
        cache: where the states of trainings are kept.
        machine, context: as everywhere.
    """

    program: Program
    samples: Samples
    judge: Judge
    trial: Trial
    rounding: Rounding
    cache: Cache
    machine: Machine
    context: Context

    def __post_init__(self) -> None:
        """Refuse what cannot be trained, and data that does not tell what training brings, before anything takes time.

        Raises:
            SparsecError: PyTorch or the device is missing, an operator has no mapping, or all the data is one run.
        """
        check_operators(self.program.model, self.context.config.heal_on)
        if not self.judge.holds_back:
            raise SparsecError(
                f"--heal: calibration data '{self.samples.name}' has one run, of which nothing can be held back to see "
                "what training brings: give more of it, or other data to judge by (--eval)"
            )

    def heal(self, chosen: Chosen, limit: Limit) -> Chosen:
        """The same masks with trained weights, biases and norms; or as it was, where they are no better.

        Raises:
            SparsecError: PyTorch does not compute the model as ONNX Runtime does.
        """
        config, dense = self.context.config, self.trial.feeds({})
        trainer = make_trainer(
            self.program, chosen.weights, self.samples, config.seed, config.thread_count, config.heal_on
        )
        trainer.check(lambda feeds: self.trial.run(feeds, dense))
        files = self.cache.training(trainer.begun)
        trained = trainer.train(limit, lambda healed: self._look(healed, chosen.forms), self.context.progress, files)
        healed = trained.healed
        program, weights = with_vectors(self.program, healed.vectors), self._rounded(healed, chosen.forms)
        error, value = self._compare(program, weights)
        better = self.judge.rank(error, value) > self.judge.rank(chosen.error, chosen.value)
        record = Healing(trained.steps, trained.seconds, self.samples.count, chosen.value, value, better, trained.note)
        if not better:
            return replace(chosen, healing=record)
        return replace(chosen, program=program, weights=weights, error=error, value=value, healing=record)

    def _look(self, healed: Healed, forms: Forms) -> tuple[tuple[float, ...], str]:
        """How good a state is, to compare it with others, and in words."""
        error, value = self._compare(with_vectors(self.program, healed.vectors), self._rounded(healed, forms))
        words = f"outputs differ by {error**0.5:.1%}" if value is None else f"{self.judge.metric.name} {value:.4g}"
        return self.judge.rank(error, value), words

    def _rounded(self, healed: Healed, forms: Forms) -> dict[str, Weights]:
        return self.rounding(forms, healed.weights, {name: new.matrix for name, new in healed.weights.items()})

    def _compare(self, program: Program, weights: Mapping[str, Weights]) -> tuple[float, float | None]:
        """As the judge does; with other biases and norms the model is another."""
        layers = [layer for layer in program.layers if layer.name in weights]
        trial = Trial(program, layers, self.machine, self.context.folder, watched=False)
        fed = trial.feeds(weights)
        return self.judge.compare(lambda feeds: trial.run(feeds, fed))

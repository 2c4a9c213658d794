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
    from ...ir import Program
    from ..calibration import Samples
    from ..context import Context
    from ..healing import Healed, Limit
    from ..machine import Machine
    from .cache import Cache
    from .judge import Judge
    from .sensitivity import Model

    # From weights to what is stored of them.
    Rounding = Callable[[dict[str, Weights]], dict[str, Weights]]


# Fewer samples than this say little of training: the best of ten states on so few is the best by chance.
FEW = 20


@dataclass(frozen=True, eq=False)
class Judged:
    """Weights, and what becomes of the outputs with them on the data that was held back.

    Attributes:
        program: the dense model, after training with other biases and norms.
        weights: by layer name.
        error: relative squared error of the outputs.
        value: the metric; None where the outputs are nothing that has one.
        healing: what training did, if there was any.
    """

    program: Program
    weights: dict[str, Weights]
    error: float
    value: float | None
    healing: Healing | None = None


@dataclass(frozen=True)
class Healer:
    """What training needs besides weights.

    Attributes:
        program: the dense model.
        samples: to train with.
        judge: on samples that nothing is fitted to.
        cache: where the states of trainings are kept.
        machine, context: as everywhere.
    """

    program: Program
    samples: Samples
    judge: Judge
    cache: Cache
    machine: Machine
    context: Context

    def __post_init__(self) -> None:
        """Refuse what cannot be trained, and data that does not tell what training brings, before anything takes time.

        Raises:
            SparsecError: an operator has no mapping, or all the data is one run.
        """
        check_operators(self.program.model)
        if not self.judge.holds_back:
            raise SparsecError(
                f"--heal: calibration data '{self.samples.name}' has one run, of which nothing can be held back to see "
                "what training brings: give more of it, or other data to judge by (--eval)"
            )

    def heal(self, before: Judged, limit: Limit, rounding: Rounding = dict) -> Judged:
        """The same zeros with trained weights, biases and norms; or as it was, where they are no better.

        Raises:
            SparsecError: PyTorch does not compute the model as ONNX Runtime does.
        """
        config = self.context.config
        trainer = make_trainer(
            self.program, before.weights, self.samples, config.seed, config.thread_count, config.heal_on
        )
        trainer.check(self._model(self.program, {}))
        files = self.cache.training(trainer.begun)
        trained = trainer.train(limit, lambda healed: self._look(healed, rounding), self.context.progress, files)
        after = self._judged(trained.healed, rounding)
        better = self.judge.rank(before.error, before.value) < self.judge.rank(after.error, after.value)
        values = before.value, after.value
        record = Healing(
            trained.steps, trained.seconds, self.samples.count, *values, better, trained.note, *trained.resumed
        )
        return replace(after if better else before, healing=record)

    @staticmethod
    def notes(judge: Judge) -> tuple[str, ...]:
        """What a user who trains should know of the data that training is judged by."""
        if judge.count >= FEW:
            return ()
        few = "1 sample" if judge.count == 1 else f"{judge.count} samples"
        return (
            f"--heal: training is judged, and its best state chosen, by only {few} that no weight is fitted to: that "
            f"says little. Give more data, of which a fifth is held back, or other data to judge by (--eval): at least "
            f"{FEW} samples.",
        )

    def _look(self, healed: Healed, rounding: Rounding) -> tuple[tuple[float, ...], str]:
        """How good a state is, to compare it with others, and in words."""
        found = self._judged(healed, rounding)
        error, value = found.error, found.value
        words = f"outputs differ by {error**0.5:.1%}" if value is None else f"{self.judge.metric.name} {value:.4g}"
        return self.judge.rank(error, value), words

    def _judged(self, healed: Healed, rounding: Rounding) -> Judged:
        """With other biases and norms the model is another."""
        program, weights = with_vectors(self.program, healed.vectors), rounding(healed.weights)
        return Judged(program, weights, *self.judge.compare(self._model(program, weights)))

    def _model(self, program: Program, weights: Mapping[str, Weights]) -> Model:
        layers = [layer for layer in program.layers if layer.name in weights]
        trial = Trial(program, layers, self.machine, self.context.folder, watched=False)
        fed = trial.feeds(weights)
        return lambda feeds: trial.run(feeds, fed)

"""Distillation: the pruned model is trained to do what the dense one does."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ...ir import SparsecError
from .batches import Batches
from .check import check, epsilon_of
from .losses import distance, relative_error, task_loss
from .state import digest, read_state, write_state
from .student import Student

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from ...ir import Program
    from ..calibration import Samples, Weights
    from ..context import Progress
    from .batches import Batch, Tensors
    from .check import Model
    from .healed import Healed
    from .limit import Limit
    from .network import Network
    from .ops import Tensor

    # What the judge says of a student, the larger the better, and in words.
    Score = tuple[float, ...]
    Judge = Callable[[Healed], tuple[Score, str]]

# Samples a step, fewer where what is kept for their gradients would take more than so many bytes.
BATCH, BYTES = 64, 2**30
# Step size, as a share of the root mean square of what is trained; of what is nearly zero, as if that were `LEAST`.
RATE, LEAST = 0.01, 1e-2
# Share of the limit in which the step size rises; it then falls as a cosine.
WARM_UP = 0.02
# The norm that gradients are cut to.
CLIP = 1.0
# What the hidden layers' mean error and the labels' loss weigh, where the outputs' error weighs 1.
HIDDEN, LABELS = 1.0, 0.5
# How often the student is judged, and how often in a row it may be no better before it is given up.
LOOKS, PATIENCE = 10, 7
# Of how many shapes the number check takes samples, and how many.
SHAPES, CHECKED = 4, 8


@dataclass(frozen=True)
class Trained:
    """The best that training found.

    Attributes:
        healed: the weights; those it began with where none were better.
        steps, seconds: what it took, earlier runs included.
        note: why it ended before the limit, or "".
        resumed: steps and seconds of earlier runs.
    """

    healed: Healed
    steps: int
    seconds: float
    note: str
    resumed: tuple[int, float] = (0, 0.0)


@dataclass
class State:
    """Where training stands.

    Attributes:
        best, score: the parameters that were judged best, and how.
        worse: how often in a row they have been no better since.
        steps, seconds: so far, those of earlier runs included.
        epoch, batch: the next.
        resumed: the steps and seconds that earlier runs took.
    """

    best: Tensors
    score: Score
    worse: int = 0
    steps: int = 0
    seconds: float = 0.0
    epoch: int = 0
    batch: int = 0
    resumed: tuple[int, float] = (0, 0.0)


class Trainer:
    """A student and the data that it learns from.

    Attributes:
        student: as it was made, or as training left it.
        begun: a digest of what training begins with.
    """

    def __init__(
        self, program: Program, weights: Mapping[str, Weights], samples: Samples, seed: int, threads: int, device: str
    ) -> None:
        """Convert the model; the arguments are those of `make_trainer`."""
        self._seed, self._threads, self._batches, self._device = seed, threads, Batches(samples), device
        self.student = Student(program, weights, device)
        self._epsilon = epsilon_of(program.model)
        self.begun = digest(self._seed, self.student.teacher, self.student.parameters)
        self._wanted = list(dict.fromkeys((*self.student.outputs, *self.student.hidden)))
        feeds = {name: torch.from_numpy(array) for name, array in self._batches.first(1)[0].feeds()[0].items()}
        kept = self.student.network.nbytes({**feeds, **self.student.teacher})
        self._size = max(1, min(BATCH, BYTES // max(kept, 1)))

    def check(self, dense: Model) -> None:
        """Compare with ONNX Runtime on some of the data.

        Args:
            dense: the model there, from one run's feeds to outputs by name.

        Raises:
            SparsecError: they differ.
        """
        exact = self.student.in_float64()
        for batch in self._batches.first(CHECKED)[:SHAPES]:
            check(self._dense(self.student.network), self._dense(exact), dense, batch, self._epsilon)

    def train(self, limit: Limit, judge: Judge, progress: Progress, files: tuple[Path, Path] | None) -> Trained:
        """Train until the limit is spent, counting what was spent before; the best state is what counts.

        Args:
            limit: time, in which judging is included, or steps.
            judge: looks at the student now and then.
            progress: is told each hundredth of the limit.
            files: where the state of an earlier run may be, and where this one's is left.

        Raises:
            SparsecError: a gradient cannot be computed.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            return self._train(limit, judge, progress, files)
        finally:
            torch.set_num_threads(threads)

    def _train(self, limit: Limit, judge: Judge, progress: Progress, files: tuple[Path, Path] | None) -> Trained:
        optimizer = torch.optim.Adam(self._groups())
        rates = [group["lr"] for group in optimizer.param_groups]
        state = self._begin(optimizer, judge, files)
        before, start, note, words = state.seconds, time.perf_counter(), "", ""
        progress.start("healing", 100)
        told, looked = 0, int(LOOKS * limit.spent(state.steps, state.seconds))
        batches = self._endless(state)
        while limit.spent(state.steps, state.seconds) < 1 and not note:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * _factor(limit.spent(state.steps + 0.5, state.seconds))
            if not self._step(optimizer, next(batches)):
                note = f"the loss was no number any more at step {state.steps + 1}"
            state.steps += 1
            state.seconds = before + time.perf_counter() - start
            spent = limit.spent(state.steps, state.seconds)
            if not note and int(LOOKS * spent) > looked:
                looked = int(LOOKS * spent)
                words = self._look(state, judge)
                note = f"the last {PATIENCE} states were no better than one before" if state.worse >= PATIENCE else ""
                if files is not None:
                    self._keep(state, optimizer, files[1])
            while told < min(100, int(100 * spent)):
                told += 1
                progress.advance(words)
        self._put(state.best)
        if files is not None:
            self._keep(state, optimizer, files[1])
        return Trained(self.student.healed(), state.steps, state.seconds, note, state.resumed)

    def _dense(self, network: Network) -> Callable[[Tensors], Tensors]:
        return lambda inputs: network({**inputs, **self.student.teacher}, self.student.outputs)

    def _groups(self) -> list[dict[str, Any]]:
        """What is trained, each tensor with its own step size."""
        groups = []
        for name, parameter in self.student.parameters.items():
            kept = parameter.detach()[self.student.masks[name]] if name in self.student.masks else parameter.detach()
            size = float(torch.square(kept).mean().sqrt()) if kept.numel() else 0.0
            groups.append({"params": [parameter], "lr": RATE * max(size, LEAST)})
        return groups

    def _endless(self, state: State) -> Iterator[Batch]:
        """Mini-batches from where `state` stands, which they move on."""
        while True:
            for number, batch in enumerate(self._batches.epoch(self._size, (self._seed, state.epoch))):
                if number >= state.batch:
                    state.batch = number + 1
                    yield batch
            state.epoch, state.batch = state.epoch + 1, 0

    def _step(self, optimizer: torch.optim.Optimizer, batch: Batch) -> bool:
        """One step; False, and nothing changed, where a gradient is no number."""
        optimizer.zero_grad()
        try:
            self._loss(batch).backward()
        except RuntimeError as error:
            words = " ".join(str(error).split())[:300]
            raise SparsecError(f"--heal: PyTorch cannot train this model ({words}). Leave --heal out") from error
        student = self.student
        for name, mask in student.masks.items():
            if student.parameters[name].grad is not None:
                student.parameters[name].grad.mul_(mask)
        norm = torch.nn.utils.clip_grad_norm_(list(student.parameters.values()), CLIP)
        if not torch.isfinite(norm):
            return False
        optimizer.step()
        return True

    def _loss(self, batch: Batch) -> Tensor:
        student, network = self.student, self.student.network
        with torch.no_grad():
            targets = batch.run(lambda inputs: network({**inputs, **student.teacher}, self._wanted))
        found = batch.run(lambda inputs: network({**inputs, **student.parameters}, self._wanted))
        keep, labels = (None if x is None else x.to(self._device) for x in (batch.keep, batch.labels))
        outputs = [distance(found[name], targets[name], keep) for name in student.outputs]
        hidden = [relative_error(found[name], targets[name], keep) for name in student.hidden]
        loss = sum(outputs) / len(outputs) + HIDDEN * sum(hidden) / len(hidden)
        task = None if labels is None else task_loss(found[student.outputs[0]], labels)
        return loss if task is None else loss + LABELS * task

    def _look(self, state: State, judge: Judge) -> str:
        """Have the student judged, and keep it where it is the best so far; what the judge says."""
        score, words = judge(self.student.healed())
        if score > state.score:
            state.best, state.score, state.worse = self._taken(), score, 0
        else:
            state.worse += 1
        return words

    def _begin(self, optimizer: torch.optim.Optimizer, judge: Judge, files: tuple[Path, Path] | None) -> State:
        """The state in the first of `files` if it is one of this student, else a new one, judged."""
        old = None if files is None else read_state(files[0], self.begun)
        if old is None or files is None:
            return State(best=self._taken(), score=judge(self.student.healed())[0])
        # The best state is judged again: the metric may be another.
        self._put(old["best"])
        score = judge(self.student.healed())[0]
        self._put(old.pop("parameters"))
        optimizer.load_state_dict(old.pop("optimizer"))
        if files[0] != files[1]:  # else this run has left it there, when it tried the same point for a shorter time
            old["resumed"] = old["steps"], old["seconds"]
        return State(**{**old, "score": score, "worse": 0})

    def _keep(self, state: State, optimizer: torch.optim.Optimizer, file: Path) -> None:
        more = {"parameters": self._taken(), "optimizer": optimizer.state_dict()}
        write_state(file, self.begun, vars(state) | more)

    def _taken(self) -> Tensors:
        return {name: parameter.detach().clone() for name, parameter in self.student.parameters.items()}

    def _put(self, values: Tensors) -> None:
        with torch.no_grad():
            for name, parameter in self.student.parameters.items():
                parameter.copy_(values[name])


def _factor(spent: float) -> float:
    """Of the step size, at this share of the limit."""
    return min(1.0, spent / WARM_UP) * 0.5 * (1 + math.cos(math.pi * min(spent, 1.0)))

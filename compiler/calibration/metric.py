"""What a model is judged by: measures of the field, or a user's function; against labels or against the dense model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...ir import SparsecError, UsageError
from .function import load_function, names_function, words

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]
    Floats = NDArray[np.float64]
    # By output, what was found and what was expected: [samples, numbers] each.
    Pairs = dict[str, tuple[Floats, Floats]]

NAMES = ("top1", "top5", "mse", "cosine", "spearman", "perplexity")
# A cross entropy whose exponential is still a finite number, which no limit allows.
_WORST = 700.0
# Rows of logits that are looked at together: a vocabulary has 100,000 words.
_CHUNK = 256


class _Misfit(Exception):  # noqa: N818  # never leaves this file: `Metric.score` says it with the metric's name
    """Why a metric cannot be computed."""


@dataclass(frozen=True, eq=False, slots=True)
class Run:
    """One run of a model.

    Attributes:
        feeds: its inputs by name.
        outputs: its outputs by name, in the model's order.
        dense: the dense model's outputs for the same inputs; needed by metrics with `reference`.
        labels: [samples, ...], or None.
    """

    feeds: Mapping[str, Array]
    outputs: Mapping[str, Any]
    dense: Mapping[str, Any] | None = None
    labels: Array | None = None


@dataclass(frozen=True, slots=True)
class Metric:
    """A measure of a model over runs.

    Attributes:
        name: as the user wrote it.
        higher_is_better: otherwise a lower value is.
        needs_labels: every run must have labels.
        reference: every run must have the dense model's outputs, which stand for the labels.
        compute: the value over all runs, in one pass.
    """

    name: str
    higher_is_better: bool
    needs_labels: bool
    reference: bool
    compute: Callable[[Iterable[Run]], float]

    def score(self, runs: Iterable[Run]) -> float:
        """The value over `runs`, which may be a generator: only a user's function needs them all at once.

        Raises:
            SparsecError: the outputs or labels are not what the metric needs, it failed, or its value is not finite.
        """
        try:
            with np.errstate(all="ignore"):  # what is not finite is refused below
                value = self.compute(self._complete(runs))
        except _Misfit as misfit:
            raise SparsecError(f"metric '{self.name}': {misfit}") from misfit.__cause__
        if not math.isfinite(value):
            raise SparsecError(
                f"metric '{self.name}' is {value}, no finite number: the outputs that it compares have infinite or "
                "very large values; check them, or choose another metric"
            )
        return value

    def _complete(self, runs: Iterable[Run]) -> Iterator[Run]:
        seen = False
        for run in runs:
            if self.needs_labels and run.labels is None:
                raise _Misfit("it needs labels, and there are none: give one label a sample, as an array 'labels'")
            if self.reference and run.dense is None:
                raise _Misfit("it compares with the dense model's outputs, and there are none")
            seen = True
            yield run
        if not seen:
            raise _Misfit("there is no sample to compute it of")

    def drop(self, dense: float, value: float) -> tuple[float, float]:
        """How much worse `value` is than `dense`: the difference, and its share of `dense`; negative where better.

        A metric that is 0 for the dense model has no share of it: both numbers are the difference.
        """
        lost = dense - value if self.higher_is_better else value - dense
        return lost, lost / abs(dense) if dense else lost


@dataclass(frozen=True, slots=True)
class Drop:
    """How much worse a metric may become; as text what the user wrote.

    Attributes:
        amount: a difference of the metric, or a share of the dense model's value.
        relative: whether it is the latter. Where that value is 0 (mse without labels), 1% allows a difference of 0.01.
    """

    amount: float
    relative: bool

    def __str__(self) -> str:
        return f"{100 * self.amount:.10g}%" if self.relative else f"{self.amount:.10g}"

    def allows(self, metric: Metric, dense: float, value: float) -> bool:
        """Whether `value` is at most this much worse than the dense model's."""
        difference, share = metric.drop(dense, value)
        # 0.76 - 0.75 is more than 0.01 in floats.
        if self.relative:
            return share <= self.amount + 1e-9
        return difference <= self.amount + 1e-9 * max(1.0, abs(dense))


def parse_drop(text: str) -> Drop:
    """`1%` as a share of the dense model's value, `0.01` as a difference of the metric.

    Raises:
        UsageError: it is no number of 0 or more.
    """
    number, percent = text.strip(), False
    if number.endswith("%"):
        number, percent = number[:-1], True
    try:
        amount = float(number)
    except ValueError:
        amount = math.nan
    if not (0 <= amount < math.inf):
        raise UsageError(
            f"--max-drop {text}: expected a share of the dense model's value, such as 1%, or a difference of the "
            "metric, such as 0.01"
        )
    return Drop(amount / 100 if percent else amount, percent)


def find_metric(source: str | Callable[..., Any] | Metric, labelled: bool) -> Metric:
    """The metric that `source` names, against labels where there are some, else against the dense model's outputs.

    Args:
        source: one of `NAMES`; "FILE.py:FUNCTION" or "package.module:FUNCTION"; a function; or a metric, as it is. A
            function is called with outputs and feeds, both dictionaries of lists of arrays (one a run, as runs may
            differ in shape), and labels between the two: one array of all samples, a list of one a run where their
            shapes do not stack, or None. It returns a number; an attribute `higher_is_better` of it may be False.
        labelled: whether the runs will have labels.

    Raises:
        UsageError: there is no such metric, or it is perplexity without labels.
        SparsecError: the function cannot be loaded.
    """
    if isinstance(source, Metric):
        return source
    if callable(source):
        return _own(source, getattr(source, "__name__", type(source).__name__))
    if source in NAMES:
        return _build(source, labelled)
    if isinstance(source, str) and names_function(source):
        return _own(load_function(source, "metric"), source)
    raise UsageError(f"--metric {source}: expected {', '.join(NAMES)}, FILE.py:FUNCTION or MODULE:FUNCTION")


def default_metric(labels: Array | None, outputs: Mapping[str, Any]) -> Metric:
    """What to judge a model by where nothing was said, from the labels and outputs of one run.

    Integer labels [N] and classes [N, C]: top1; integers [N, T] and logits [N, T, V]: perplexity; one number a sample
    in both: spearman; labels of the output's shape: mse; no labels: cosine.

    Raises:
        UsageError: no metric is for such labels and outputs.
        SparsecError: the outputs are no floats, or NaN.
    """
    if labels is None:
        return _build("cosine", False)
    try:
        name, output = _first(outputs)
    except _Misfit as misfit:
        raise SparsecError(f"no metric can be chosen for the labels: {misfit}") from None
    have, want = _squeezed(labels).shape, _squeezed(output).shape
    whole = labels.dtype.kind in "iu"
    if have == want:
        return _build("spearman" if len(have) == 1 else "mse", True)
    if whole and have == want[:-1]:
        return _build("top1" if len(have) == 1 else "perplexity", True)
    raise UsageError(
        f"no metric is for labels of {labels.dtype}{list(labels.shape)} and the output '{name}' {list(output.shape)}: "
        "name one (--metric), such as FILE.py:FUNCTION"
    )


def _build(name: str, labelled: bool) -> Metric:
    """One of `NAMES`."""
    if name == "perplexity" and not labelled:
        # Against the dense model's own choices a model that is merely more certain would seem better than the dense.
        raise UsageError(
            "--metric perplexity needs labels [N, T], the token that each position should tell (a causal model's are "
            "its input shifted by one; negative ones do not count): give them as an array 'labels', or take top1, "
            "which without labels is the share of tokens that the dense model would choose too"
        )
    pairs = _with_labels if labelled else _with_dense
    compute: dict[str, Callable[[Iterable[Run]], float]] = {
        "top1": lambda runs: _top(runs, 1, not labelled),
        "top5": lambda runs: _top(runs, 5, not labelled),
        "mse": _squared_error if labelled else _relative_error,
        "cosine": lambda runs: _similarity(map(pairs, runs), _cosines),
        "spearman": _order if labelled else lambda runs: _similarity(map(pairs, runs), _rank_correlations),
        "perplexity": _perplexity,
    }
    return Metric(name, name not in ("mse", "perplexity"), labelled, not labelled, compute[name])


# ---- Classes and tokens ----


def _top(runs: Iterable[Run], k: int, reference: bool) -> float:
    """The share of samples (tokens) whose label is among the `k` highest of [N, C] ([N, T, C]); of ties the first."""
    hits = total = 0
    for run in runs:
        scores, targets = _scored(run, reference)
        if scores.shape[1] <= k > 1:
            raise _Misfit(f"of {scores.shape[1]} classes the label is always among the top {k}; take top1")
        for part, target in _chunks(scores, targets):
            own = np.take_along_axis(part, target[:, None], 1)
            before = np.arange(part.shape[1]) < target[:, None]
            hits += int((((part > own) | ((part == own) & before)).sum(1) < k).sum())
        total += len(targets)
    return hits / _counted(total)


def _perplexity(runs: Iterable[Run]) -> float:
    """The exponential of the mean cross entropy of labels [N, T] and logits [N, T, V], or [N] and [N, V].

    Nothing is shifted: a label is what its own position should tell.
    """
    lost, total = 0.0, 0
    for run in runs:
        scores, targets = _scored(run, False)
        for part, target in _chunks(scores, targets):
            lost -= float(_log_shares(part.astype(np.float64))[np.arange(len(part)), target].sum())
        total += len(targets)
    return math.exp(min(lost / _counted(total), _WORST))


def _log_shares(scores: Floats) -> Floats:
    """Logarithms of probabilities [M, V]: of logits by softmax; outputs that are probabilities already as they are."""
    if (scores >= 0).all() and np.abs(scores.sum(1) - 1).max() < 1e-2:
        return np.asarray(np.log(scores))
    shifted = scores - scores.max(1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))


def _scored(run: Run, reference: bool) -> tuple[Array, Array]:
    """Scores [M, classes] and labels [M] of all samples or tokens of a run whose label is not negative."""
    name, scores = _first(run.outputs)
    scores = _squeezed(scores)
    if scores.ndim not in (2, 3):
        raise _Misfit(
            f"it needs an output [N, classes] or [N, tokens, classes]; the first of floats, '{name}', is "
            f"{list(run.outputs[name].shape)}"
        )
    if reference:
        assert run.dense is not None
        targets = _squeezed(_first(run.dense, "the dense model's output")[1]).argmax(-1)
    else:
        assert run.labels is not None
        targets = _squeezed(run.labels)
        if targets.dtype.kind not in "iu":
            raise _Misfit(f"labels must be integers, the numbers of classes; these are {targets.dtype}")
    if targets.shape != scores.shape[:-1]:
        raise _Misfit(
            f"labels are {list(targets.shape)}, and the output '{name}' {list(scores.shape)} needs "
            f"{list(scores.shape[:-1])}"
        )
    scores, targets = scores.reshape(-1, scores.shape[-1]), targets.reshape(-1)
    if targets.max(initial=0) >= scores.shape[1]:
        raise _Misfit(
            f"there is a label {targets.max()}, and the output '{name}' has the classes 0 to {scores.shape[1] - 1}"
        )
    counts = targets >= 0
    return (scores, targets) if counts.all() else (scores[counts], targets[counts])


def _chunks(scores: Array, targets: Array) -> Iterator[tuple[Array, Array]]:
    for start in range(0, len(targets), _CHUNK):
        yield scores[start : start + _CHUNK], targets[start : start + _CHUNK]


def _counted(total: int) -> int:
    if not total:
        raise _Misfit("no label counts: all are negative")
    return total


# ---- Numbers ----


def _squared_error(runs: Iterable[Run]) -> float:
    """The mean of squared differences from the labels."""
    lost, total = 0.0, 0
    for run in runs:
        for found, expected in _with_labels(run).values():
            lost += float(np.square(found - expected).sum())
            total += found.size
    return lost / max(total, 1)


def _relative_error(runs: Iterable[Run]) -> float:
    """Squared differences over the squares of the dense outputs, each summed over all runs; the mean of the outputs.

    An output that is 0 throughout in the dense model counts 0 where it stays so, else 1.
    """
    lost: dict[str, float] = {}
    power: dict[str, float] = {}
    for run in runs:
        for name, (found, expected) in _with_dense(run).items():
            lost[name] = lost.get(name, 0.0) + float(np.square(found - expected).sum())
            power[name] = power.get(name, 0.0) + float(np.square(expected).sum())
    errors = [lost[name] / power[name] if power[name] else float(lost[name] > 0) for name in lost]
    return sum(errors) / len(errors)


def _similarity(pairs: Iterable[Pairs], of: Callable[[Floats, Floats], Floats]) -> float:
    """The mean over outputs of the mean over samples of a similarity of rows.

    Where a sample has only one number, which is similar to any other, all samples together are one row.
    """
    values: dict[str, list[Floats]] = {}
    numbers: dict[str, list[tuple[Floats, Floats]]] = {}
    for pair in pairs:
        for name, (found, expected) in pair.items():
            if found.shape[1] == 1:
                numbers.setdefault(name, []).append((found, expected))
            elif found.size:
                values.setdefault(name, []).append(of(found, expected))
    for name, parts in numbers.items():
        found, expected = (np.concatenate(side).reshape(1, -1) for side in zip(*parts, strict=True))
        values.setdefault(name, []).append(of(found, expected))
    if not values:
        raise _Misfit("the outputs are empty")
    return float(np.mean([np.concatenate(parts).mean() for parts in values.values()]))


def _cosines(found: Floats, expected: Floats) -> Floats:
    """[N]: of rows that are 0, 1 where both are, else 0."""
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    same = ~(found.any(1) | expected.any(1))
    cosines = np.clip((found * expected).sum(1) / lengths, -1, 1)
    return np.where(lengths == 0, same.astype(np.float64), cosines)


def _order(runs: Iterable[Run]) -> float:
    """Spearman's coefficient of all samples' outputs and labels, one number each."""

    def correlations(found: Floats, expected: Floats) -> Floats:
        if expected.size > 1 and np.ptp(expected) == 0:
            raise _Misfit(f"all labels are {expected.flat[0]:g}, which puts the samples in no order")
        return _rank_correlations(found, expected)

    return _similarity(map(_numbers, runs), correlations)


def _rank_correlations(found: Floats, expected: Floats) -> Floats:
    """[N]: Spearman's coefficient, with the mean rank for ties; of rows without order 1 where both are, else 0."""
    if found.shape[1] < 2:
        raise _Misfit("an order needs two samples or more")
    return np.array([_rank_correlation(a, b) for a, b in zip(found, expected, strict=True)])


def _rank_correlation(found: Floats, expected: Floats) -> float:
    a, b = (ranks - ranks.mean() for ranks in (_ranks(found), _ranks(expected)))
    lengths = math.sqrt(float(a @ a) * float(b @ b))
    if not lengths:
        return float(not a.any() and not b.any())
    return max(-1.0, min(1.0, float(a @ b) / lengths))


def _ranks(values: Floats) -> Floats:
    """1 for the lowest; those that are equal share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse], dtype=np.float64)


# ---- What is compared ----


def _with_labels(run: Run) -> Pairs:
    """The first output of floats and the labels, which have its shape."""
    assert run.labels is not None
    name, output = _first(run.outputs)
    if _squeezed(output).shape != _squeezed(run.labels).shape:
        raise _Misfit(
            f"labels are {list(run.labels.shape)}, and the output '{name}' is {list(output.shape)}: it needs labels of "
            "the output's shape"
        )
    if run.labels.dtype.kind == "f" and not np.isfinite(run.labels).all():
        raise _Misfit("labels have NaN or infinite values")
    return {name: (_flat(output), _flat(run.labels))}


def _numbers(run: Run) -> Pairs:
    """As `_with_labels`, where each sample has one number."""
    pairs = _with_labels(run)
    for name, (found, _) in pairs.items():
        if found.shape[1] != 1:
            raise _Misfit(
                f"with labels it needs an output of one number a sample; '{name}' is {list(run.outputs[name].shape)}"
            )
    return pairs


def _with_dense(run: Run) -> Pairs:
    """All outputs of floats, and the dense model's."""
    assert run.dense is not None
    found, expected = _floats(run.outputs), _floats(run.dense, "the dense model's output")
    for name, dense in expected.items():
        if name not in found or found[name].shape != dense.shape:
            shape = list(found[name].shape) if name in found else "missing"
            raise _Misfit(f"the output '{name}' is {shape}, and the dense model's is {list(dense.shape)}")
    return {name: (_flat(found[name]), _flat(dense)) for name, dense in expected.items()}


def _first(outputs: Mapping[str, Any], what: str = "the output") -> tuple[str, Array]:
    """The first output of floats."""
    return next(iter(_floats(outputs, what).items()))


def _floats(outputs: Mapping[str, Any], what: str = "the output") -> dict[str, Array]:
    """Outputs of floats, of which there is one at least."""
    found = {n: array for n, array in outputs.items() if isinstance(array, np.ndarray) and array.dtype.kind == "f"}
    if not found:
        raise _Misfit(f"it needs an output of floats, and the model has none (outputs: {', '.join(outputs)})")
    for name, array in found.items():
        if np.isnan(array).any():
            raise _Misfit(f"{what} '{name}' has NaN values")
    return found


def _squeezed(array: Array) -> Array:
    """[N, ...] without axes of size 1 after the first."""
    return array.reshape(array.shape[:1] + tuple(size for size in array.shape[1:] if size != 1))


def _flat(array: Array) -> Floats:
    """[samples, numbers] float64; a scalar is [1, 1]."""
    return array.astype(np.float64).reshape(len(array) if array.ndim else 1, -1)


# ---- A user's ----


def _own(function: Callable[..., Any], name: str) -> Metric:
    """The metric that a user's function computes."""
    higher = getattr(function, "higher_is_better", True)
    if not isinstance(higher, bool):
        raise SparsecError(f"metric '{name}': its higher_is_better is {higher!r}, expected True or False")
    return Metric(name, higher, needs_labels=False, reference=False, compute=lambda runs: _call(function, list(runs)))


def _call(function: Callable[..., Any], runs: Sequence[Run]) -> float:
    outputs, feeds = _listed([run.outputs for run in runs]), _listed([run.feeds for run in runs])
    labels = _joined([run.labels for run in runs if run.labels is not None])
    try:
        value = function(outputs, labels, feeds)
    except Exception as error:  # whatever a user's function may raise
        raise _Misfit(
            f"it failed ({words(error)}); it was called with outputs of {sorted(outputs)}, labels of "
            f"{_described(labels)} and feeds of {sorted(feeds)}, a list of {len(runs)} arrays by each name: "
            "correct the function"
        ) from error
    try:
        number = float(value)
    except Exception as error:
        raise _Misfit(
            f"it returned a value of type {type(value).__name__} ({words(error)}), expected one number"
        ) from error
    if not math.isfinite(number):
        raise _Misfit(f"it returned {number}, expected a finite number; correct the function, or check the outputs")
    return number


def _listed(dictionaries: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    return {name: [one[name] for one in dictionaries] for name in dictionaries[0]} if dictionaries else {}


def _joined(labels: list[Array]) -> Array | list[Array] | None:
    if not labels:
        return None
    stack = len({array.shape[1:] for array in labels}) == 1
    return np.concatenate(labels) if stack else labels


def _described(labels: Array | list[Array] | None) -> str:
    if isinstance(labels, np.ndarray):
        return f"{labels.dtype}{list(labels.shape)}"
    return "None" if labels is None else f"{len(labels)} runs"

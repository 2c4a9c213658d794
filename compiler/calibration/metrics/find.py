"""Which metric a name, a function or the data at hand means."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ....ir import SparsecError, UsageError
from ..function import load_function, names_function
from .classes import perplexity, top
from .compared import first, squeezed, with_dense, with_labels
from .metric import Metric, Misfit
from .numbers import cosines, order, rank_correlations, relative_error, similarity, squared_error
from .own import own

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .metric import Run

    Array = NDArray[Any]

NAMES = ("top1", "top5", "mse", "cosine", "spearman", "perplexity")


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
    check_metric(source)
    if isinstance(source, Metric):
        return source
    if callable(source):
        return own(source, getattr(source, "__name__", type(source).__name__))
    if source in NAMES:
        return _build(source, labelled)
    return own(load_function(source, "metric"), source)


def check_metric(source: Any) -> None:
    """Whether `source` is of a form that `find_metric` knows; no file is opened, so a function may yet be missing.

    Raises:
        UsageError: it is not.
    """
    if isinstance(source, Metric) or callable(source) or source in NAMES:
        return
    if not (isinstance(source, str) and names_function(source)):
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
        name, output = first(outputs)
    except Misfit as misfit:
        raise SparsecError(f"no metric can be chosen for the labels: {misfit}") from None
    have, want = squeezed(labels).shape, squeezed(output).shape
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
    pairs = with_labels if labelled else with_dense
    compute: dict[str, Callable[[Iterable[Run]], float]] = {
        "top1": lambda runs: top(runs, 1, not labelled),
        "top5": lambda runs: top(runs, 5, not labelled),
        "mse": squared_error if labelled else relative_error,
        "cosine": lambda runs: similarity(map(pairs, runs), cosines),
        "spearman": order if labelled else lambda runs: similarity(map(pairs, runs), rank_correlations),
        "perplexity": perplexity,
    }
    return Metric(name, name not in ("mse", "perplexity"), labelled, not labelled, compute[name])

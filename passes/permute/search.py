"""Orders of channels that bring saliency together in blocks: `search` for one dimension, `search_all` for several.

Blocks are cut on a grid, so which channels stand side by side decides how much a pattern keeps. The best order is a
clustering into groups of equal size, which is hard; what is done here is Tetris' alternation (Ji et al., NeurIPS 2018,
"TETRIS: TilE-matching the TRemendous Irregular Sparsity") from the best of several starts. With the mask held, what a
channel would keep in each place is known and an exchange of places is worth a sum of four numbers; with the order held,
the best mask is the pattern's projection. Neither loses anything, so it ends. The mask is soft at first, a sigmoid
around the score of the last block that is kept (Rose 1998, "Deterministic annealing"): channels pass from group to
group before the groups have settled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from ...ir import SparsecError
from ..channels import Dimension
from .exchange import exchange
from .orders import layer_orders
from .starts import STARTS
from .views import View, views

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...ir import BlockPattern

    Scores: TypeAlias = Mapping[str, NDArray[np.float64]]
    Orders: TypeAlias = Mapping[Dimension, NDArray[np.int64]]

# Softness of the mask in the first steps; then it is hard, for so many steps at most.
SOFTNESS = (0.3, 0.15, 0.07)
MOST_STEPS = 16
# A gain below this share is none.
LEAST_GAIN = 1e-9
# Visits of each dimension at most, and the gain for which its neighbours are visited again.
MOST_VISITS = 4
LEAST_GAIN_AGAIN = 1e-3


def search(
    dimension: Dimension, scores: Scores, pattern: BlockPattern, density: float, seed: int = 0
) -> NDArray[np.int64]:
    """An order of the channels that raises what `pattern` keeps of the scores of all layers they lie in.

    Args:
        dimension: the channels.
        scores: of each layer by its name the saliency [out, in] float64, none below 0; places in other layers are
            passed over. The sum over layers counts: scale them where one must not outweigh the others.
        pattern: the blocks.
        density: the share of each layer's weights to keep.
        seed: of the directions that the channels are first split along.

    Returns:
        [size] int64: new channel i is now channel order[i]. It keeps no less than the present order, which it is where
        nothing better was found. The same input and seed give the same order.

    Raises:
        SparsecError: scores do not fit the dimension, or one is negative or not finite.
    """
    return search_all((dimension,), scores, pattern, density, seed)[dimension]


def search_all(
    dimensions: Sequence[Dimension], scores: Scores, pattern: BlockPattern, density: float, seed: int = 0
) -> dict[Dimension, NDArray[np.int64]]:
    """Orders of several dimensions together: rows and columns of one layer depend on each other.

    Those that do begin with the same kind of start, the one that keeps most; then each in turn is searched with the
    others held, again where a neighbour has moved. Arguments, errors and what is promised as in `search`.
    """
    _check(dimensions, scores)
    orders = {dimension: np.arange(dimension.size) for dimension in dimensions}
    seen = {dimension: views(dimension, scores, pattern, density) for dimension in dimensions}
    for group in _coupled({dimension: {view.name for view in found} for dimension, found in seen.items() if found}):
        present = {dimension: orders[dimension] for dimension in group}
        names = {place.name for dimension in group for place in (*dimension.rows, *dimension.columns)}
        near = {name: scores[name] for name in scores if name in names}
        found = _together(seen, present, near, pattern, density, seed)
        if kept(found, near, pattern, density) > kept(present, near, pattern, density):
            orders.update(found)
    return orders


def permuted(orders: Orders, scores: Scores) -> dict[str, NDArray[np.float64]]:
    """The scores of layers whose channels are in these orders: what `reorder` does to the weights."""
    found = layer_orders(orders, {name: part.shape for name, part in scores.items()})
    return {name: part[found[name][0]][:, found[name][1]] if name in found else part for name, part in scores.items()}


def kept(orders: Orders, scores: Scores, pattern: BlockPattern, density: float) -> float:
    """What the pattern keeps of all `scores` once the channels are in these orders."""
    parts = permuted(orders, scores).values()
    return float(sum(np.sum(part, where=pattern.project(part, density)) for part in parts))


def _check(dimensions: Sequence[Dimension], scores: Scores) -> None:
    for name, part in scores.items():
        if not (np.isfinite(part).all() and (part >= 0).all()):
            raise SparsecError(f"layer '{name}': a score is negative or not finite, so no order can be found by it")
    for dimension in dimensions:
        for place in (*dimension.rows, *dimension.columns):
            end = place.start + dimension.size * place.repeat
            if place.name in scores and end > scores[place.name].shape[place.axis]:
                raise SparsecError(
                    f"layer '{place.name}': its scores are {list(scores[place.name].shape)}, but {dimension.size} "
                    f"channels end at {end} of axis {place.axis}"
                )


def _coupled(layers: Mapping[Dimension, set[str]]) -> Iterator[list[Dimension]]:
    """The dimensions in groups of which no two share a layer."""
    left = list(layers)
    while left:
        group, names = [left.pop(0)], set[str]()
        for dimension in group:  # which grows meanwhile
            names |= layers[dimension]
            group += [other for other in left if layers[other] & names]
            left = [other for other in left if other not in group]
        yield [dimension for dimension in layers if dimension in group]


def _together(
    seen: Mapping[Dimension, Sequence[View]],
    present: Orders,
    scores: Scores,
    pattern: BlockPattern,
    density: float,
    seed: int,
) -> dict[Dimension, NDArray[np.int64]]:
    """Orders of dimensions that depend on each other; `seen` are their views in the present order."""
    # Step 1. The best start for all at once.
    candidates = [dict(present)]
    if len(present) > 1:
        candidates += [{d: start(seen[d], np.random.default_rng(seed)) for d in present} for start in STARTS]
    orders = max(candidates, key=lambda found: kept(found, scores, pattern, density))
    # Step 2. One after the other.
    waiting, visits = list(present), dict.fromkeys(present, 0)
    while waiting:
        dimension = waiting.pop(0)
        visits[dimension] += 1
        names = {view.name for view in seen[dimension]}
        moved = permuted(orders, {name: scores[name] for name in names})
        order = _refined(views(dimension, moved, pattern, density), np.random.default_rng(seed))
        before, after = (kept(found, moved, pattern, density) for found in ({}, {dimension: order}))
        if after > before * (1 + LEAST_GAIN):
            orders[dimension] = orders[dimension][order]
        if after > before * (1 + LEAST_GAIN_AGAIN):
            waiting += [
                other
                for other in present
                if other is not dimension
                and other not in waiting
                and visits[other] < MOST_VISITS
                and names & {view.name for view in seen[other]}
            ]
    return orders


def _refined(seen: Sequence[View], rng: np.random.Generator) -> NDArray[np.int64]:
    """The best start for one dimension, and what exchanges make of it."""
    # Step 1. Where to begin, and which neighbouring channels' places are worth the same.
    starts = [np.arange(seen[0].size), *(start(seen, rng) for start in STARTS)]
    worth = [_worth(seen, order) for order in starts]
    best = max(worth)
    order = best_order = starts[worth.index(best)]
    blocks = np.concatenate([part for view in seen for part in view.blocks], axis=1)
    classes = np.flatnonzero(np.append(True, (blocks[1:] != blocks[:-1]).any(axis=1)))
    # Step 2. A mask, and the exchanges that gain under it.
    for step in range(len(SOFTNESS) + MOST_STEPS):
        softness = SOFTNESS[step] if step < len(SOFTNESS) else 0.0
        gains, now = np.zeros((len(order), len(classes))), 0.0
        for view in seen:
            moved = view.moved(order)
            mask, held = view.mask(moved, softness)
            gains += view.gains(moved, mask, classes)
            now += held
        if now > best * (1 + LEAST_GAIN):
            best, best_order = now, order
        elif step > len(SOFTNESS):
            break
        order = order[exchange(gains, classes)]
    return best_order


def _worth(seen: Sequence[View], order: NDArray[np.int64]) -> float:
    """What a hard mask keeps on all the axes."""
    return sum(view.mask(view.moved(order))[1] for view in seen)

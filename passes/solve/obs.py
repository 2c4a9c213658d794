"""Greedy removal of whole blocks: always the one whose loss is least once all others have made it good."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .least_squares import least_squares
from .problem import Problem, Solution

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Inputs that leave a block row between two updates of all others, and those among which they are chosen: the ones of
# least loss when the panel begins. With fewer inputs than that the choice is exact.
PANEL = 48
CANDIDATES = 192
# Inputs above which the updates are kept in float32, unless damping is so small that the inverse needs every digit.
FLOAT32_FROM = 1024
LEAST_DAMPING = 1e-3
# Numbers between two rows of updates: a stride of whole pages would crowd them into few lines of the cache.
GAP = 24
# Bytes of updates that one batch of block rows keeps.
BATCH = 2**28
# Of several batches each goes as much further than its share, so that rarely one has to be repeated.
FURTHER = 1.05


def obs(problem: Problem, densities: Sequence[float]) -> list[Solution]:
    """Optimal Brain Surgeon for blocks (Hassibi and Stork 1992; grouped: Frantar and Alistarh, NeurIPS 2022, "OBC").

    The R outputs of a block row share their mask and so one inverse H⁻¹. Dropping the inputs P costs
    Σ_rows w_P [(H⁻¹)_PP]⁻¹ w_Pᵀ; then w -= w_P [(H⁻¹)_PP]⁻¹ (H⁻¹)_P: and H⁻¹ loses P by the same formula. Block rows do
    not touch each other, so the layer's order is the merge of theirs: every density falls out of one run, with the
    weights from one exact system each.
    """
    (out, inputs), pattern = problem.shape, problem.pattern
    # Whatever goes last is worth most.
    order = removal_order(problem, min((density for density in densities if density), default=1.0))
    scores = order.repeat(pattern.rows, axis=0)[:out].repeat(pattern.cols, axis=1)[:, :inputs]
    solutions = []
    for density in densities:
        mask = pattern.project(scores, density)
        solutions.append(Solution(least_squares(problem.weight, mask, problem.statistics), mask))
    return solutions


def removal_order(problem: Problem, density: float = 0.0) -> NDArray[np.float64]:
    """When each block goes, if all go one by one: [block rows, block columns], the first is 0.

    What is still there at `density` has no order of its own, but comes after all others.
    """
    pattern, (out, inputs) = problem.pattern, problem.shape
    rows, cols = min(pattern.rows, out), min(pattern.cols, inputs)
    block_rows, block_cols = pattern.grid(problem.shape)
    # Step 1. Pad to whole blocks; outputs and inputs of zero cost nothing and change nothing.
    weight = np.zeros((block_rows * rows, block_cols * cols))
    weight[:out, :inputs] = problem.weight
    inverse = np.eye(block_cols * cols)
    inverse[:inputs, :inputs] = problem.statistics.inverse
    # Step 2. How many go: a half is rounded, and where blocks are cut off at an edge the small ones may go first.
    goal = int((1 - density) * block_rows * block_cols) + 2
    goal += (block_cols if out % rows else 0) + (block_rows if inputs % cols else 0)
    # Step 3. Empty the block rows. A block goes once it is the first of its row that is left and no other row's first
    # costs less a weight: that sorts by the highest cost so far in its row.
    heights = np.minimum(out - np.arange(block_rows) * rows, rows)
    widths = np.minimum(inputs - np.arange(block_cols) * cols, cols)
    statistics = problem.statistics
    exact = inputs <= FLOAT32_FROM or statistics.damping < LEAST_DAMPING * float(statistics.diagonal.mean())
    sequence, costs = empty_rows(
        weight.reshape(block_rows, rows, -1),
        inverse,
        heights,
        widths,
        min(goal, block_rows * block_cols),
        np.dtype(np.float64 if exact else np.float32),
    )
    order = np.empty(costs.size)
    order[np.argsort(costs, axis=None, kind="stable")] = np.arange(costs.size)
    result = np.empty(costs.shape)
    np.put_along_axis(result, sequence, order.reshape(costs.shape), axis=1)
    return result


def empty_rows(
    weight: NDArray[np.float64],
    inverse: NDArray[np.float64],
    heights: NDArray[np.int64],
    widths: NDArray[np.int64],
    goal: int,
    dtype: np.dtype[np.floating],
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Remove blocks, as many block rows at once as memory allows, until the `goal` of least cost are known.

    Args:
        weight: [block rows, R, in].
        inverse: [in, in].
        heights: [block rows] outputs of each that there really are.
        widths: [block columns] inputs of each that there really are.
        goal: a number of blocks of the whole layer.
        dtype: of the updates.

    Returns:
        The blocks of each row in the order in which they go, and the highest cost so far in the row, for a weight, at
        each; infinite for those that have not gone: [block rows, block columns].
    """
    shape = (len(heights), len(widths))
    sequence, costs = np.empty(shape, dtype=np.int64), np.empty(shape)
    todo = np.arange(shape[0])
    batches = -(-shape[0] * dtype.itemsize * inverse.size // BATCH)
    share = goal / costs.size * (FURTHER if batches > 1 else 1)
    while len(todo):
        for batch in (todo[i::batches] for i in range(min(batches, len(todo)))):
            rows = _Rows(weight[batch], inverse, heights[batch], widths, dtype)
            enough = int(np.ceil(share * len(batch) * shape[1]))
            sequence[batch], costs[batch] = rows.empty(min(enough, len(batch) * shape[1]))
        # Again, to their end, rows that may hold more of the goal than was thought.
        limit = np.partition(costs, goal - 1, axis=None)[goal - 1]
        known = np.where(np.isinf(costs), 0, costs).max(axis=1)
        todo = np.flatnonzero(np.isinf(costs[:, -1]) & (known < limit))
        share = 1.0
    return sequence, costs


class _Rows:
    """Block rows that are emptied side by side.

    With U the updates so far, [removed, in], the current inverse is `inverse` - Uᵀ U: a Cholesky factorisation with
    pivots, whose factor is all that grows. Inputs are moved so that those which are left come first.
    """

    def __init__(
        self,
        weight: NDArray[np.float64],
        inverse: NDArray[np.float64],
        heights: NDArray[np.int64],
        widths: NDArray[np.int64],
        dtype: np.dtype[np.floating],
    ) -> None:
        batch, outputs, inputs = weight.shape
        self.inverse, self.heights, self.widths = inverse, heights, widths
        self.left = len(widths)
        self.cols = cols = inputs // self.left
        # By place: blocks, their weights, their diagonal blocks of the current inverse, and their part of Uᵀ.
        self.blocks = np.tile(np.arange(self.left), (batch, 1))
        self.weight = np.ascontiguousarray(weight.reshape(batch, outputs, self.left, cols).transpose(0, 2, 3, 1))
        at = np.arange(self.left)
        own = inverse.reshape(self.left, cols, self.left, cols)[at, :, at]
        self.diagonal = np.tile(own, (batch, 1, 1, 1))
        self.updates = np.empty((batch, inputs, inputs + GAP), dtype=dtype)
        self.used = 0

    def empty(self, enough: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Remove blocks until `enough` are known that cost less than any other.

        Returns:
            The blocks in the order in which they go, and the highest cost so far in its row, for a weight, at each;
            infinite for those that have not gone: [block rows, blocks].
        """
        blocks = self.left
        costs = np.full((len(self.blocks), blocks), np.inf)
        active = np.arange(len(self.blocks))
        while self.left and len(active):
            begin = blocks - self.left
            count = min(self.left, max(1, PANEL // self.cols))
            losses = self._panel(active, count)
            highest = np.maximum(costs[active, begin - 1][:, None] if begin else 0.0, np.maximum.accumulate(losses, 1))
            costs[active, begin : begin + count] = highest
            limit = np.partition(costs, enough - 1, axis=None)[enough - 1]
            active = active[highest[:, -1] < limit]
        # What has gone lies behind what is left, the first last.
        return self.blocks[:, ::-1], costs

    def _panel(self, active: NDArray[np.int64], count: int) -> NDArray[np.float64]:
        """Remove `count` blocks of each row `active`; their losses for a weight, [active, count]."""
        left, cols, used = self.left, self.cols, self.used
        # Step 1. The candidates: places [active, some].
        some = min(left, max(CANDIDATES // cols, 2 * count))
        if some == left:
            places = np.tile(np.arange(left), (len(active), 1))
        else:
            weight = self.weight[active, :left]
            grams = _grams(weight)
            sizes = self.widths[self.blocks[active, :left]] * self.heights[active, None]
            costs = _losses(grams, self.diagonal[active, :left]) / sizes
            places = np.sort(np.argpartition(costs, some - 1, axis=1)[:, :some], axis=1)
        # Step 2. Their part of the current inverse, and the greedy choice among them.
        inverses = np.empty((len(active), some * cols, some * cols))
        for i, row in enumerate(active):
            inputs = _inputs(self.blocks[row, places[i]], cols)
            inverses[i] = self.inverse.take(inputs, axis=0).take(inputs, axis=1)
            if used:
                past = self.updates[row, _inputs(places[i], cols), :used]
                inverses[i] -= past @ past.T
        each = active[:, None]
        greedy = _Greedy(
            inverses,
            self.weight[each, places],
            self.diagonal[each, places],
            self.widths[self.blocks[each, places]] * self.heights[each],
            count,
        )
        for _ in range(count):
            greedy.remove()
        # Step 3. All others follow.
        for i, row in enumerate(active):
            self._follow(row, places[i, greedy.chosen[i]], greedy.root(i), greedy.shares[i])
        self.left -= count
        self.used += count * cols
        return greedy.losses

    def _follow(
        self, row: np.int64, gone: NDArray[np.int64], root: NDArray[np.float64], shares: NDArray[np.float64]
    ) -> None:
        """Update what is left when the places `gone` go, where the inverse is `root` (`root`)ᵀ [removed, removed]."""
        left, cols, used = self.left, self.cols, self.used
        blocks, weight, diagonal, updates = (a[row] for a in (self.blocks, self.weight, self.diagonal, self.updates))
        keep, after = left - len(gone), used + len(gone) * cols
        if keep:
            there = self.inverse.take(_inputs(blocks[gone], cols), axis=0).take(_inputs(blocks[:left], cols), axis=1)
            if used:
                there -= updates[_inputs(gone, cols), :used] @ updates[: left * cols, :used].T
            update = np.linalg.inv(root) @ there
            updates[: left * cols, used:after] = update.T
            weight[:left] -= (update.T @ shares.T).reshape(left, cols, -1)
            tall = update.reshape(1, -1, left, cols).transpose(0, 2, 3, 1)
            diagonal[:left] -= _times_transposed(tall, tall)[0]
        # The last that stay move to the places of those that go.
        names = blocks[gone]
        stays = np.ones(left, dtype=np.bool_)
        stays[gone] = False
        holes = gone[gone < keep]
        movers = keep + np.flatnonzero(stays[keep:])
        for array in (blocks, weight, diagonal):
            array[holes] = array[movers]
        updates[_inputs(holes, cols), :after] = updates[_inputs(movers, cols), :after]
        blocks[keep:left] = names[::-1]


class _Greedy:
    """The exact greedy choice among a few blocks of each row, by their part of the current inverse alone.

    With V the updates so far, the current inverse is `inverses` - Vᵀ V and the current weight `weight` - `shares` V.
    Only what decides is kept current: for every block C x C of the inverse and the products wᵀ w of its weights. `rows`
    holds `weight` and, below it, V: all that a removal reads, in one piece.
    """

    def __init__(
        self,
        inverses: NDArray[np.float64],
        weight: NDArray[np.float64],
        diagonal: NDArray[np.float64],
        sizes: NDArray[np.int64],
        count: int,
    ) -> None:
        batch, self.blocks, self.cols, self.outputs = weight.shape
        self.inverses, self.diagonal, self.sizes = inverses, diagonal, sizes
        self.grams = _grams(weight)
        self.rows = np.empty((batch, self.outputs + count * self.cols, inverses.shape[1]))
        self.rows[:, : self.outputs] = weight.reshape(batch, -1, self.outputs).transpose(0, 2, 1)
        self.shares = np.empty((batch, self.outputs, count * self.cols))
        self.gone = np.zeros((batch, self.blocks))
        self.chosen = np.empty((batch, count), dtype=np.int64)
        self.losses = np.empty((batch, count))
        self.removed = 0

    def remove(self) -> None:
        """Of each row the block of least loss a weight."""
        cols, outputs, each = self.cols, self.outputs, np.arange(len(self.rows))
        used = self.removed * cols
        # Step 1. The loss of every block that is left.
        costs = _losses(self.grams, self.diagonal) / self.sizes + self.gone
        chosen = np.argmin(costs, axis=1)
        self.chosen[:, self.removed], self.losses[:, self.removed] = chosen, costs[each, chosen]
        # Step 2. Of its inputs P the current weights w_P [batch, R, C], and (H⁻¹)_PP = K Kᵀ.
        at = chosen[:, None] * cols + np.arange(cols)
        stack = self.rows[:, : outputs + used]
        here = stack[each[:, None], :, at]
        shares = self.shares[:, :, :used]
        weight = here[:, :, :outputs] - here[:, :, outputs:] @ shares.transpose(0, 2, 1)
        factor = _inverse_root(self.diagonal[each, chosen])
        share = factor @ weight
        # Step 3. In one product: the inverse's rows P but for the updates so far, and `share` (current weight).
        left = np.zeros((len(each), 2 * cols, stack.shape[1]))
        left[:, :cols, outputs:] = -here[:, :, outputs:]
        left[:, cols:, :outputs] = share
        left[:, cols:, outputs:] = -share @ shares
        product = left @ stack
        # Step 4. The update is K⁻¹ (H⁻¹)_P:, and `share` of it leaves the weights.
        update = factor @ (self.inverses[each[:, None], at] + product[:, :cols])
        tall = self._cut(update)
        self.diagonal -= _times_transposed(tall, tall)
        # (w - s u)ᵀ (w - s u), halved: the sum and its transpose are wᵀ w's change.
        inner = share @ share.transpose(0, 2, 1)
        half = _times_transposed(self._cut(inner @ update / 2 - product[:, cols:]), tall)
        self.grams += half + half.transpose(0, 1, 3, 2)
        # What is gone keeps an invertible diagonal; it is never asked for again.
        self.diagonal[each, chosen] = np.eye(cols)
        self.gone[each, chosen] = np.inf
        self.rows[:, outputs + used : outputs + used + cols] = update
        self.shares[:, :, used : used + cols] = share.transpose(0, 2, 1)
        self.removed += 1

    def _cut(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """[batch, k, in] to [batch, blocks, C, k]."""
        return np.asarray(rows.reshape(*rows.shape[:2], self.blocks, self.cols).transpose(0, 2, 3, 1))

    def root(self, row: int) -> NDArray[np.float64]:
        """The lower Cholesky factor of the inverse at what was removed, in that order."""
        return np.asarray(self.rows[row, self.outputs :].take(_inputs(self.chosen[row], self.cols), axis=1).T)


def _inverse_root(matrices: NDArray[np.float64]) -> NDArray[np.float64]:
    """K⁻¹ of stacked positive definite K Kᵀ."""
    return np.asarray(matrices**-0.5 if matrices.shape[-1] == 1 else np.linalg.inv(np.linalg.cholesky(matrices)))


def _times_transposed(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """A Bᵀ of stacked matrices [C, k]; of single rows, where the library needs a call a matrix, by elements."""
    if a.shape[-2] == 1:
        return np.asarray(np.einsum("abik,abik->abi", a, b)[..., None])
    return np.asarray(a @ b.transpose(0, 1, 3, 2))


def _grams(weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """wᵀ w of every block's weights [batch, blocks, C, R]: [batch, blocks, C, C]."""
    return _times_transposed(weight, weight)


def _inputs(blocks: NDArray[np.int64], cols: int) -> NDArray[np.int64]:
    return np.asarray((blocks[:, None] * cols + np.arange(cols)).ravel())


def _losses(grams: NDArray[np.float64], diagonal: NDArray[np.float64]) -> NDArray[np.float64]:
    """Σ_rows w_P [(H⁻¹)_PP]⁻¹ w_Pᵀ of every block: [batch, blocks]."""
    if grams.shape[-1] == 1:
        return np.asarray((grams / diagonal)[..., 0, 0])
    return np.asarray(np.trace(np.linalg.solve(diagonal, grams), axis1=2, axis2=3))

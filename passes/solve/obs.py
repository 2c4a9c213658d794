"""Exact greedy removal of whole blocks: always the one whose loss is least once all others have made it good."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .least_squares import least_squares
from .problem import Problem, Solution

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Updates that are gathered before the inverses are brought up to date by one product.
PANEL = 96
# Bytes of inverses that one batch of block rows works on.
BATCH = 2**28


def obs(problem: Problem, densities: Sequence[float]) -> list[Solution]:
    """Optimal Brain Surgeon for blocks (Hassibi and Stork 1992; grouped: Frantar and Alistarh, NeurIPS 2022, "OBC").

    The R outputs of a block row share their mask and so one inverse H⁻¹. Dropping the inputs P costs
    Σ_rows w_P [(H⁻¹)_PP]⁻¹ w_Pᵀ; then w -= w_P [(H⁻¹)_PP]⁻¹ (H⁻¹)_P: and H⁻¹ loses P by the same formula. Block rows do
    not touch each other, so each is emptied once, and the layer's order is the merge of theirs: every density falls
    out of one run, with the weights from one exact system each.
    """
    (out, inputs), pattern = problem.shape, problem.pattern
    # Whatever goes last is worth most.
    scores = removal_order(problem).repeat(pattern.rows, axis=0)[:out].repeat(pattern.cols, axis=1)[:, :inputs]
    solutions = []
    for density in densities:
        mask = pattern.project(scores, density)
        solutions.append(Solution(least_squares(problem.weight, mask, problem.statistics), mask))
    return solutions


def removal_order(problem: Problem) -> NDArray[np.float64]:
    """When each block goes, if all go one by one: [block rows, block columns], the first is 0."""
    pattern, (out, inputs) = problem.pattern, problem.shape
    rows, cols = min(pattern.rows, out), min(pattern.cols, inputs)
    block_rows, block_cols = pattern.grid(problem.shape)
    # Step 1. Pad to whole blocks; outputs and inputs of zero cost nothing and change nothing.
    weight = np.zeros((block_rows * rows, block_cols * cols))
    weight[:out, :inputs] = problem.weight
    inverse = np.eye(block_cols * cols)
    inverse[:inputs, :inputs] = problem.statistics.inverse
    heights = np.minimum(out - np.arange(block_rows) * rows, rows)
    widths = np.minimum(inputs - np.arange(block_cols) * cols, cols)
    # Step 2. Empty the block rows, as many at once as memory allows.
    cut = weight.reshape(block_rows, rows, -1)
    batch = max(1, BATCH // (8 * inverse.size))
    runs = [_empty(cut[i : i + batch], inverse, widths) for i in range(0, block_rows, batch)]
    sequence, losses = (np.concatenate(parts) for parts in zip(*runs, strict=True))
    # Step 3. Merge: a block goes once it is the first of its row that is left and no other row's first costs less a
    # weight. That sorts by the highest cost so far in its row.
    costs = np.maximum.accumulate(losses / heights[:, None], axis=1)
    order = np.empty(costs.size)
    order[np.argsort(costs, axis=None, kind="stable")] = np.arange(costs.size)
    result = np.empty(costs.shape)
    np.put_along_axis(result, sequence, order.reshape(costs.shape), axis=1)
    return result


def _empty(
    weight: NDArray[np.float64], inverse: NDArray[np.float64], widths: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Remove all blocks of some block rows in the greedy order.

    Args:
        weight: [block rows, R, in].
        inverse: [in, in].
        widths: [block columns] weights of each block that an output really has.

    Returns:
        The blocks in the order in which they go, and the loss of each for a weight of an output: [block rows, blocks].
    """
    batch, _, inputs = weight.shape
    blocks = len(widths)
    cols = inputs // blocks
    each = np.arange(batch)
    inverses = [inverse] * batch
    left = np.repeat(np.arange(blocks)[None], batch, axis=0)
    sequence = np.empty((batch, blocks), dtype=np.int64)
    losses = np.empty((batch, blocks))
    for begin in range(0, blocks, max(1, PANEL // cols)):
        count = min(max(1, PANEL // cols), blocks - begin)
        panel = _Panel(weight, inverses, widths[left], count * cols)
        for step in range(begin, begin + count):
            chosen, losses[:, step] = panel.remove()
            sequence[:, step] = left[each, chosen]
        # Only what is left is kept, so that the work shrinks with it.
        keep = np.nonzero(panel.alive)[1].reshape(batch, -1)
        left = np.take_along_axis(left, keep, axis=1)
        weight, inverses = panel.rest(keep)
    return sequence, losses


class _Panel:
    """A few removals, whose updates wait until the end, as in a blocked pivoted Cholesky.

    With U the updates so far, [removed, in], the current inverse is `inverses` - Uᵀ U and the current weight
    `weight` - `shares` U. Only what decides is kept current: for every block C x C of the inverse and the products
    wᵀ w of its weights. `rows` holds `weight` and, below it, U: all that a removal reads, in one piece.
    """

    def __init__(
        self,
        weight: NDArray[np.float64],
        inverses: list[NDArray[np.float64]],
        widths: NDArray[np.int64],
        size: int,
    ) -> None:
        batch, self.outputs, inputs = weight.shape
        self.blocks = widths.shape[1]
        self.cols = inputs // self.blocks
        self.inverses, self.widths = inverses, widths
        self.rows = np.concatenate((weight, np.zeros((batch, size, inputs))), axis=1)
        self.shares = np.zeros((batch, self.outputs, size))
        self.used = 0
        self.alive = np.ones((batch, self.blocks), dtype=np.bool_)
        at = np.arange(self.blocks)
        cut = (self.blocks, self.cols, self.blocks, self.cols)
        self.diagonal = np.stack([inverse.reshape(cut)[at, :, at] for inverse in inverses])
        tall = self._cut(weight)
        self.grams = tall @ tall.transpose(0, 1, 3, 2) if self.cols > 1 else np.square(weight).sum(1)[..., None, None]

    def _cut(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """[batch, k, in] to [batch, blocks, C, k]."""
        return np.asarray(rows.reshape(*rows.shape[:2], self.blocks, self.cols).transpose(0, 2, 3, 1))

    def remove(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Of each block row the block of least loss a weight: which, and that loss."""
        cols, outputs, each = self.cols, self.outputs, np.arange(len(self.rows))
        # Step 1. The loss of every block that is left.
        costs = np.where(self.alive, self._losses() / self.widths, np.inf)
        chosen = np.argmin(costs, axis=1)
        self.alive[each, chosen] = False
        # Step 2. Of its inputs P the current weights w_P [batch, R, C], and (H⁻¹)_PP = K Kᵀ.
        at = chosen[:, None] * cols + np.arange(cols)
        stack = self.rows[:, : outputs + self.used]
        here = np.take_along_axis(stack, at[:, None, :], axis=2)
        shares = self.shares[:, :, : self.used]
        weight = here[:, :outputs] - shares @ here[:, outputs:]
        factor = np.linalg.inv(np.linalg.cholesky(self.diagonal[each, chosen]))
        share = weight @ factor.transpose(0, 2, 1)
        # Step 3. In one product: the inverse's rows P but for the updates so far, and shareᵀ (current weight).
        left = np.zeros((len(each), 2 * cols, stack.shape[1]))
        left[:, :cols, outputs:] = -here[:, outputs:].transpose(0, 2, 1)
        left[:, cols:, :outputs] = share.transpose(0, 2, 1)
        left[:, cols:, outputs:] = -share.transpose(0, 2, 1) @ shares
        product = left @ stack
        # Step 4. The update is K⁻¹ (H⁻¹)_P:, and `share` of it leaves the weights.
        current = np.stack([inverse[i] for inverse, i in zip(self.inverses, at, strict=True)])
        update = factor @ (current + product[:, :cols])
        tall = self._cut(update)
        self.diagonal -= _times_transposed(tall, tall)
        # (w - s u)ᵀ (w - s u), halved: the sum and its transpose are wᵀ w's change.
        inner = share.transpose(0, 2, 1) @ share
        half = _times_transposed(self._cut(inner @ update / 2 - product[:, cols:]), tall)
        self.grams += half + half.transpose(0, 1, 3, 2)
        # What is gone keeps an invertible diagonal; it is never asked for again.
        self.diagonal[each, chosen] = np.eye(cols)
        self.rows[:, outputs + self.used : outputs + self.used + cols] = update
        self.shares[:, :, self.used : self.used + cols] = share
        self.used += cols
        return chosen, costs[each, chosen]

    def _losses(self) -> NDArray[np.float64]:
        """Σ_rows w_P [(H⁻¹)_PP]⁻¹ w_Pᵀ of every block: [batch, blocks]."""
        if self.cols == 1:
            return np.asarray((self.grams / self.diagonal)[..., 0, 0])
        return np.asarray(np.trace(np.linalg.solve(self.diagonal, self.grams), axis1=2, axis2=3))

    def rest(self, keep: NDArray[np.int64]) -> tuple[NDArray[np.float64], list[NDArray[np.float64]]]:
        """Current weights and inverses of the blocks `keep` [batch, blocks that are left]."""
        at = (keep[:, :, None] * self.cols + np.arange(self.cols)).reshape(len(keep), -1)
        weight = np.empty((len(keep), self.outputs, at.shape[1]))
        inverses = []
        for i, inputs in enumerate(at):
            update = self.rows[i, self.outputs :].take(inputs, axis=1)
            weight[i] = self.rows[i, : self.outputs].take(inputs, axis=1) - self.shares[i] @ update
            inverse = self.inverses[i].take(inputs, axis=0).take(inputs, axis=1)
            inverse -= update.T @ update
            inverses.append(inverse)
        return weight, inverses


def _times_transposed(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """A Bᵀ of stacks of C x C matrices; for C = 1, where a product by the library is a hundred calls, by elements."""
    return a * b if a.shape[-1] == 1 else np.asarray(a @ b.transpose(0, 1, 3, 2))

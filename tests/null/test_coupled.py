"""The order in which channels go, against the same greedy choice computed from its definition."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.ir import SparsecError
from sparsec.passes.solve import Reader, Statistics, coupled_order
from sparsec.passes.solve.least_squares import least_squares

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


def loss(reader: Reader, gone: list[int]) -> float:
    """What is lost of the reader's outputs, at the least, without these channels."""
    weight = reader.weight.astype(np.float64)
    mask = np.ones(weight.shape, np.bool_)
    mask[:, reader.columns[gone].reshape(-1)] = False
    if reader.statistics is None:
        return float(np.square(weight[~mask]).sum() / np.square(weight).sum())
    weight = np.where(reader.statistics.dead, 0, weight)
    change = least_squares(weight, mask, reader.statistics) - weight
    return reader.statistics.loss(change) / reader.power


def by_definition(readers: list[Reader]) -> list[int]:
    """Always the channel without which all readers together lose least."""
    gone: list[int] = []
    while len(gone) < len(readers[0].columns):
        left = [c for c in range(len(readers[0].columns)) if c not in gone]
        gone.append(min(left, key=lambda c: sum(loss(reader, [*gone, c]) for reader in readers)))
    return gone


def reader(channels: int, repeat: int, others: int, out: int, known: bool, rng: np.random.Generator) -> Reader:
    inputs = channels * repeat + others
    columns = rng.permutation(inputs)[: channels * repeat].reshape(channels, repeat)
    x = rng.standard_normal((3 * inputs, inputs)) @ rng.standard_normal((inputs, inputs))
    weight = rng.standard_normal((out, inputs)).astype(np.float32)
    return Reader(weight, columns, Statistics.of(x.T @ x / len(x)) if known else None)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 7),
    st.lists(st.tuples(st.integers(1, 3), st.integers(0, 4), st.integers(1, 9), st.booleans()), min_size=1, max_size=3),
    st.integers(0, 2**16),
)
def test_channels_go_as_the_definition_says(channels: int, shapes: list[Any], seed: int) -> None:
    rng = np.random.default_rng(seed)
    readers = [reader(channels, repeat, others, out, known, rng) for repeat, others, out, known in shapes]
    order, costs = coupled_order(readers)
    assert order.tolist() == by_definition(readers)
    first = sum(loss(one, [int(order[0])]) for one in readers)
    assert costs[0] == pytest.approx(first, rel=1e-6)
    assert (np.diff(costs) >= 0).all()


def test_what_another_channel_can_replace_goes_first() -> None:
    """Channel 2 is a copy of channel 0 and has the largest weights: its norm says keep, its loss says go."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((256, 6))
    x[:, 2] = x[:, 0]
    weight = rng.standard_normal((5, 6)).astype(np.float32)
    weight[:, [0, 2]] *= 4
    columns = np.arange(6)[:, None]
    order, _ = coupled_order([Reader(weight, columns, Statistics.of(x.T @ x / len(x), damping=1e-6))])
    assert order[0] in (0, 2)
    by_norm, _ = coupled_order([Reader(weight, columns)])
    assert by_norm[0] not in (0, 2)


def test_dead_channels_go_first() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 5))
    x[:, 3] = 0
    order, costs = coupled_order(
        [Reader(rng.standard_normal((4, 5)).astype(np.float32), np.arange(5)[:, None], Statistics.of(x.T @ x / 64))]
    )
    assert order[0] == 3 and costs[0] == 0


def test_readers_that_do_not_fit() -> None:
    weight = np.ones((3, 4), np.float32)
    with pytest.raises(SparsecError, match="of a weight with 4 inputs"):
        coupled_order([Reader(weight, np.arange(5)[:, None])])
    with pytest.raises(SparsecError, match="expected 4 channels"):
        coupled_order([Reader(weight, np.arange(4)[:, None]), Reader(weight, np.arange(3)[:, None])])

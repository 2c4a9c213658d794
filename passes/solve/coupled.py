"""Channels that several layers read, in the order in which they can be left out of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...ir import SparsecError
from .obs import FLOAT32_FROM, empty_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .statistics import Statistics


@dataclass(frozen=True)
class Reader:
    """A layer that reads the channels.

    Attributes:
        weight: [out, in].
        columns: [channels, repeat] int64, the inputs that each channel is.
        statistics: of its inputs; None where nothing is known of them, and all count the same.
    """

    weight: NDArray[np.floating]
    columns: NDArray[np.int64]
    statistics: Statistics | None = None

    @property
    def power(self) -> float:
        """Mean square of the outputs, summed over them."""
        weight = self.weight.astype(np.float64)
        return float(np.square(weight).sum()) if self.statistics is None else self.statistics.loss(weight)


def coupled_order(readers: Sequence[Reader]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Greedy removal of channels: always the one whose loss is least once all readers have made it good.

    Optimal Brain Surgeon (Hassibi and Stork 1992) for the columns P that a channel is in each reader, summed over the
    readers as shares of their outputs: Σ tr(w_P [(H⁻¹)_PP]⁻¹ w_Pᵀ) / tr(w H wᵀ); then w -= w_P [(H⁻¹)_PP]⁻¹ (H⁻¹)_P: in
    each, and H⁻¹ loses P. Inputs that are no channel of these stay and follow: of H⁻¹ only the part of the channels is
    needed. Side by side the readers are one layer whose H⁻¹ has a block for each, so that `obs` empties it in one go.

    Args:
        readers: one or more, all of as many channels.

    Returns:
        [channels] int64, the first to go first, and [channels] float64 the highest cost so far when each goes.

    Raises:
        SparsecError: a reader's columns do not fit its weight, or the readers have different numbers of channels.
    """
    for reader in readers:
        inputs, columns = reader.weight.shape[1], reader.columns
        if columns.shape[0] != readers[0].columns.shape[0] or not columns.size or columns.max() >= inputs:
            raise SparsecError(
                f"channels {list(columns.shape)} of a weight with {inputs} inputs, expected {len(readers[0].columns)} "
                "channels within it"
            )
    channels, repeats = len(readers[0].columns), [reader.columns.shape[1] for reader in readers]
    outputs, width = [_outputs(reader) for reader in readers], sum(repeats)
    weight = np.zeros((sum(len(part) for part in outputs), channels, width))
    inverse = np.zeros((channels, width, channels, width))
    row = column = 0
    for reader, part, repeat in zip(readers, outputs, repeats, strict=True):
        to = slice(column, column + repeat)
        weight[row : row + len(part), :, to] = part.reshape(len(part), channels, repeat)
        inverse[:, to, :, to] = _inverse(reader).reshape(channels, repeat, channels, repeat)
        row, column = row + len(part), column + repeat
    size = channels * width
    sequence, costs = empty_rows(
        weight.reshape(1, -1, size),
        inverse.reshape(size, size),
        np.ones(1, np.int64),
        np.ones(channels, np.int64),
        channels,
        np.dtype(np.float64 if size <= FLOAT32_FROM else np.float32),
    )
    return sequence[0], costs[0]


def _outputs(reader: Reader) -> NDArray[np.float64]:
    """[rows, channels * repeat] with the same wᵀ w as the reader's columns, as a share of its power: no more rows."""
    weight = reader.weight[:, reader.columns.reshape(-1)].astype(np.float64)
    if reader.statistics is not None:
        weight[:, reader.statistics.dead[reader.columns.reshape(-1)]] = 0
    if len(weight) > weight.shape[1]:
        weight = np.asarray(np.linalg.qr(weight, mode="r"))
    return weight / (np.sqrt(reader.power) or 1.0)


def _inverse(reader: Reader) -> NDArray[np.float64]:
    columns = reader.columns.reshape(-1)
    return np.eye(len(columns)) if reader.statistics is None else reader.statistics.inverse[np.ix_(columns, columns)]

"""What LSTM, GRU and RNN do to the channels along their inputs' axes."""

from __future__ import annotations

from .axes import Axis, extent, fixed, freeze, keep_whole, tie
from .call import Axes, Call, UnknownError

# Inputs by their numbers: X [steps, batch, in], W [directions, gates · hidden, in], R [directions, gates · hidden,
# hidden], B [directions, 2 · gates · hidden], lengths, first states [directions, batch, hidden], P [directions, 3 ·
# hidden].
B, LENGTHS, H0, C0, P = 3, 4, 5, 6, 7
PEEPHOLES = 3


def recurrent(call: Call) -> list[Axes]:
    """Units keep one order in all gates, both sides of R, and the states; all directions share it.

    Returns:
        The axes of Y, Y_h and Y_c.
    """
    found = call.numbered
    if any(len(found.get(i, ())) != 3 for i in range(3)) or call.attribute("layout", 0):
        raise UnknownError
    x, w, r = (found[i] for i in range(3))
    hidden, size = r[2], extent(r[2])
    if not size or extent(w[1]) != extent(r[1]) or (extent(w[1]) or 0) % size:
        raise UnknownError
    gates = (extent(w[1]) or 0) // size
    tie(x[2], w[2])
    if not call.constant[1]:
        keep_whole(x[2])
    if not call.constant[2]:
        keep_whole(hidden)
    # In front of the units of each are directions, whose order is their meaning.
    lies: list[tuple[int, Axis]] = [(1, hidden * gates), (2, hidden * gates), (B, hidden * (2 * gates))]
    lies += [(H0, hidden), (C0, hidden), (P, hidden * PEEPHOLES)]
    for i, units in lies:
        if i in found:
            place = 1 if i in (1, 2) else len(found[i]) - 1
            freeze(found[i][0])
            tie(units, found[i][place])
    freeze(x[0], *(axis for axis in found.get(LENGTHS, ())))
    states = [fixed(extent(w[0])), x[1], hidden]
    return [[x[0], *states], states, states][: len(call.node.outputs)]

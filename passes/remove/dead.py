"""Channels that make no difference: read by zero weights only, or zero whatever the model reads."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from .known import Known, common_numbers
from .proofs import contractions

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...ir import Program
    from ..channels import Channels, Dimension
    from ..channels.axes import Segment
    from .known import Along
    from .masks import Keep


def live_channels(
    program: Program, channels: Channels, dimensions: Collection[Dimension]
) -> dict[Dimension, NDArray[np.bool_]]:
    """Which channels of removable dimensions are not dead.

    Live is what a product with a live output, or one that is no channel of these, multiplies with a weight that is not
    zero, unless it is known to be zero itself. What is dead is no input of anything any more, so that more may be known
    to be zero; until no more channels are dead. It can go, or some of it, and nothing that is live changes.

    Args:
        program: whose channels they are.
        channels: of that program.
        dimensions: of `removable`; of others all are live.

    Returns:
        [channels] bool of each dimension, one of them true where none would be.
    """
    live = {s: np.ones(d.size, np.bool_) for s, d in channels.dimensions.items() if d in dimensions and d.size}
    while True:
        found = _reached(program, channels, live)
        for segment, mask in live.items():
            found[segment][np.argmax(mask)] |= not found[segment].any()
        if all((found[segment] == mask).all() for segment, mask in live.items()):
            return {channels.dimensions[segment]: mask for segment, mask in live.items()}
        live = found


def _reached(program: Program, channels: Channels, among: Keep) -> dict[Segment, NDArray[np.bool_]]:
    """Of these channels those that something reached reads, from the outputs on."""
    known = Known(program, channels, among, {segment: mask for segment, mask in among.items() if not mask.all()})
    reached = {segment: np.zeros_like(mask) for segment, mask in among.items()}

    def idle(side: Along, segment: Segment) -> NDArray[np.bool_]:
        """Which are zero, or where this is a weight zero for all that is reached."""
        tensor, zero = known.constant(side[0]), known.is_zero(side, segment)
        if tensor is None or segment not in known.segments(side):
            return zero
        weights = common_numbers(tensor, channels.axes[side[0]] or [], side[1], segment, reached)
        return zero | np.equal(weights, 0)

    changed = True
    while changed:  # more than twice where layers read each other in a circle
        changed = False
        for node in reversed(program.model.graph):
            for pair in contractions(known, node):
                for segment in known.segments(pair[0]) | known.segments(pair[1]):
                    open_ = among[segment] & ~reached[segment]
                    read = open_ & ~idle(pair[0], segment) & ~idle(pair[1], segment) if open_.any() else open_
                    reached[segment] |= read
                    changed |= bool(read.any())
    return reached

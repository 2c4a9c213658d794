"""Of which dimensions channels can be left out, and why not of the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..channels import Channels, Dimension
from ..channels.axes import leaves

if TYPE_CHECKING:
    from ..channels.axes import Axis


@dataclass(frozen=True)
class Removable:
    """What can be left out of a program.

    Attributes:
        dimensions: of which channels can go, in the order of the layers.
        declined: by layer name, of layers none of whose outputs can go, why.
    """

    dimensions: tuple[Dimension, ...]
    declined: Mapping[str, str]


def removable(channels: Channels) -> Removable:
    """The dimensions that nothing works across, and for the outputs of other layers what binds them."""
    found = tuple(dimension for segment, dimension in channels.dimensions.items() if not segment.whole)
    declined = {
        name: reason for name, (rows, _) in channels.layers.items() if (reason := _declined(rows, channels)) is not None
    }
    return Removable(found, declined)


def _declined(rows: Axis, channels: Channels) -> str | None:
    """Why no output of a layer can go; None where some can."""
    words = ""
    for segment, _ in leaves(rows):
        if segment in channels.dimensions and not segment.whole:
            return None
        words = words or segment.why
    return f"its outputs stay: {words}" if words else "its outputs stay: nothing is known of them"

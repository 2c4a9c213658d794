"""Which places along an axis stay when channels go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from ..channels.axes import leaves

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..channels.axes import Axis, Segment

    # Of the segments from which channels go, which stay: [size] bool.
    Keep: TypeAlias = Mapping[Segment, NDArray[np.bool_]]


def axis_mask(axis: Axis, keep: Keep) -> NDArray[np.bool_] | None:
    """Which places of an axis of known extent stay; None where all do."""
    parts = leaves(axis)
    if not any(segment in keep for segment, _ in parts):
        return None
    masks = (keep[s] if s in keep else np.ones(s.size or 0, np.bool_) for s, _ in parts)
    return np.concatenate([mask.repeat(repeat) for mask, (_, repeat) in zip(masks, parts, strict=True)])

"""What became of each layer when channels were left out."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from ...ir import Decision
from ..config import STRUCTURED
from ..decide import dense_decision

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...ir import Layer


def removal_decision(
    layer: Layer, left: Layer, decision: Decision, declined: Mapping[str, str], otherwise: str, exact: bool
) -> Decision:
    """The record of a layer of the model as it came.

    Args:
        layer: as it came.
        left: what is left of it.
        decision: of what is left, as a layer of the smaller model.
        declined: by layer name why none of its outputs can go.
        otherwise: why a layer of which outputs could go stays as it is.
        exact: whether what is gone was dead.
    """
    why = declined.get(layer.name, "")
    if left.weight.shape == layer.weight.shape:
        if decision.choice == "sparse":
            return decision
        return dense_decision(layer, why or otherwise)
    gone = [before - after for before, after in zip(layer.weight.shape, left.weight.shape, strict=True)]
    both = zip(gone, layer.weight.shape, ("outputs", "inputs"), strict=True)
    sides = " and ".join(f"{n} of {size} {side}" for n, size, side in both if n)
    reason = f"without {sides}{', all dead' if exact else ''}{f'; {why}' if why else ''}"
    return dataclasses.replace(
        decision,
        choice="sparse" if decision.choice == "sparse" else "smaller",
        reason=reason,
        shape=(layer.out_features, layer.in_features),
        shape_after=(left.out_features, left.in_features),
        pattern=STRUCTURED,
        zeros_before=layer.zeros,
        bytes_dense=layer.nbytes,
        bytes_sparse=decision.bytes_sparse or left.nbytes,
        pruned=not exact,
    )

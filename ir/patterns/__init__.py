"""The shapes of sparsity. A new pattern is a new file and one line in `PATTERNS`."""

from __future__ import annotations

from ..errors import UsageError
from .block import BlockPattern
from .nm import NMPattern
from .unstructured import UnstructuredPattern

Pattern = BlockPattern
PATTERNS: tuple[type[Pattern], ...] = (BlockPattern, UnstructuredPattern, NMPattern)
SYNTAX = (
    "block:RxC (R outputs by C inputs, for example block:32x1), group:g (the same as block:gx1), unstructured (single "
    "weights) or nm:N:M (N of every M adjacent inputs); or by itself structured (channels left out of the model)"
)


def parse_pattern(text: str) -> Pattern:
    """The pattern that `text` names.

    Raises:
        UsageError: the text names no pattern.
    """
    for kind in PATTERNS:
        pattern = kind.parse(text.strip().lower())
        if pattern is not None:
            return pattern
    raise UsageError(f"'{text}' is not a pattern: expected {SYNTAX}")


__all__ = ["PATTERNS", "SYNTAX", "BlockPattern", "NMPattern", "Pattern", "UnstructuredPattern", "parse_pattern"]

"""What the kept weights are stored as. A new kind is a new file and one line in `VALUES`."""

from __future__ import annotations

from ..errors import UsageError
from .codebook import Codebook
from .floats import Floats
from .int8 import Int8
from .values import Values

VALUES: tuple[type[Values], ...] = (Floats, Int8, Codebook)
SYNTAX = (
    "fp32, bf16, fp16, int8 (one scale an output), int8:G (one scale an output and G inputs), codebook16 or "
    "codebook256 (codes of 4 or 8 bits into a table of weights)"
)


def parse_values(text: str) -> Values:
    """The kind of values that `text` names.

    Raises:
        UsageError: the text names none.
    """
    for kind in VALUES:
        values = kind.parse(text.strip().lower())
        if values is not None:
            return values
    raise UsageError(f"'{text}' is no kind of values: expected {SYNTAX}")


__all__ = ["SYNTAX", "VALUES", "Codebook", "Floats", "Int8", "Values", "parse_values"]

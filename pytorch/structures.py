"""Parts of a layer that are kept or dropped whole, as blocks of its matrix [out, in]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..ir import Pattern, UsageError, parse_pattern
from ..ir.patterns import SYNTAX, BlockPattern

# From outputs, inputs of the matrix and positions of the kernel to the block.
STRUCTURES: dict[str, Callable[[int, int, int], tuple[int, int]]] = {
    "columns": lambda out, inputs, kernel: (out, 1),
    "channels": lambda out, inputs, kernel: (out, kernel),
    "kernels": lambda out, inputs, kernel: (out, inputs // kernel),
    "layers": lambda out, inputs, kernel: (out, inputs),
}


@dataclass(frozen=True, slots=True)
class Structure:
    """What Schindler et al. 2020 ("Parameterized Structured Pruning for Deep Neural Networks") remove.

    | name | of a convolution [out, in, kh, kw] | of a dense or recurrent layer [out, in] |
    |---|---|---|
    | columns | w[:, i, h, w] | w[:, i] |
    | channels | w[:, i]: an input channel, for all outputs | w[:, i] |
    | kernels | w[:, :, h, w]: a position of the kernel | none |
    | layers | the layer | the layer |

    A weight of which a structure, other than `layers`, is all, stays dense: 1x1 convolutions have one kernel.

    Where no layer reads a channel any more, `sparsec.compile` with the pattern "structured" leaves it out of the model.
    """

    name: str

    @property
    def positions_first(self) -> bool:
        """Whether the inputs of the matrix lie as [kh, kw, in], not [in, kh, kw]."""
        return self.name == "kernels"

    def block(self, shape: tuple[int, int], kernel: int) -> BlockPattern:
        """The pattern of a matrix of this shape [out, in * kernel]."""
        return BlockPattern(*(max(1, size) for size in STRUCTURES[self.name](*shape, kernel)))

    def __str__(self) -> str:
        return self.name


def parse_structure(text: str) -> Pattern | Structure:
    """The pattern or structure that `text` names.

    Raises:
        UsageError: it names neither.
    """
    name = text.strip().lower()
    if name in STRUCTURES:
        return Structure(name)
    try:
        return parse_pattern(text)
    except UsageError:
        syntax = SYNTAX.split("; or by itself")[0]
        raise UsageError(
            f"'{text}' is not a pattern for training: expected {syntax}; or {', '.join(STRUCTURES)}"
        ) from None

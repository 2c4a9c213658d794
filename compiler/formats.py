"""What a layer's weight is stored as, and whether its products are of integers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..codegen.problem import MAX_INTEGER_INPUTS
from ..ir import parse_pattern
from ..ir.sparse_matrix import DOT_INPUTS
from ..ir.values import Floats, Int8
from ..passes.solve import AUTO
from .config import INTEGER_PATTERN

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..ir import Layer, Pattern, SparseMatrix
    from ..ir.values import Values
    from .config import CompileConfig

# Outputs that a vector of products needs at least.
_LEAST_ROWS = 4


def pack(
    layer: Layer,
    weight: NDArray[np.float32],
    pattern: str,
    config: CompileConfig,
    table: NDArray[np.float32] | None = None,
) -> tuple[SparseMatrix, str]:
    """The packed weight of a layer, and how its kernel is given X (see `codegen.problem.Problem`).

    Args:
        layer: whose it is.
        weight: [out, in] float32.
        pattern: as text.
        config: kinds of values and activations.
        table: what goes with `weight` where it lies on the grid of its kind; None for that of the layer, or a new one.
    """
    shape = parse_pattern(pattern)
    kind, x = values_of(layer, config), activations(layer, shape, config)
    table = layer.table if table is None else table
    together = DOT_INPUTS if x != "float" else 1
    return shape.pack(weight, layer.dtype, kind, table, together), x


def values_of(layer: Layer, config: CompileConfig) -> Values:
    """What its weight is stored as: codes stay what they are, and of the others only those of float32 have a choice."""
    if layer.values is not None:
        return layer.values
    return config.kind if layer.dtype == "float32" else Floats(layer.dtype)


def activations(layer: Layer, pattern: Pattern, config: CompileConfig) -> str:
    """How the layer's kernel would be given X: as floats, unless integers can be multiplied four inputs at a time."""
    out, inputs = layer.weight.shape
    cols, rows = min(pattern.cols, inputs), min(pattern.rows, out)
    fits = cols % DOT_INPUTS == 0 and inputs % DOT_INPUTS == 0 and rows >= _LEAST_ROWS and inputs < MAX_INTEGER_INPUTS
    if not fits or values_of(layer, config) != Int8():
        return "float"
    if layer.x_grid is not None and config.activations != "float":
        # What was rounded to signed codes is rounded again, to the same numbers.
        return "static" if layer.x_codes is None else "uint8"
    return config.activation_format


def pattern_of(layer: Layer, config: CompileConfig) -> str:
    """The pattern that pruning without data makes: where X arrives as codes, one in which they can be multiplied."""
    quantised = layer.values is not None and layer.x_grid is not None
    return INTEGER_PATTERN if quantised and config.pattern == AUTO else config.patterns[0]

"""What a layer's weight is stored as, and whether its products are of integers."""

from __future__ import annotations

from dataclasses import dataclass
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

    from ..ir import Layer, SparseMatrix
    from ..ir.values import Values
    from .config import CompileConfig

# Outputs that a vector of products needs at least.
_LEAST_ROWS = 4


@dataclass(frozen=True)
class Form:
    """How a layer's weight is cut and stored.

    Attributes:
        pattern: as text.
        values: the kind.
    """

    pattern: str
    values: Values


def pack(
    layer: Layer,
    weight: NDArray[np.float32],
    form: Form,
    config: CompileConfig,
    table: NDArray[np.float32] | None = None,
) -> tuple[SparseMatrix, str]:
    """The packed weight of a layer, and how its kernel is given X (see `codegen.problem.Problem`).

    Args:
        layer: whose it is.
        weight: [out, in] float32.
        form: what it is packed in.
        config: kind of activations.
        table: what goes with `weight` where it lies on the grid of its kind; None for that of the layer, or a new one.
    """
    x = activations(layer, form, config)
    table = layer.table if table is None else table
    together = DOT_INPUTS if x != "float" else 1
    return parse_pattern(form.pattern).pack(weight, layer.dtype, form.values, table, together), x


def activations(layer: Layer, form: Form, config: CompileConfig) -> str:
    """How the layer's kernel would be given X: as floats, unless integers can be multiplied four inputs at a time."""
    pattern = parse_pattern(form.pattern)
    out, inputs = layer.weight.shape
    cols, rows = min(pattern.cols, inputs), min(pattern.rows, out)
    fits = cols % DOT_INPUTS == 0 and inputs % DOT_INPUTS == 0 and rows >= _LEAST_ROWS and inputs < MAX_INTEGER_INPUTS
    if not fits or form.values != Int8():
        return "float"
    if layer.x_grid is not None and config.activations != "float":
        # What was rounded to signed codes is rounded again, to the same numbers.
        return "static" if layer.x_codes is None else "uint8"
    if layer.dynamic and config.activations == "auto":
        return "dynamic"
    return config.activation_format


def kinds_of(layer: Layer, config: CompileConfig) -> tuple[Values, ...]:
    """What its weight could be stored as: codes stay what they are; of others only those of float32 have a choice."""
    if layer.values is not None:
        return (layer.values,)
    return config.kinds if layer.dtype == "float32" and not layer.obstacle else (Floats(layer.dtype),)


def form_of(layer: Layer, config: CompileConfig) -> Form:
    """What pruning without data makes: where X arrives as codes, a pattern in which they can be multiplied."""
    quantised = layer.values is not None and (layer.x_grid is not None or layer.dynamic)
    pattern = INTEGER_PATTERN if quantised and config.pattern == AUTO else config.patterns[0]
    return Form(pattern, kinds_of(layer, config)[0])


def forms_of(layer: Layer, pattern: str, config: CompileConfig) -> list[Form]:
    """All that a layer cut in `pattern` could be.

    What can multiply integers in another of the patterns is not tried as stored weights only.
    """
    others = [Form(one, kind) for one in config.patterns for kind in kinds_of(layer, config)]
    multiplied = {form.values for form in others if activations(layer, form, config) != "float"}
    forms = [Form(pattern, kind) for kind in kinds_of(layer, config)]
    return [form for form in forms if form.values not in multiplied or activations(layer, form, config) != "float"]

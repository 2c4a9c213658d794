"""What a layer's weight is stored as, and whether several inputs are multiplied at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..codegen.problem import MAX_INTEGER_INPUTS, TOGETHER
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
    return parse_pattern(form.pattern).pack(weight, layer.dtype, form.values, table, TOGETHER[x]), x


def activations(layer: Layer, form: Form, config: CompileConfig) -> str:
    """How the layer's kernel would be given X: as floats, unless several inputs can be multiplied at a time."""
    if form.values == Floats("bfloat16") and layer.dtype == "float32" and config.activations == "bf16":
        return "bfloat16" if _fits(layer, form, TOGETHER["bfloat16"]) else "float"
    if form.values != Int8() or not _fits(layer, form, DOT_INPUTS) or layer.in_features >= MAX_INTEGER_INPUTS:
        return "float"
    if layer.x_grid is not None and config.activations != "float":
        # What was rounded to signed codes is rounded again, to the same numbers.
        return "static" if layer.x_codes is None else "uint8"
    if layer.dynamic and config.activations == "auto":
        return "dynamic"
    return config.activation_format


def _fits(layer: Layer, form: Form, together: int) -> bool:
    pattern, (out, inputs) = parse_pattern(form.pattern), layer.weight.shape
    whole = min(pattern.cols, inputs) % together == 0 and inputs % together == 0
    return bool(whole and min(pattern.rows, out) >= _LEAST_ROWS)


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

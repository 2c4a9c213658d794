"""Put the channels of a model into another order: `reorder`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir

from .orders import check_orders, indices

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..channels import Dimension, Place


def reorder(model: onnx_ir.Model, orders: Mapping[Dimension, NDArray[np.int64]]) -> onnx_ir.Model:
    """A model that computes the same, up to the order of its sums, with its initialisers permuted.

    Args:
        model: the model that the dimensions were found in; it stays as it is.
        orders: of each dimension [size] int64: new channel i is now channel order[i].

    Returns:
        A clone that shares every tensor which no order touches.

    Raises:
        SparsecError: an order is no permutation of its dimension.
    """
    check_orders(orders)
    touched: dict[str, dict[int, dict[Place, NDArray[np.int64]]]] = {}
    for dimension, order in orders.items():
        if not np.array_equal(order, np.arange(dimension.size)):
            for place in dimension.constants:
                touched.setdefault(place.name, {}).setdefault(place.axis, {})[place] = order
    result = model.clone()
    for name, by_axis in touched.items():
        value = result.graph.initializers[name]
        tensor = value.const_value
        assert tensor is not None, "find_dimensions read its shape"
        array = tensor.numpy()
        for axis, places in by_axis.items():
            array = np.take(array, indices(places, array.shape[axis]), axis=axis)
        value.const_value = onnx_ir.Tensor(np.ascontiguousarray(array), dtype=tensor.dtype, name=tensor.name)
    return result

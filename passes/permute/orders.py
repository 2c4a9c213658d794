"""Orders of channels, as they apply to axes and to layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ...ir import SparsecError
from ..channels import Dimension, Place

if TYPE_CHECKING:
    from numpy.typing import NDArray


def indices(places: Mapping[Place, NDArray[np.int64]], size: int) -> NDArray[np.int64]:
    """The order of a whole axis of `size` places: new place i holds what is now at place [i].

    Args:
        places: of the dimensions on that axis, each with its order: new channel i is now channel order[i].
        size: places along the axis.
    """
    result = np.arange(size)
    for place, order in places.items():
        within = order[:, None] * place.repeat + np.arange(place.repeat)
        result[place.start : place.start + within.size] = place.start + within.reshape(-1)
    return result


def layer_orders(
    orders: Mapping[Dimension, NDArray[np.int64]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """For layers of these shapes [out, in] their rows and columns: the new weight is weight[rows][:, columns].

    Statistics move along: a second moment of the inputs becomes H[columns][:, columns], a bias b[rows]. Layers that no
    order touches are left out.

    Args:
        orders: of each dimension [size] int64: new channel i is now channel order[i].
        shapes: of the layers' weights, by name; places in other layers are passed over.

    Returns:
        ([out], [in]) int64 by the layer's name.

    Raises:
        SparsecError: an order is no permutation of its dimension.
    """
    check_orders(orders)
    touched: dict[str, tuple[dict[Place, NDArray[np.int64]], dict[Place, NDArray[np.int64]]]] = {}
    for dimension, order in orders.items():
        for place in (*dimension.rows, *dimension.columns):
            if place.name in shapes:
                touched.setdefault(place.name, ({}, {}))[place.axis][place] = order
    return {
        name: (indices(rows, shapes[name][0]), indices(columns, shapes[name][1]))
        for name, (rows, columns) in touched.items()
    }


def check_orders(orders: Mapping[Dimension, NDArray[np.int64]]) -> None:
    """Refuse what is no order.

    Raises:
        SparsecError: an order is no permutation of its dimension.
    """
    for dimension, order in orders.items():
        if order.shape != (dimension.size,) or not np.array_equal(np.sort(order), np.arange(dimension.size)):
            where = ", ".join(place.name for place in (*dimension.rows, *dimension.columns))
            raise SparsecError(f"an order of the {dimension.size} channels of {where} must hold each of them once")

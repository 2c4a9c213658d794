"""A node as the rules of operators see it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from .axes import Axis
from .constants import small_constant

if TYPE_CHECKING:
    import onnx_ir

Axes: TypeAlias = list[Axis]
Size: TypeAlias = "int | str | None"  # a number, a name that the model gives, or unknown
Sizes: TypeAlias = "Sequence[Size] | None"  # None: even the number of axes is unknown


class UnknownError(Exception):
    """A rule cannot tell what happens to the channels; all that the node reads keeps its order."""


class Call:
    """A node as a rule sees it.

    Attributes:
        node: the node.
        inputs: the axes of the inputs that carry data, as many as `RULES` says; those left out at the end are absent.
        numbered: the same by the number of the input.
        given: the shapes of these inputs, as far as they are inferred.
        constant: of each of these inputs, whether it is made of initialisers only.
        result: the shape of the output.
    """

    def __init__(
        self, node: onnx_ir.Node, numbered: dict[int, Axes], given: list[Sizes], constant: list[bool], result: Sizes
    ) -> None:
        self.node, self.numbered, self.inputs = node, numbered, [*numbered.values()]
        self.given, self.constant, self.result = given, constant, result

    def attribute(self, name: str, default: Any) -> Any:
        """An attribute that has the type of `default`, or `default`."""
        found = self.node.attributes.get(name)
        if found is None:
            return default
        if found.is_ref() or not isinstance(found.value, type(default)):
            raise UnknownError
        return found.value

    def integers(self, index: int, name: str = "") -> tuple[int, ...] | None:
        """Constant numbers from input number `index` or, in older opsets, the attribute `name`; None if left out."""
        if name in self.node.attributes:
            return tuple(self.attribute(name, ()))
        if index >= len(self.node.inputs) or self.node.inputs[index] is None:
            return None
        numbers = small_constant(self.node.inputs[index])
        if numbers is None or numbers.dtype.kind not in "iu":
            raise UnknownError
        return tuple(int(number) for number in numbers.ravel())

    @property
    def sizes(self) -> list[int | None]:
        """The output's sizes as numbers."""
        if self.result is None:
            raise UnknownError
        return [size if isinstance(size, int) else None for size in self.result]


def position(axis: int, rank: int) -> int:
    """A possibly negative number of an axis as one from the front."""
    if not -rank <= axis < rank:
        raise UnknownError
    return axis % rank

"""Pieces of a model that run one after the other, each on what those before it left."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir
from onnx_ir.analysis import analyze_implicit_usage

from ..frontend.constants import Constants

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping


class Splitter:
    """Cuts a model between two of its nodes."""

    def __init__(self, model: onnx_ir.Model) -> None:
        """Look at what every node reads; the model's nodes are in an order in which they can run."""
        self._model = model
        self._places = {node: place for place, node in enumerate(model.graph)}
        constants, captured = Constants(model), analyze_implicit_usage(model.graph)
        # Of each value that is not constant, where it is read last.
        self._last: dict[onnx_ir.Value, int] = {}
        for node, place in self._places.items():
            for value in _reads(node, captured):
                if not constants.known(value) and not value.is_initializer():
                    self._last[value] = place

    def place(self, node: onnx_ir.Node) -> int:
        """The node's number in the order of the graph."""
        return self._places[node]

    def needed(self, place: int) -> list[onnx_ir.Value]:
        """What the nodes from `place` on read of what nodes before it made, or of the model's inputs."""
        return [value for value, last in self._last.items() if last >= place and self._made(value) < place]

    def piece(
        self, begin: int, end: int, types: Mapping[str, onnx_ir.TypeProtocol], also: Collection[str] = ()
    ) -> onnx_ir.Model | None:
        """The nodes from `begin` up to `end`, as far as something after them, or one of `also`, needs them.

        Args:
            begin: the first node's place.
            end: the place after the last node's.
            types: by name, of the values that earlier pieces made; the inputs of the model have theirs.
            also: names of more outputs.

        Returns:
            A model whose inputs and outputs keep their names; None where nothing is made here.
        """
        after = set(self.needed(end))
        here = [value for value in self._last if begin <= self._made(value) < end]
        outputs = [value for value in here if value in after or value.name in also]
        if not outputs:
            return None
        graph = onnx_ir.convenience.extract(self._model.graph, self.needed(begin), outputs)
        for value in [value for value in graph.inputs if not value.uses()]:
            graph.inputs.remove(value)
        for value in graph.inputs:
            if (kind := types.get(value.name or "")) is not None:
                value.type, value.shape = kind, None
        for value in graph.outputs:
            # ONNX Runtime finds them out; what the file says of sizes may hold for one batch only.
            value.type = value.shape = None
        functions = [function.clone() for function in self._model.functions.values()]
        return onnx_ir.Model(graph, ir_version=self._model.ir_version, functions=functions)

    def _made(self, value: onnx_ir.Value) -> int:
        """The place of the node that makes it; -1 for inputs of the model."""
        producer = value.producer()
        return -1 if producer is None else self._places[producer]


def _reads(node: onnx_ir.Node, captured: Mapping[onnx_ir.Graph, set[onnx_ir.Value]]) -> Iterator[onnx_ir.Value]:
    """Its inputs, and what its subgraphs use from outside."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type is onnx_ir.AttributeType.GRAPH:
            yield from captured[attribute.as_graph()]
        elif attribute.type is onnx_ir.AttributeType.GRAPHS:
            for graph in attribute.as_graphs():
                yield from captured[graph]

"""Whether a graph is one: every value that is read is produced, once, and no node waits for itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir

from ...ir import SparsecError

if TYPE_CHECKING:
    from collections.abc import Iterator

_REPAIR = "Export the model again; onnx.checker.check_model names every fault."


def check_structure(model: onnx_ir.Model) -> None:
    """Refuse a model that no runtime could run; sort nodes that are out of order, as ONNX Runtime does.

    Raises:
        SparsecError: a value that nobody produces, a cycle, or an attribute without a type.
    """
    for root in (model.graph, *(function.graph for function in model.functions.values())):
        graphs = (root, *root.subgraphs())
        _check_values(graphs)
        if any(_out_of_order(graph) for graph in graphs):
            _sort(root)


def node_label(node: onnx_ir.Node) -> str:
    """A node as messages name it; unnamed ones by their output."""
    if node.name:
        return f"node '{node.name}' ({node.op_type})"
    output = node.outputs[0].name if node.outputs else ""
    return f"the {node.op_type} node of output '{output}'"


def _check_values(graphs: tuple[onnx_ir.Graph, ...]) -> None:
    """Every node input and graph output has a source; every attribute can be written out again."""
    known: set[onnx_ir.Value] = set()
    for graph in graphs:
        known.update(graph.inputs, graph.initializers.values())
        known.update(output for node in graph for output in node.outputs)
    for graph in graphs:
        for node in graph:
            for value in node.inputs:
                if value is not None and value not in known:
                    raise SparsecError(f"{node_label(node)} reads '{value.name}', which nothing provides. {_REPAIR}")
            for attribute in node.attributes.values():
                if attribute.type == onnx_ir.AttributeType.UNDEFINED and not attribute.is_ref():
                    raise SparsecError(f"{node_label(node)}: attribute '{attribute.name}' has no type. {_REPAIR}")
        for value in graph.outputs:
            # A subgraph that returns an outer value as it is ends here too; ONNX Runtime asks for an Identity.
            if value not in known:
                raise SparsecError(f"nothing in graph '{graph.name}' provides its output '{value.name}'. {_REPAIR}")


def _sources(node: onnx_ir.Node) -> Iterator[onnx_ir.Value]:
    """What a node reads, by its inputs or inside its subgraphs."""
    for inner in (node, *(inner for graph in _subgraphs(node) for inner in graph.all_nodes())):
        for value in inner.inputs:
            if value is not None:
                yield value


def _subgraphs(node: onnx_ir.Node) -> Iterator[onnx_ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type == onnx_ir.AttributeType.GRAPH and not attribute.is_ref():
            yield attribute.as_graph()
        elif attribute.type == onnx_ir.AttributeType.GRAPHS and not attribute.is_ref():
            yield from attribute.as_graphs()


def _out_of_order(graph: onnx_ir.Graph) -> bool:
    """Whether some node reads a value of this graph before it is computed."""
    pending = {output for node in graph for output in node.outputs}
    for node in graph:
        if any(value in pending for value in _sources(node)):
            return True
        pending.difference_update(node.outputs)
    return False


def _sort(root: onnx_ir.Graph) -> None:
    """Sort in place, keeping the order where it is free; name the nodes of a cycle."""
    try:
        root.sort()
    except ValueError:
        around = " -> ".join(node_label(node) for node in _cycle(root))
        raise SparsecError(f"the graph has a cycle, {around}, so no order can run it. {_REPAIR}") from None


def _cycle(root: onnx_ir.Graph) -> list[onnx_ir.Node]:
    """Some nodes that wait for each other, the first one again at the end."""
    for graph in (root, *root.subgraphs()):
        # Step 1. Take away what can run; what is left waits for itself, or for something that does.
        left = dict.fromkeys(graph)
        while ready := [node for node in left if not any(value.producer() in left for value in _sources(node))]:
            for node in ready:
                del left[node]
        # Step 2. Walk back along what each waits for until a node comes again.
        walk = [next(iter(left))] if left else []
        while walk and walk[-1] not in walk[:-1]:
            walk.append(next(p for value in _sources(walk[-1]) if (p := value.producer()) in left))
        if walk:
            return walk[walk.index(walk[-1]) :][::-1]
    return []

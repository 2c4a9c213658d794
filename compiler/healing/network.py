"""An ONNX graph as a function of PyTorch tensors that can be differentiated."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ...ir import SparsecError
from ..frontend.structure import node_label
from .ops import OPS, Call, Op, Tensor, tensor_of

if TYPE_CHECKING:
    import onnx_ir

    Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Step:
    """One node.

    Attributes:
        call: its attributes.
        run: what computes it.
        inputs: names; "" for one that is left out.
        last: names that nothing after it reads.
    """

    call: Call
    run: Op
    inputs: tuple[str, ...]
    last: tuple[str, ...]


class Network:
    """The nodes of a model, one after the other, in one type of floats.

    What depends on constants only is computed once. Names are those of the model's values.
    """

    def __init__(
        self, model: onnx_ir.Model, varying: Collection[str] = (), floats: Any = torch.float32, device: str = "cpu"
    ) -> None:
        """Look up every operator.

        Args:
            model: whose main graph is meant.
            varying: initialisers that are given anew in each call.
            floats: the type that floats of every width are computed in.
            device: that computes it, in PyTorch's words.

        Raises:
            SparsecError: an operator has no mapping, or a constant cannot be read; the message names the node.
        """
        self._floats, self._device = floats, torch.device(device)
        with self._device:
            self._graph = _Graph(model.graph, model, {}, frozenset(varying), floats)

    def __call__(self, values: Mapping[str, Tensor], wanted: Iterable[str]) -> Tensors:
        """The values of these names.

        Args:
            values: by name, the model's inputs and what varies; floats of any width, on any device.
            wanted: names of outputs, or of anything else that a node of the main graph makes.

        Raises:
            SparsecError: a node cannot be computed; the message names it.
        """
        wanted = list(wanted)
        types = {name: self._floats if x.is_floating_point() else x.dtype for name, x in values.items()}
        given = {name: x.to(self._device, types[name]) for name, x in values.items()}
        with self._device:
            found = self._graph.run(given, frozenset(wanted))
        return {name: found[name] for name in wanted}

    def nbytes(self, values: Mapping[str, Tensor]) -> int:
        """Of all that is computed on the way: what gradients need at most."""
        with torch.no_grad():
            made = self(values, self._graph.names)
        return sum(x.numel() * x.element_size() for x in made.values() if x is not None)


class _Graph:
    """A main graph, or one branch of an If, which also reads what is around it."""

    def __init__(
        self,
        graph: onnx_ir.Graph,
        model: onnx_ir.Model,
        around: Mapping[str, Tensor],
        varying: frozenset[str],
        floats: Any,
    ) -> None:
        opset = model.opset_imports.get("", 1)
        constants: Tensors = dict(around)
        todo: list[tuple[Call, Op, tuple[str, ...]]] = []
        for name, value in graph.initializers.items():
            if name not in varying and value.const_value is not None:
                constants[name] = _constant(value.const_value, floats)
        for node in graph:
            call = Call(node, opset, floats)
            inputs = tuple("" if value is None else value.name or "" for value in node.inputs)
            run = self._operator(node, model, constants, varying, floats)
            fixed = all(not name or name in constants for name in _reads(node))
            if fixed:
                constants.update(_compute(call, run, inputs, constants))
            else:
                todo.append((call, run, inputs))
        self._constants = {name: constants[name] for name in constants.keys() - around.keys()}
        self.outputs = [value.name or "" for value in graph.outputs]
        self._steps = _with_last(todo)
        self.names = [
            output.name for call, _, _ in todo for output in call.node.outputs if output.name and output.uses()
        ]

    def _operator(
        self,
        node: onnx_ir.Node,
        model: onnx_ir.Model,
        constants: Mapping[str, Tensor],
        varying: frozenset[str],
        floats: Any,
    ) -> Op:
        ours = node.domain in ("", "ai.onnx") and node.op_identifier() not in model.functions
        if ours and node.op_type == "If":
            names = ("else_branch", "then_branch")
            branches = [_Graph(node.attributes[name].as_graph(), model, constants, varying, floats) for name in names]
            return _If(branches, list(_reads(node)))
        if not ours or node.op_type not in OPS:
            domain = f"{node.domain}::" if node.domain else ""
            raise SparsecError(
                f"--heal: {node_label(node)}: there is no mapping of the operator {domain}{node.op_type} to PyTorch, "
                "so the model cannot be trained. Leave --heal out, or export the model without this operator"
            )
        return OPS[node.op_type]

    def run(self, given: Mapping[str, Tensor], wanted: frozenset[str]) -> Tensors:
        """All that is wanted, and what was not needed for the last time."""
        values: Tensors = {**self._constants, **given}
        for step in self._steps:
            values.update(_compute(step.call, step.run, step.inputs, values))
            for name in step.last:
                if name not in wanted:
                    del values[name]
        return values


class _If:
    """One of two branches, whose inputs are all that they read from around."""

    def __init__(self, branches: list[_Graph], reads: list[str]) -> None:
        self._branches, self.reads = branches, reads

    def __call__(self, call: Call, condition: Tensor, values: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        branch = self._branches[bool(condition)]
        given = {name: values[name] for name in self.reads if name in values}
        found = branch.run(given, frozenset(branch.outputs))
        return tuple(found[name] for name in branch.outputs)


def _constant(constant: onnx_ir.TensorProtocol, floats: Any) -> Tensor:
    """An initialiser; None for strings and other types that only operators without a mapping read."""
    try:
        return tensor_of(constant, floats)
    except TypeError:
        return None


def _reads(node: onnx_ir.Node) -> dict[str, None]:
    """Names that a node reads, those in its branches included, each once."""
    names = {value.name or "": None for value in node.inputs if value is not None}
    for found in node.attributes.values():
        if found.type.name == "GRAPH":
            inner = found.as_graph()
            own = {value.name for one in inner for value in one.outputs} | set(inner.initializers)
            below = [name for one in inner for name in _reads(one)] + [value.name or "" for value in inner.outputs]
            names |= {name: None for name in below if name not in own}
    return names


def _with_last(todo: list[tuple[Call, Op, tuple[str, ...]]]) -> list[Step]:
    """Steps that say what is not needed after them; only what other steps made goes."""
    made = {output.name for call, _, _ in todo for output in call.node.outputs if output.name}
    steps: list[Step] = []
    later: set[str] = set()
    for call, run, inputs in reversed(todo):
        reads = dict.fromkeys((*_reads(call.node), *(output.name or "" for output in call.node.outputs)))
        last = tuple(name for name in reads if name in made and name not in later)
        later |= reads.keys()
        steps.append(Step(call, run, inputs, last))
    return steps[::-1]


def _compute(call: Call, run: Op, inputs: tuple[str, ...], values: Mapping[str, Tensor]) -> Tensors:
    """What a node makes, by name."""
    node = call.node
    try:
        if isinstance(run, _If):
            found = run(call, values[inputs[0]], values)
        else:
            found = run(call, *(values[name] if name else None for name in inputs))
    except SparsecError:
        raise
    except Exception as error:  # whatever PyTorch says of a form that it does not know
        raise _cannot(node, " ".join(str(error).split())[:300] or type(error).__name__) from error
    made = found if isinstance(found, tuple) else (found,)
    for output in node.outputs[len(made) :]:
        if output.uses() or output.is_graph_output():
            raise _cannot(node, f"its output '{output.name}'")
    return {output.name or "": tensor for output, tensor in zip(node.outputs, made, strict=False)}


def _cannot(node: onnx_ir.Node, what: str) -> SparsecError:
    return SparsecError(
        f"--heal: {node_label(node)}: PyTorch cannot compute this form of {node.op_type} ({what}). Leave --heal out, "
        "or export the model without it"
    )

"""A way through a model piece by piece, in which what one piece leaves is kept for the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir

from ..exporter import Splitter, open_model, session_source
from ..runtime import numpy_dtype, run_session
from .trial import Exchange

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import onnxruntime

    from ...ir import Layer, Program
    from ..machine import Machine

    # Of one run: what was computed and is still needed, by name.
    Values = dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """Nodes of the model, up to some layers.

    Attributes:
        session: which runs them; None where there is nothing to run.
        stops: the layers that begin after them, those with the same X together.
        x: by layer name, the name of its X.
        later: names of what is still needed when the piece has run.
    """

    session: onnxruntime.InferenceSession | None
    stops: tuple[tuple[Layer, ...], ...]
    x: dict[str, str]
    later: frozenset[str]

    def run(self, values: Values, weights: Mapping[str, Any]) -> None:
        """Add to `values` what the piece makes, and take out of it what nobody needs any more.

        Args:
            values: at first the feeds of the model.
            weights: from `Walk.feeds`.
        """
        if self.session is not None:
            needed = [value.name for value in self.session.get_inputs()]
            feeds = {name: weights[name] if name in weights else values[name] for name in needed}
            made = [value.name for value in self.session.get_outputs()]
            values.update(zip(made, run_session(self.session, feeds), strict=True))
        for name in values.keys() - self.later:
            del values[name]


class Walk:
    """A model in pieces, with the weights of its layers as inputs: each node runs once on the way.

    Attributes:
        pieces: in their order; what comes after the last stop is not among them.
        feeds: what a piece wants for some layers' new weights, as `Exchange.feeds`.
    """

    def __init__(self, program: Program, stops: Sequence[Sequence[Layer]], machine: Machine, folder: Path) -> None:
        """Cut `program` before each of the `stops`: layers with the same X, in the order of the graph.

        Where something other than tensors would have to be kept there is no cut, and the stop comes with the next.
        """
        layers = [layer for members in stops for layer in members]
        opened = open_model(program, layers, watched=False)
        self.feeds = Exchange(opened, layers).feeds
        splitter = Splitter(opened.model)
        places = [min(splitter.place(opened.nodes[layer.name]) for layer in members) for members in stops]
        self.pieces: list[Piece] = []
        types: dict[str, onnx_ir.TypeProtocol] = {}
        waiting: list[tuple[Layer, ...]] = []
        begin = 0
        for i in np.argsort(places, kind="stable"):
            waiting.append(tuple(stops[i]))
            x = {layer.name: opened.x[layer.name] for members in waiting for layer in members}
            model = splitter.piece(begin, places[i], types, also=x.values())
            session = None if model is None else machine.open(session_source(model, folder))
            found = {} if session is None else {value.name: _type(value.type) for value in session.get_outputs()}
            if None in found.values():
                continue
            types.update({name: kind for name, kind in found.items() if kind is not None})
            later = frozenset(value.name or "" for value in splitter.needed(places[i])) | {*x.values()}
            self.pieces.append(Piece(session, tuple(waiting), x, later))
            begin, waiting = places[i], []


def _type(kind: str) -> onnx_ir.TypeProtocol | None:
    """Of what ONNX Runtime calls so; None for sequences and what else numpy does not have."""
    dtype = numpy_dtype(kind)
    if dtype is None:
        return None
    return onnx_ir.TensorType(onnx_ir.DataType.STRING if dtype.kind == "O" else onnx_ir.DataType.from_numpy(dtype))

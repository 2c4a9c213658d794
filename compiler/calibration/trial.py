"""A model whose weights can be exchanged between two runs, without a new session."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..exporter import OpenModel, open_model, session_source
from ..runtime import run_session

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from ...ir import Layer, Program
    from ..machine import Machine

    Feeds = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Weights:
    """New weights of a layer.

    Attributes:
        matrix: [out, in] float32.
        bias: [out] float32, or None for the layer's own.
        table: of the kind of values that `matrix` lies on the grid of; None where it was not rounded.
    """

    matrix: NDArray[np.float32]
    bias: NDArray[np.float32] | None = None
    table: NDArray[np.float32] | None = None


class Exchange:
    """What to feed an open model so that some of its layers have new weights."""

    def __init__(self, opened: OpenModel, layers: Sequence[Layer]) -> None:
        self._open = opened
        self._layers = {layer.name: layer for layer in layers}
        self._dense: dict[str, Any] = {}
        for layer in layers:
            self._dense.update(opened.feeds(layer, layer.weight, None))

    def feeds(self, weights: Mapping[str, Weights]) -> dict[str, Any]:
        """By input name; the layers that are not named keep their own weights."""
        chosen = dict(self._dense)
        for name, new in weights.items():
            chosen.update(self._open.feeds(self._layers[name], new.matrix, new.bias))
        return chosen


class Trial:
    """A session in which the weights of some layers are inputs, and what flows into them are outputs.

    Attributes:
        outputs: names of the model's own outputs.
        feeds: what `run` wants for some layers' new weights, as `Exchange.feeds`.
    """

    def __init__(
        self, program: Program, layers: Sequence[Layer], machine: Machine, folder: Path, watched: bool
    ) -> None:
        self._open = open_model(program, layers, watched)
        self._session = machine.open(session_source(self._open.model, folder))
        self.outputs = [output.name or "" for output in program.model.graph.outputs]
        self.feeds = Exchange(self._open, layers).feeds

    def run(self, feeds: Feeds, weights: Feeds) -> dict[str, Any]:
        """The model's outputs by name.

        Args:
            feeds: inputs of the model.
            weights: from `feeds`.
        """
        return dict(zip(self.outputs, run_session(self._session, {**feeds, **weights}, self.outputs), strict=True))

    def watch(self, feeds: Feeds, weights: Feeds, layers: Iterable[str]) -> dict[str, Any]:
        """What flows into the layers of these names; layers with the same X share the array."""
        wanted = {name: self._open.x[name] for name in layers}
        names = list(dict.fromkeys(wanted.values()))
        if not names:  # ONNX Runtime would take no names for all
            return {}
        found = dict(zip(names, run_session(self._session, {**feeds, **weights}, names), strict=True))
        return {layer: found[name] for layer, name in wanted.items()}

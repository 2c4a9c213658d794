"""A word-level LSTM language model with the medium size of Zaremba et al. 2014 for the Penn Treebank."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto

from ._graph import GraphBuilder

if TYPE_CHECKING:
    import onnx


def lstm_lm(
    vocabulary: int = 10_000,
    embedding: int = 650,
    hidden: int = 650,
    layers: int = 2,
    tied: bool = False,
    seed: int = 0,
) -> onnx.ModelProto:
    """Seeded language model: "input_ids" int64 ["batch", "sequence"] -> "logits" ["batch", "sequence", vocabulary].

    The state starts at zero and is not an output. Weights have the shapes and the gate order (i, o, f, c) of the
    ONNX operator, as the exporter writes them: `lstm.weight_ih_l0` is [1, 4 * hidden, embedding] float32.

    Args:
        vocabulary: number of words.
        embedding: width of the word vectors.
        hidden: width of each LSTM layer.
        layers: number of LSTM layers.
        tied: the decoder's weight is the embedding, transposed in the graph (Press & Wolf 2017).
        seed: of the normal weights.

    Raises:
        ValueError: `tied` with `embedding` other than `hidden`.
    """
    if tied and embedding != hidden:
        raise ValueError(f"lstm_lm: tied=True needs embedding == hidden, got {embedding} and {hidden}")
    graph = GraphBuilder("lstm_lm", seed)
    tokens = graph.input("input_ids", ("batch", "sequence"), TensorProto.INT64)
    table = graph.random("encoder.weight", (vocabulary, embedding), hidden**-0.5 if tied else 1.0)
    x = graph.node("Gather", [table, tokens], "/encoder/Gather", axis=0)
    # The operator runs over [sequence, batch, width].
    x = graph.node("Transpose", [x], "/lstm/Transpose", perm=[1, 0, 2])
    for layer in range(layers):
        x = _lstm(graph, x, layer, embedding if layer == 0 else hidden, hidden)
    x = graph.node("Transpose", [x], "/lstm/Transpose_1", perm=[1, 0, 2])
    if tied:
        weight = graph.node("Transpose", [table], "/decoder/Transpose", perm=[1, 0])
        bias = graph.random("decoder.bias", (vocabulary,), 0.1)
        x = graph.node("MatMul", [x, weight], "/decoder/MatMul")
        x = graph.node("Add", [bias, x], "/decoder/Add")
    else:
        x = graph.matmul_add(x, "decoder", hidden, vocabulary)
    graph.output("logits", x, ("batch", "sequence", vocabulary))
    return graph.model


def _lstm(graph: GraphBuilder, x: str, layer: int, inputs: int, hidden: int) -> str:
    """One forward layer: [sequence, batch, inputs] -> [sequence, batch, hidden]."""
    weights = [
        graph.random(f"lstm.weight_ih_l{layer}", (1, 4 * hidden, inputs), inputs**-0.5),
        graph.random(f"lstm.weight_hh_l{layer}", (1, 4 * hidden, hidden), hidden**-0.5),
        graph.random(f"lstm.bias_l{layer}", (1, 8 * hidden), 0.1),
    ]
    suffix = f"_{layer}" if layer else ""
    y = graph.node("LSTM", [x, *weights], f"/lstm/LSTM{suffix}", hidden_size=hidden, direction="forward")
    # Y is [sequence, directions, batch, hidden].
    axes = graph.constant(f"/lstm/Constant{suffix}", np.array([1], dtype=np.int64))
    return graph.node("Squeeze", [y, axes], f"/lstm/Squeeze{suffix}")

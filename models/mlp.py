"""Multi-layer perceptrons: Gemm(transB=1) with bias, Relu between layers."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from ._graph import GraphBuilder

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx
    from numpy.typing import NDArray

    Dense = tuple[NDArray[np.float32], NDArray[np.float32]]  # weight [out, in], bias [out]


def stack(
    layers: Sequence[Dense], inputs: str = "input", outputs: str = "output", name: str = "mlp"
) -> onnx.ModelProto:
    """A perceptron with these weights, named fc1, fc2, ...

    Args:
        layers: weight [out, in] float32 and bias [out] float32 of each layer, first to last.
        inputs: name of the graph's input, float32 ["batch", in].
        outputs: name of the graph's output, float32 ["batch", out].
        name: the graph's name.

    Raises:
        ValueError: there is no layer, a bias does not fit its weight, or a layer does not fit the one before.
    """
    _check(layers)
    graph = GraphBuilder(name)
    x = graph.input(inputs, ("batch", layers[0][0].shape[1]))
    for number, (weight, bias) in enumerate(layers, start=1):
        weight_name = graph.weight(f"fc{number}.weight", weight.astype(np.float32, copy=False))
        bias_name = graph.weight(f"fc{number}.bias", bias.astype(np.float32, copy=False))
        x = graph.node("Gemm", [x, weight_name, bias_name], f"/fc{number}/Gemm", transB=1)
        if number < len(layers):
            x = graph.node("Relu", [x], f"/relu{number}/Relu")
    graph.output(outputs, x, ("batch", layers[-1][0].shape[0]))
    return graph.model


def mlp(widths: Sequence[int] = (1024, 4096, 1024, 10), seed: int = 0) -> onnx.ModelProto:
    """A perceptron with seeded normal weights: "input" ["batch", widths[0]] -> "output" ["batch", widths[-1]]."""
    return stack(_random_layers(widths, seed))


def ffn(
    inputs: int = 1024,
    hidden: int = 4096,
    outputs: int = 1024,
    weights: Sequence[Dense] | None = None,
    seed: int = 0,
) -> onnx.ModelProto:
    """The feed-forward part of a transformer: inputs -> hidden, Relu, hidden -> outputs, biases on both.

    Args:
        inputs: width of the input.
        hidden: width between the layers.
        outputs: width of the output.
        weights: the two layers as in `stack`, instead of seeded normal ones.
        seed: of the weights; no effect where `weights` is given.

    Raises:
        ValueError: the weights do not have these widths.
    """
    widths = (inputs, hidden, outputs)
    layers = _random_layers(widths, seed) if weights is None else list(weights)
    expected = [(width, before) for before, width in pairwise(widths)]
    if [weight.shape for weight, _ in layers] != expected:
        raise ValueError(f"ffn: weights are {[w.shape for w, _ in layers]}, expected {expected} ([out, in])")
    return stack(layers, name="ffn")


def _random_layers(widths: Sequence[int], seed: int) -> list[Dense]:
    """He et al. 2015: variance 2/in before a Relu, 1/in for the last layer, which has none."""
    rng = np.random.default_rng(seed)
    layers: list[Dense] = []
    for index, (inputs, outputs) in enumerate(pairwise(widths)):
        gain = 2.0 if index < len(widths) - 2 else 1.0
        weight = rng.standard_normal((outputs, inputs), dtype=np.float32) * np.float32((gain / inputs) ** 0.5)
        bias = rng.standard_normal(outputs, dtype=np.float32) * np.float32(0.1)
        layers.append((weight, bias))
    return layers


def _check(layers: Sequence[Dense]) -> None:
    if not layers:
        raise ValueError("mlp: no layers: expected at least one weight [out, in] with its bias [out]")
    width = layers[0][0].shape[1]
    for number, (weight, bias) in enumerate(layers, start=1):
        expected = (bias.size, width)
        if weight.shape != expected or bias.ndim != 1:
            raise ValueError(f"mlp: weight of fc{number} is {weight.shape}, expected {expected} to fit its neighbours")
        width = weight.shape[0]

"""TinyVGG16: VGG-16 (Simonyan & Zisserman 2015, configuration D) for 64x64 images and 200 classes (Tiny-ImageNet).

Shahhosseini et al. 2020, "Partition Pruning: Parallelization-Aware Pruning for Dense Neural Networks", measure on
its dense layers, 2048-4096-4096-200.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._graph import GraphBuilder

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx

CONVOLUTIONS = (2, 2, 3, 3, 3)  # 3x3 convolutions before each 2x2 max pool
IMAGE = 64


def tinyvgg16(
    channels: Sequence[int] = (64, 128, 256, 512, 512),
    dense: int = 4096,
    classes: int = 200,
    seed: int = 0,
) -> onnx.ModelProto:
    """Seeded TinyVGG16: "input" float32 ["batch", 3, 64, 64] -> "output" float32 ["batch", classes].

    Args:
        channels: width of each of the five stages.
        dense: width of the two hidden dense layers.
        classes: number of outputs.
        seed: of the normal weights.
    """
    graph = GraphBuilder("tinyvgg16", seed)
    x = graph.input("input", ("batch", 3, IMAGE, IMAGE))
    # Step 1. Stages of convolutions; the numbers are torchvision's indices into `features` and `classifier`.
    index, inputs, size = 0, 3, IMAGE
    for outputs, convolutions in zip(channels, CONVOLUTIONS, strict=True):
        for _ in range(convolutions):
            x = _conv_relu(graph, x, index, inputs, outputs)
            index, inputs = index + 2, outputs
        x = graph.node("MaxPool", [x], f"/features/features.{index}/MaxPool", kernel_shape=[2, 2], strides=[2, 2])
        index, size = index + 1, size // 2
    # Step 2. The dense layers; indices 2 and 5 are dropout, which inference does not have.
    x = graph.node("Flatten", [x], "/Flatten", axis=1)
    x = _gemm(graph, x, 0, inputs * size * size, dense, gain=2.0)
    x = graph.node("Relu", [x], "/classifier/classifier.1/Relu")
    x = _gemm(graph, x, 3, dense, dense, gain=2.0)
    x = graph.node("Relu", [x], "/classifier/classifier.4/Relu")
    x = _gemm(graph, x, 6, dense, classes)
    graph.output("output", x, ("batch", classes))
    return graph.model


def _conv_relu(graph: GraphBuilder, x: str, index: int, inputs: int, outputs: int) -> str:
    weight = graph.random(f"features.{index}.weight", (outputs, inputs, 3, 3), (2.0 / (9 * inputs)) ** 0.5)
    bias = graph.random(f"features.{index}.bias", (outputs,), 0.1)
    x = graph.node(
        "Conv",
        [x, weight, bias],
        f"/features/features.{index}/Conv",
        kernel_shape=[3, 3],
        pads=[1, 1, 1, 1],
        strides=[1, 1],
        dilations=[1, 1],
        group=1,
    )
    return graph.node("Relu", [x], f"/features/features.{index + 1}/Relu")


def _gemm(graph: GraphBuilder, x: str, index: int, inputs: int, outputs: int, gain: float = 1.0) -> str:
    weight = graph.random(f"classifier.{index}.weight", (outputs, inputs), (gain / inputs) ** 0.5)
    bias = graph.random(f"classifier.{index}.bias", (outputs,), 0.1)
    return graph.node("Gemm", [x, weight, bias], f"/classifier/classifier.{index}/Gemm", transB=1)

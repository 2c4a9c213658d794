"""Transformer encoders (Devlin et al. 2019, BERT) as PyTorch's exporter writes them, Gelu and mask spelled out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto

from ._graph import GraphBuilder, scope

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """Sizes of an encoder: `ffn` is the width of the feed-forward part, `positions` the longest sequence."""

    layers: int
    hidden: int
    heads: int
    ffn: int
    vocabulary: int = 30_522
    positions: int = 512
    types: int = 2

    def __post_init__(self) -> None:
        if self.hidden % self.heads:
            raise ValueError(f"encoder: hidden={self.hidden} is not a multiple of heads={self.heads}")


MINILM_L6 = EncoderConfig(layers=6, hidden=384, heads=12, ffn=1536)
BERT_BASE = EncoderConfig(layers=12, hidden=768, heads=12, ffn=3072)


def minilm_l6(seed: int = 0) -> onnx.ModelProto:
    """Seeded encoder with the shapes of MiniLM-L6-H384 (Wang et al. 2020): 90 MB. See `encoder`."""
    return encoder(MINILM_L6, "minilm_l6", seed)


def bert_base(seed: int = 0) -> onnx.ModelProto:
    """Seeded encoder with the shapes of BERT-base (Devlin et al. 2019): 436 MB. See `encoder`."""
    return encoder(BERT_BASE, "bert_base", seed)


def encoder(config: EncoderConfig, name: str = "encoder", seed: int = 0) -> onnx.ModelProto:
    """An encoder without pooler, with seeded normal weights; a MatMul's weight is [in, out].

    Inputs "input_ids", "attention_mask" (1 = attend) and "token_type_ids" are int64 ["batch", "sequence"]; the
    output "last_hidden_state" is float32 ["batch", "sequence", hidden].
    """
    graph = GraphBuilder(name, seed)
    tokens, mask, types = (
        graph.input(input_name, ("batch", "sequence"), TensorProto.INT64)
        for input_name in ("input_ids", "attention_mask", "token_type_ids")
    )
    bias = _attention_bias(graph, mask)
    x = _embeddings(graph, config, tokens, types)
    for layer in range(config.layers):
        x = _layer(graph, config, x, bias, f"encoder.layer.{layer}")
    graph.output("last_hidden_state", x, ("batch", "sequence", config.hidden))
    return graph.model


def _attention_bias(graph: GraphBuilder, mask: str) -> str:
    """(1 - mask) * lowest float32, as [batch, 1, 1, sequence]: what is added to the scores."""
    axes = graph.constant("/Constant", np.array([1, 2], dtype=np.int64))
    x = graph.node("Unsqueeze", [mask, axes], "/Unsqueeze")
    x = graph.node("Cast", [x], "/Cast", to=TensorProto.FLOAT)
    x = graph.node("Sub", [graph.constant("/Constant_1", np.array(1.0, dtype=np.float32)), x], "/Sub")
    lowest = graph.constant("/Constant_2", np.array(np.finfo(np.float32).min, dtype=np.float32))
    return graph.node("Mul", [x, lowest], "/Mul")


def _embeddings(graph: GraphBuilder, config: EncoderConfig, tokens: str, types: str) -> str:
    """Word, type and position vectors, summed and normalised: [batch, sequence, hidden]."""
    path, width = "embeddings", config.hidden
    words = graph.random(f"{path}.word_embeddings.weight", (config.vocabulary, width), 1.0)
    places = graph.random(f"{path}.position_embeddings.weight", (config.positions, width), 1.0)
    kinds = graph.random(f"{path}.token_type_embeddings.weight", (config.types, width), 1.0)
    x = graph.node("Gather", [words, tokens], f"/{path}/word_embeddings/Gather")
    kind = graph.node("Gather", [kinds, types], f"/{path}/token_type_embeddings/Gather")
    x = graph.node("Add", [x, kind], f"/{path}/Add")
    # The positions 0 .. sequence - 1 are cut from a stored row.
    row = graph.weight(f"{path}.position_ids", np.arange(config.positions, dtype=np.int64).reshape(1, -1))
    one = graph.constant(f"/{path}/Constant", np.array([1], dtype=np.int64))
    zero = graph.constant(f"/{path}/Constant_1", np.array([0], dtype=np.int64))
    shape = graph.node("Shape", [tokens], f"/{path}/Shape")
    length = graph.node("Gather", [shape, one], f"/{path}/Gather", axis=0)
    ids = graph.node("Slice", [row, zero, length, one], f"/{path}/Slice")
    place = graph.node("Gather", [places, ids], f"/{path}/position_embeddings/Gather")
    x = graph.node("Add", [x, place], f"/{path}/Add_1")
    return _layer_norm(graph, x, f"{path}.LayerNorm", width)


def _layer(graph: GraphBuilder, config: EncoderConfig, x: str, bias: str, path: str) -> str:
    """Attention and feed-forward part, each followed by a residual Add and LayerNormalization."""
    width = config.hidden
    # Step 1. Attention.
    y = _attention(graph, config, x, bias, f"{path}.attention.self")
    y = graph.matmul_add(y, f"{path}.attention.output.dense", width, width)
    y = graph.node("Add", [y, x], f"{scope(path)}/attention/output/Add")
    x = _layer_norm(graph, y, f"{path}.attention.output.LayerNorm", width)
    # Step 2. Feed-forward.
    y = graph.matmul_add(x, f"{path}.intermediate.dense", width, config.ffn)
    y = _gelu(graph, y, f"{scope(path)}/intermediate/intermediate_act_fn")
    y = graph.matmul_add(y, f"{path}.output.dense", config.ffn, width)
    y = graph.node("Add", [y, x], f"{scope(path)}/output/Add")
    return _layer_norm(graph, y, f"{path}.output.LayerNorm", width)


def _attention(graph: GraphBuilder, config: EncoderConfig, x: str, bias: str, path: str) -> str:
    """softmax(q @ k.T / sqrt(size) + bias) @ v over the heads: [batch, sequence, hidden] -> the same."""
    prefix, size = scope(path), config.hidden // config.heads

    def heads(projection: str, perm: list[int]) -> str:
        y = graph.matmul_add(x, f"{path}.{projection}", config.hidden, config.hidden)
        inner = f"{prefix}/{projection}"
        shape = graph.constant(f"{inner}/Constant", np.array([0, 0, config.heads, size], dtype=np.int64))
        y = graph.node("Reshape", [y, shape], f"{inner}/Reshape")
        return graph.node("Transpose", [y], f"{inner}/Transpose", perm=perm)

    query, key, value = heads("query", [0, 2, 1, 3]), heads("key", [0, 2, 3, 1]), heads("value", [0, 2, 1, 3])
    scores = graph.node("MatMul", [query, key], f"{prefix}/MatMul")
    root = graph.constant(f"{prefix}/Constant", np.array(size**0.5, dtype=np.float32))
    scores = graph.node("Div", [scores, root], f"{prefix}/Div")
    scores = graph.node("Add", [scores, bias], f"{prefix}/Add")
    weights = graph.node("Softmax", [scores], f"{prefix}/Softmax", axis=-1)
    y = graph.node("MatMul", [weights, value], f"{prefix}/MatMul_1")
    y = graph.node("Transpose", [y], f"{prefix}/Transpose", perm=[0, 2, 1, 3])
    merged = graph.constant(f"{prefix}/Constant_1", np.array([0, 0, config.hidden], dtype=np.int64))
    return graph.node("Reshape", [y, merged], f"{prefix}/Reshape")


def _gelu(graph: GraphBuilder, x: str, prefix: str) -> str:
    """Gelu, x * (1 + erf(x / sqrt(2))) * 0.5, in the exporter's five nodes."""
    root = graph.constant(f"{prefix}/Constant", np.array(2**0.5, dtype=np.float32))
    y = graph.node("Erf", [graph.node("Div", [x, root], f"{prefix}/Div")], f"{prefix}/Erf")
    one = graph.constant(f"{prefix}/Constant_1", np.array(1.0, dtype=np.float32))
    y = graph.node("Add", [y, one], f"{prefix}/Add")
    y = graph.node("Mul", [x, y], f"{prefix}/Mul")
    half = graph.constant(f"{prefix}/Constant_2", np.array(0.5, dtype=np.float32))
    return graph.node("Mul", [y, half], f"{prefix}/Mul_1")


def _layer_norm(graph: GraphBuilder, x: str, path: str, width: int) -> str:
    weight = graph.random(f"{path}.weight", (width,), 0.1, mean=1.0)
    bias = graph.random(f"{path}.bias", (width,), 0.1)
    name = f"{scope(path)}/LayerNormalization"
    return graph.node("LayerNormalization", [x, weight, bias], name, axis=-1, epsilon=1e-12)

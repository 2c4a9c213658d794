"""Small reference networks: seeded builders of ONNX models, and a trained pair for the README (see `digits`).

All have opset 17, a dynamic dimension "batch", float32 weights named as in PyTorch, and activations of order one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .lstm_lm import lstm_lm
from .mlp import ffn, mlp
from .tinyvgg16 import tinyvgg16
from .transformer import bert_base, minilm_l6

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx

BUILDERS: dict[str, Callable[..., onnx.ModelProto]] = {
    "mlp": mlp,
    "ffn": ffn,
    "tinyvgg16": tinyvgg16,
    "minilm_l6": minilm_l6,
    "bert_base": bert_base,
    "lstm_lm": lstm_lm,
}


def build(name: str, seed: int = 0) -> onnx.ModelProto:
    """The model `name` of `BUILDERS` at its default size; the same seed gives the same bytes.

    Raises:
        ValueError: no builder has this name.
    """
    if name not in BUILDERS:
        raise ValueError(f"'{name}' is not a reference model: expected one of {', '.join(BUILDERS)}")
    return BUILDERS[name](seed=seed)


__all__ = ["BUILDERS", "build"]

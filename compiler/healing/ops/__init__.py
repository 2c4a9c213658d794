"""ONNX's operators as functions of PyTorch tensors: `OPS[op_type](call, *inputs)`, one file a kind."""

from . import elementwise, layout, network, recurrent, reduce
from .call import Call, Op, Tensor, tensor_of

OPS: dict[str, Op] = {**elementwise.OPS, **layout.OPS, **network.OPS, **recurrent.OPS, **reduce.OPS}

__all__ = ["OPS", "Call", "Op", "Tensor", "tensor_of"]

"""Dense weights with few values and many zeros, stored as a mask and codes; ONNX's own operators unpack them.

    W [out, ...] float32      ->      mask bits (uint8), codes (uint8) of what is kept, codebook (float32)
                                      W = Reshape(Where(bits, Gather(codebook, Gather(codes, CumSum(bits) - 1)), 0))

Everything above W is constant, so ONNX Runtime computes it once, when it opens the model, and runs what it ran before.
The weights are the same, bit by bit: only what a codebook holds exactly is stored so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir

from ..frontend.nodes import read_tensor

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from ...ir.values import Codebook

# The oldest opset with CumSum and BitShift.
OLDEST_STORED_OPSET = 11


def coded_size(array: NDArray[np.float32], codebook: Codebook) -> int | None:
    """Bytes of `array` as mask, codes and codebook; None where that is not exact, or not smaller."""
    kept = array[array != 0]
    if array.dtype != np.float32 or len(np.unique(kept)) >= codebook.size or not kept.size:
        return None
    size = -(-array.size // 8) + kept.size + 4 * codebook.size
    return size if size < array.nbytes else None


def store_coded(model: onnx_ir.Model, names: Iterable[str], codebook: Codebook) -> dict[str, int]:
    """Replace initialisers of the main graph by operators that unpack them.

    Args:
        model: is changed.
        names: of initialisers; those that cannot be stored exactly and smaller stay.
        codebook: how many values there may be.

    Returns:
        The bytes that each one takes now, by name.
    """
    sizes: dict[str, int] = {}
    if model.opset_imports.get("", 0) < OLDEST_STORED_OPSET:
        return sizes
    for name in names:
        value = model.graph.initializers.get(name)
        if value is None or value.const_value is None or value.is_graph_input() or value.is_graph_output():
            continue
        array = read_tensor(value.const_value, name)
        size = coded_size(array, codebook)
        if size is not None:
            _replace(model.graph, value, array, codebook)
            sizes[name] = size
    return sizes


def _replace(graph: onnx_ir.Graph, value: onnx_ir.Value, array: NDArray[np.float32], codebook: Codebook) -> None:
    name = value.name
    assert name is not None, "initialisers have names"
    del graph.initializers[name]
    value.name = None
    flat = array.ravel()
    table = codebook.fit(flat[None])
    codes = codebook.encode(flat[None], table)[0]
    unpacking = _Unpacking(graph, name)
    bits = unpacking.constant("mask", np.packbits(flat != 0, bitorder="little"))
    result = unpacking.weight(bits, codes[codes != 0], table, array.shape)
    graph.insert_before(next(iter(graph)), unpacking.nodes)
    result.type, result.shape = value.type, value.shape
    value.replace_all_uses_with(result)
    result.name = name


class _Unpacking:
    """The operators that unpack one weight."""

    def __init__(self, graph: onnx_ir.Graph, name: str) -> None:
        self._graph, self._name = graph, name
        self._taken = {value.name for value in graph.initializers.values()}
        self.nodes: list[onnx_ir.Node] = []

    def weight(
        self, bits: onnx_ir.Value, codes: NDArray[np.uint8], table: NDArray[np.float32], shape: tuple[int, ...]
    ) -> onnx_ir.Value:
        """From mask bits and codes to the weight."""
        count = int(np.prod(shape))
        # Step 1. Bits to a mask: eight of every byte, the lowest first.
        column = self.step("Reshape", bits, self.constant("column", np.array([-1, 1], dtype=np.int64)))
        shifts = self.constant("shifts", np.arange(8, dtype=np.uint8))
        each = self.step("BitShift", column, shifts, direction="RIGHT")
        single = self.step("Mod", each, self.constant("two", np.array(2, dtype=np.uint8)))
        row = self.step("Reshape", single, self.constant("row", np.array([-1], dtype=np.int64)))
        ends = (self.constant(k, np.array([n], dtype=np.int64)) for k, n in (("start", 0), ("end", count)))
        kept = self.step("Slice", row, *ends)
        mask = self.step("Cast", kept, to=onnx_ir.DataType.BOOL)
        # Step 2. The how-manieth of the kept ones each is, from 1 on; before the first, 0 is as good as any.
        number = self.step("Cast", kept, to=onnx_ir.DataType.INT32)
        number = self.step("CumSum", number, self.constant("axis", np.array(0, dtype=np.int32)))
        # Step 3. Its code, and the weight of that; code 0 stands in front.
        padded = self.constant("codes", np.concatenate([np.zeros(1, dtype=np.uint8), codes]))
        code = self.step("Cast", self.step("Gather", padded, number), to=onnx_ir.DataType.INT32)
        found = self.step("Gather", self.constant("codebook", table), code)
        flat = self.step("Where", mask, found, self.constant("zero", np.array(0, dtype=np.float32)))
        return self.step("Reshape", flat, self.constant("shape", np.array(shape, dtype=np.int64)))

    def constant(self, part: str, array: NDArray[np.generic]) -> onnx_ir.Value:
        name = f"{self._name}.{part}"
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        value = onnx_ir.Value(name=name, const_value=onnx_ir.Tensor(array, name=name))
        self._graph.register_initializer(value)
        return value

    def step(self, op_type: str, *inputs: onnx_ir.Value, **attributes: int | str) -> onnx_ir.Value:
        """The output of a new node."""
        made = [
            onnx_ir.AttrString(key, one) if isinstance(one, str) else onnx_ir.AttrInt64(key, int(one))
            for key, one in attributes.items()
        ]
        number = len(self.nodes)
        node = onnx_ir.Node("", op_type, list(inputs), made, name=f"{self._name}/unpack.{number}")
        node.outputs[0].name = f"{self._name}.unpacked.{number}"
        self.nodes.append(node)
        return node.outputs[0]

"""A packed sparse weight: block rows in compressed form, values in panels of adjacent outputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from .values import Floats, Int8, Values
from .values.floats import DTYPES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .patterns import Pattern

# Outputs that one pass of a kernel keeps in registers: two vectors of 16 float32.
MAX_PANEL = 32
# Outputs whose 16-bit values fill the 128 bytes that a GPU's shared memory delivers at once.
SWIZZLED_PANEL = 64
# Inputs whose 8-bit products one instruction sums (AVX-512 VNNI, `vpdpbusd`).
DOT_INPUTS = 4


def panel_width(rows: int, dtype: str = "float32") -> int:
    """Outputs a panel for blocks of `rows` outputs: the width that costs the fewest vector operations a block row.

    Panels of 4 and more are whole vectors of 4, 8 or 16 lanes; smaller blocks are a panel by themselves. Blocks of a
    multiple of 64 outputs in 16 bits are cut into panels of 64, for tensor cores.
    """
    if DTYPES[dtype].itemsize == 2 and rows % SWIZZLED_PANEL == 0:
        return SWIZZLED_PANEL
    if rows < 4:
        return rows

    def cost(width: int) -> float:
        lanes = next(lanes for lanes in (16, 8, 4) if width % lanes == 0)
        # A vector operation, and the bytes of the padding at a sixteenth of one each; one more for the loop itself.
        return -(-rows // width) * (width / lanes + width / 16 + 1)

    return min(range(4, MAX_PANEL + 1, 4), key=lambda width: (cost(width), -width))


def code_unit(panel: int) -> int:
    """Codes of 4 bits that are packed together: a whole vector of outputs, where panels have one."""
    return next((lanes for lanes in (16, 8, 4) if panel % lanes == 0), 2)


@dataclass(frozen=True)
class SparseMatrix:
    """A weight [out, in] of which only some blocks are stored.

    Block row i spans outputs i*R to (i+1)*R-1 and holds the blocks `indptr[i]` to `indptr[i+1]`-1, ordered by input.
    Block t spans inputs `indices[t]` to `indices[t]`+C-1; a block that the matrix's edge would cut off is moved back
    inside it, with zeros where it overlaps its neighbour, so that a kernel never reads past the inputs.
    `values` is [block row][panel][block][C inputs][panel outputs], flat: a kernel that computes one panel reads it as
    one stream. Outputs that R does not fill are stored as zeros and counted by `nbytes`.

    Panels of 64 outputs in 16 bits are swizzled: number the inputs of a panel's stream from its start, then the 16-byte
    chunk j (8 outputs) of input k stands at chunk j ^ (k % 8). Eight inputs are then one atom of the 128-byte swizzle
    (PTX ISA, "Shared Memory Matrix Layout"): a plain copy to shared memory is an operand of `wgmma`, and `ldmatrix`
    reads it without bank conflicts.

    Codes of 4 bits stand two in a byte: of u = `code_unit(panel)` adjacent ones, number j in the low and j + u/2 in
    the high half of byte j.

    Attributes:
        pattern: the shape of sparsity, with block sizes `rows` (R) and `cols` (C).
        shape: (out, in).
        values: [blocks * panels * C * panel] of `kind.dtype`; half as many, rounded up, where codes have 4 bits.
        indices: [blocks] int32, the first input of each block.
        indptr: [block rows + 1] int32.
        kind: what the values are.
        table: float32, what they share: see `kind`.
        dtype: of the activations that the weight meets: "float32", "float16" or "bfloat16".
        together: inputs of a block that stand together: [C / together][panel outputs][together] instead of
            [C inputs][panel outputs]. `DOT_INPUTS` for products of integers, 2 for those of bfloat16, else 1.
    """

    pattern: Pattern
    shape: tuple[int, int]
    values: NDArray[Any]
    indices: NDArray[np.int32]
    indptr: NDArray[np.int32]
    kind: Values = field(default_factory=Floats)
    table: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    dtype: str = "float32"
    together: int = 1

    @property
    def block(self) -> tuple[int, int]:
        """R and C as stored: the pattern's, cut to the matrix."""
        return min(self.pattern.rows, self.shape[0]), min(self.pattern.cols, self.shape[1])

    @property
    def panel(self) -> int:
        """Outputs a panel."""
        return panel_width(self.block[0], self.dtype)

    @property
    def swizzled(self) -> bool:
        """Whether the chunks of a panel's inputs are interchanged (see the class)."""
        return DTYPES[self.dtype].itemsize == 2 and self.panel == SWIZZLED_PANEL

    @property
    def panels(self) -> int:
        """Panels a block row."""
        return -(-self.block[0] // self.panel)

    @property
    def blocks(self) -> int:
        """Blocks stored."""
        return int(self.indices.size)

    @property
    def nbytes(self) -> int:
        """Bytes of values, table, indices and row pointers, padding included."""
        return self.values.nbytes + self.table.nbytes + self.indices.nbytes + self.indptr.nbytes

    @property
    def sums(self) -> NDArray[np.int32]:
        """[out] the sum of each output's codes, by which an activation's zero point counts in a product of integers.

        Raises:
            ValueError: the values are no integers.
        """
        if not isinstance(self.kind, Int8):
            raise ValueError(f"values of {self.kind} have no sums of codes")
        return np.asarray(self._codes().sum(axis=1, dtype=np.int32))

    @cached_property
    def density(self) -> float:
        """Share of the matrix's weights that lie in stored blocks."""
        rows, cols = self.block
        heights = np.minimum(self.shape[0] - np.arange(len(self.indptr) - 1) * rows, rows)
        # A block that does not start on the grid was moved back: its overlap belongs to its neighbour.
        widths = np.where(self.indices % cols == 0, cols, self.shape[1] % cols)
        stored = (heights.repeat(np.diff(self.indptr)) * widths).sum()
        return float(stored) / max(self.shape[0] * self.shape[1], 1)

    @classmethod
    def from_dense(
        cls,
        weight: NDArray[np.float32],
        pattern: Pattern,
        dtype: str = "float32",
        kind: Values | None = None,
        table: NDArray[np.float32] | None = None,
        together: int = 1,
    ) -> SparseMatrix:
        """Pack `weight` [out, in]; every block with a weight that is not stored as zero is kept.

        Args:
            weight: what to pack, rounded to what `kind` can hold.
            pattern: the shape of sparsity.
            dtype: of the activations.
            kind: of the values; None for floats of `dtype`.
            table: that of a weight which `kind` holds exactly; None fits one.
            together: see the class.

        Raises:
            ValueError: blocks do not have a multiple of `together` inputs.
        """
        kind = kind or Floats(dtype)
        table = kind.fit(weight) if table is None else table
        codes = kind.encode(weight, table)
        out, inputs = codes.shape
        rows, cols = min(pattern.rows, out), min(pattern.cols, inputs)
        if cols % together or inputs % together:
            raise ValueError(f"blocks of {cols} of {inputs} inputs do not stand {together} together")
        panel = panel_width(rows, dtype)
        panels = -(-rows // panel)
        block_rows, block_cols = pattern.grid((out, inputs))
        # Step 1. Cut into blocks, padded with zeros at the edges: [block rows, block cols, R, C].
        padded = np.zeros((block_rows * rows, block_cols * cols), dtype=codes.dtype)
        padded[:out, :inputs] = codes
        cut = padded.reshape(block_rows, rows, block_cols, cols).transpose(0, 2, 1, 3)
        kept = (cut != 0).any(axis=(2, 3))
        # Step 2. Move a last block that sticks out back inside; its weights move to the end of the block.
        starts = np.minimum(np.arange(block_cols) * cols, inputs - cols)
        over = block_cols * cols - inputs
        if over:
            cut = cut.copy()
            cut[:, -1] = np.roll(cut[:, -1], over, axis=-1)
        # Step 3. Panels: [blocks, R, C] to [blocks, panels, C, panel], then panel-major inside each block row.
        stored = np.zeros((int(kept.sum()), panels * panel, cols), dtype=codes.dtype)
        stored[:, :rows] = cut[kept]
        tiles = stored.reshape(-1, panels, panel, cols).transpose(0, 1, 3, 2)
        indptr = np.concatenate(([0], np.cumsum(kept.sum(axis=1)))).astype(np.int32)
        streams = [tiles[a:b].transpose(1, 0, 2, 3).reshape(panels, -1, panel) for a, b in pairwise(indptr)]
        if DTYPES[dtype].itemsize == 2 and panel == SWIZZLED_PANEL:
            streams = [_swizzle(stream) for stream in streams]
        if together > 1:
            streams = [s.reshape(panels, -1, together, panel).transpose(0, 1, 3, 2) for s in streams]
        values = np.concatenate([stream.ravel() for stream in streams])
        values = _to_halves(values, panel) if kind.bits == 4 else values
        indices = starts[np.nonzero(kept)[1]].astype(np.int32)
        values = np.ascontiguousarray(values)
        return cls(pattern, (out, inputs), values, indices, indptr, kind, table, dtype, together)

    def to_dense(self) -> NDArray[np.float32]:
        """The weight [out, in] float32, exactly as it was packed."""
        return np.ascontiguousarray(self.kind.decode(self._codes(), self.table))

    def _codes(self) -> NDArray[Any]:
        """The codes [out, in], zero where no block is stored."""
        out, inputs = self.shape
        rows, cols = self.block
        values = self.values
        if self.kind.bits == 4:
            values = _from_halves(values, self.blocks * self.panels * self.panel * cols, self.panel)
        codes = np.zeros((len(self.indptr) - 1, self.panels * self.panel, inputs), dtype=values.dtype)
        size = self.panels * self.panel * cols
        for i, (a, b) in enumerate(pairwise(self.indptr)):
            stream = values[a * size : b * size]
            if self.together > 1:
                stream = stream.reshape(self.panels, -1, self.panel, self.together).transpose(0, 1, 3, 2)
            stream = stream.reshape(self.panels, (b - a) * cols, self.panel)
            stream = _swizzle(stream) if self.swizzled else stream
            tiles = stream.reshape(self.panels, b - a, cols, self.panel)
            tiles = tiles.transpose(1, 0, 3, 2).reshape(b - a, self.panels * self.panel, cols)
            for start, tile in zip(self.indices[a:b], tiles, strict=True):
                # += because a block moved back inside overlaps its neighbour with zeros.
                codes[i, :, start : start + cols] += tile
        return codes[:, :rows].reshape(-1, inputs)[:out]


def _to_halves(codes: NDArray[np.uint8], panel: int) -> NDArray[np.uint8]:
    """Codes of 4 bits, two in a byte (see `SparseMatrix`)."""
    half = code_unit(panel) // 2
    pairs = np.pad(codes, (0, -len(codes) % (2 * half))).reshape(-1, 2, half)
    return np.asarray(pairs[:, 0] | pairs[:, 1] << 4).ravel()


def _from_halves(packed: NDArray[np.uint8], count: int, panel: int) -> NDArray[np.uint8]:
    """The first `count` codes of `_to_halves`."""
    half = code_unit(panel) // 2
    pairs = packed.reshape(-1, 1, half)
    return np.concatenate([pairs & 15, pairs >> 4], axis=1).ravel()[:count]


def _swizzle(stream: NDArray[Any]) -> NDArray[Any]:
    """Interchange the chunks of 8 outputs of each input of a stream [panels, inputs, 64]; its own inverse."""
    panels, inputs, width = stream.shape
    chunks = stream.reshape(panels, inputs, width // 8, 8)
    order = np.arange(width // 8)[None, :] ^ (np.arange(inputs)[:, None] % 8)
    return np.take_along_axis(chunks, order[None, :, :, None], axis=2).reshape(stream.shape)

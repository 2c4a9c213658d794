"""A schedule: the knobs of a kernel as plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Schedule:
    """How a kernel goes about its work; two equal schedules of one problem give the same code.

    Attributes:
        kernel: the file in `codegen/kernels` that emits it: "outputs" (vectors along the outputs), "rows" (along the
            rows of X, for blocks of few outputs), "inputs" (along the inputs of a block, for few rows of X as well) or
            "dots" (products of several inputs at a time, along the outputs).
        tile_rows: rows of X whose sums are kept in registers together.
        pack: copy the rows of X into a contiguous panel first: gathers then touch one cache line an input. For
            "outputs"; "rows" always does, "inputs" never.
        accumulators: independent chains of sums where a tile alone has too few to hide the latency of a multiply-add.
        prefetch: inputs ahead for which weights and packed rows are prefetched; 0 for none. For "outputs".
        pairs: keep two rows in one register, where a panel is one vector and rows are packed.
        parts_per_thread: pieces of work a thread.
    """

    kernel: str
    tile_rows: int
    pack: bool = False
    accumulators: int = 8
    prefetch: int = 0
    pairs: bool = False
    parts_per_thread: int = 1

    def __str__(self) -> str:
        words = [self.kernel, f"rows {self.tile_rows}"]
        words += ["packed"] if self.pack else []
        words += ["in pairs"] if self.pairs else []
        words += [f"chains {self.accumulators}"] if self.accumulators != 8 else []
        words += [f"prefetch {self.prefetch}"] if self.prefetch else []
        words += [f"parts {self.parts_per_thread}"] if self.parts_per_thread != 1 else []
        return ", ".join(words)

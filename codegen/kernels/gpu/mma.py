"""Tensor cores by `mma.sync` (sm_80 and later): a part of a block row times a tile of rows a thread block.

    for part of a block row (heaviest first), tile of rows:              one thread block
        sums[outputs, tile_rows] = 0
        for chunk of the part's kept inputs:                             `stages` chunks in flight
            W[chunk, outputs] -> shared memory                           cp.async of 16 bytes, one stream a panel
            X[tile, inputs of the chunk] -> shared memory                gathered
            sums += W.T @ X.T                                            warps share outputs, rows and inputs
        Y[tile, outputs] = epilogue(sums over the warps)                 through shared memory

The weight is the left operand, its outputs M, so that few rows of X waste nothing: N is a multiple of 8. Its inputs are
rows in shared memory and `ldmatrix.trans` turns them; X has its rows there, and plain `ldmatrix` reads them. Inputs of
the last chunk beyond the kept ones are zeros on both sides. float32 is computed as TF32: operands are rounded to 10
bits of fraction, which is an error of about 1e-3 of the size of the terms.

X, residual, Y and the weight's arrays must start at multiples of 16 bytes.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ....ir.sparse_matrix import SWIZZLED_PANEL
from ...problem import itemsize
from ...target.cuda import TABLE
from ..elementwise import activate
from .abi import function, storage, used
from .floats import narrow, widen
from .schedule import Grid

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...problem import Problem
    from .abi import Buffer, Expr
    from .schedule import GpuSchedule

# Bytes that shared memory delivers at once, and that cp.async and ldmatrix move at once.
_LINE = 128
_CHUNK = 16
# Bytes of W and X that a stage should hold: enough copies in flight, and few barriers, in three or four stages.
_STAGE = 12 << 10
# Accumulators a thread, so that two thread blocks of 256 threads fit the registers of a multiprocessor.
_MAX_ACCUMULATORS = 64
# mma.sync by dtype: its name, and the inputs it takes.
_MMA = {
    "float16": ("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", 16),
    "bfloat16": ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", 16),
    "float32": ("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", 8),
}


@dataclass(frozen=True, slots=True)
class Tiling:
    """What a thread block does, from a problem and a schedule.

    Attributes:
        panels: of a part; `outputs` in all.
        parts: of a block row.
        depth: kept inputs a chunk, a power of two.
        warps: along outputs, rows and inputs; (0, 0, 0) where the schedule's warps cannot share the work.
        gather: adjacent inputs of X that one copy may take.
        store: adjacent outputs of Y that one store may take.
    """

    panels: int
    outputs: int
    parts: int
    depth: int
    warps: tuple[int, int, int]
    gather: int
    store: int


@lru_cache(maxsize=512)
def tiling(problem: Problem, schedule: GpuSchedule) -> Tiling:
    """How `schedule` cuts `problem`."""
    rows, size = schedule.tile_rows, itemsize(problem.dtype)
    # Few rows: small parts, so that more thread blocks read the weight. Many rows: large ones, which gather X once.
    limit = 64 if rows <= 32 else 128
    fits = [n for n in range(1, problem.panels + 1) if problem.panels % n == 0 and n * problem.panel <= limit]
    panels = max(fits, default=1)
    outputs = panels * problem.panel
    kept = max(round(problem.density * problem.in_features), 1)
    depth = min(_STAGE // size // (outputs + rows), 256, 2 * kept - 1)
    depth = max(1 << (depth.bit_length() - 1), 32)
    vector = _CHUNK // size
    return Tiling(
        panels=panels,
        outputs=outputs,
        parts=problem.panels // panels,
        depth=depth,
        warps=_share(outputs, rows, depth, size, _MMA[problem.dtype][1], schedule.warps),
        gather=math.gcd(problem.block[1], problem.in_features, vector),
        store=math.gcd(problem.block[0], problem.out_features, vector),
    )


def _share(outputs: int, rows: int, depth: int, size: int, step: int, warps: int) -> tuple[int, int, int]:
    """The number of warps along outputs, rows and inputs that moves the fewest bytes out of shared memory.

    Warps along the outputs each read all of X, warps along the rows all of W; warps along the inputs read nothing
    twice but each have sums of their own, which are written and read once more.
    """

    def cost(share: tuple[int, int, int]) -> tuple[bool, int, int]:
        m, n, k = share
        chunks = 8  # of a typical part
        read = chunks * depth * size * (n * outputs + m * rows)
        return outputs * rows // (m * n * 32) > _MAX_ACCUMULATORS, read + 8 * k * outputs * rows, k

    shares = [
        (m, n, warps // (m * n))
        for m in range(1, warps + 1)
        for n in range(1, warps + 1)
        if warps % (m * n) == 0
        and outputs % (16 * m) == 0
        and rows % (8 * n) == 0
        and depth % (step * (warps // (m * n))) == 0
    ]
    return min(shares, key=cost, default=(0, 0, 0))


def obstacle(problem: Problem, schedule: GpuSchedule, arch: str) -> str:
    """Why this kernel cannot serve this problem, or ""."""
    if problem.panel % 16:
        return f"panels of {problem.panel} outputs are no multiple of the 16 that a tensor core multiplies at once"
    if schedule.tile_rows % 8 or schedule.tile_rows < 8:
        return f"tiles of {schedule.tile_rows} rows are no multiple of the 8 that a tensor core multiplies at once"
    if schedule.stages < 2:
        return "copies run while the tensor cores compute only with 2 stages or more"
    if schedule.blocks_per_sm:
        return "this kernel is not persistent"
    if schedule.warps & (schedule.warps - 1) or not any(tiling(problem, schedule).warps):
        return f"{schedule.warps} warps cannot share a tile evenly"
    (grid,) = grids(problem, schedule)
    # PTX, "compute_90", is for the architecture of its number and later ones.
    limit = min(
        target.shared_bytes for target in TABLE.values() if target.arch.rstrip("a") in arch.replace("compute", "sm")
    )
    if grid.shared_bytes > limit:
        return f"{grid.shared_bytes} bytes of shared memory are more than the {limit} of {arch}"
    return ""


def grids(problem: Problem, schedule: GpuSchedule) -> tuple[Grid, ...]:
    """One launch: a thread block a part of a block row and tile of rows."""
    tile, rows = tiling(problem, schedule), schedule.tile_rows
    stages = schedule.stages * (tile.outputs + rows) * tile.depth * itemsize(problem.dtype)
    sums = tile.warps[2] * rows * _pitch(tile) * 4
    return (
        Grid(
            units=problem.block_rows * tile.parts,
            tile_rows=rows,
            threads=32 * schedule.warps,
            shared_bytes=max(stages, sums),
        ),
    )


def workspace(problem: Problem, schedule: GpuSchedule) -> int:
    """No scratch memory."""
    return 0


def _pitch(tile: Tiling) -> int:
    """Sums from a row to the next in shared memory: the four rows that a warp writes at once lie in different banks."""
    return tile.outputs + 4


def emit(problem: Problem, schedule: GpuSchedule, symbol: str) -> Any:
    """The TVM function `symbol` for this problem and schedule."""
    from tvm.script.ir_builder import IRBuilder

    with IRBuilder() as builder, function(problem, symbol, used(problem, "order")) as arguments:
        _Emitter(problem, schedule, arguments).body()
    return builder.get()


class _Emitter:
    """Emits one function; its methods are the loop nest from the outside in.

    Shared memory is counted in elements of the problem's dtype. "Chunks" of 16 bytes are interchanged in it (see
    `swizzle_weights` and `swizzle_inputs`), so that what a warp reads at once lies in different banks.
    """

    def __init__(self, problem: Problem, schedule: GpuSchedule, arguments: dict[str, Any]) -> None:
        from tvm.tirx.script import builder

        self.T: Any = builder
        self.problem, self.schedule, self.args = problem, schedule, arguments
        self.tile = tile = tiling(problem, schedule)
        (self.grid,) = grids(problem, schedule)
        self.itemsize = itemsize(problem.dtype)
        self.vector = _CHUNK // self.itemsize
        self.mma, self.step = _MMA[problem.dtype]
        self.tf32 = problem.dtype == "float32"
        # Tiles of 16 outputs and of 8 rows that a warp holds.
        self.tiles_m = tile.outputs // (16 * tile.warps[0])
        self.tiles_n = schedule.tile_rows // (8 * tile.warps[1])
        # Copies of X: threads beside each other take adjacent inputs.
        across = tile.depth // tile.gather
        self.columns = max(across // self.grid.threads, 1)
        self.across = min(across, self.grid.threads)
        self.rows_at_once = self.grid.threads // self.across
        self.row_passes = -(-schedule.tile_rows // self.rows_at_once)
        # cp.async takes at least 4 bytes; single 16-bit elements go through registers.
        self.by_registers = tile.gather * self.itemsize < 4

    # ---- The thread block ----

    def body(self) -> None:
        T, p = self.T, self.problem
        tiles = T.ceildiv(self.args["rows"], T.int64(self.schedule.tile_rows))
        block_idx = T.launch_thread("blockIdx.x", tiles * self.grid.units)
        with block_idx as block, T.launch_thread("threadIdx.x", self.grid.threads) as self.thread:
            self.first_row = T.Bind(block // self.grid.units * self.schedule.tile_rows)
            self.memory = T.alloc_buffer(
                (self.grid.shared_bytes // self.itemsize,), storage(p.dtype), scope="shared.dyn"
            )
            self.part_of_block_row(T.Bind(T.cast(block % self.grid.units, "int32")))

    def part_of_block_row(self, unit: Expr) -> None:
        """Part `unit % parts` of the block row that is `unit // parts` in `order`, for one tile of rows."""
        T, p, tile, stages = self.T, self.problem, self.tile, self.schedule.stages
        block_row = T.Bind(self.args["order"][unit // tile.parts])
        self.warp, self.lane = T.Bind(self.thread // 32), T.Bind(self.thread % 32)
        self.output = T.Bind(block_row * p.block[0])
        self.part = T.Bind(unit % tile.parts * tile.outputs)
        self.first = T.Bind(self.args["indptr"][block_row])
        self.kept = T.Bind((self.args["indptr"][block_row + 1] - self.first) * p.block[1])
        self.stream = T.Bind(
            T.cast(self.first, "int64") * (p.block[1] * p.panels * p.panel)
            + T.cast(self.part, "int64") * T.cast(self.kept, "int64")
        )
        chunks = T.Bind(T.ceildiv(self.kept, tile.depth))
        wm, wn, _ = tile.warps
        self.warp_m = T.Bind(self.warp % wm)
        self.warp_n = T.Bind(self.warp // wm % wn)
        self.warp_k = T.Bind(self.warp // (wm * wn))
        self.sums = self.local(4 * self.tiles_m * self.tiles_n, "float32")
        for i in range(4 * self.tiles_m * self.tiles_n):
            T.buffer_store(self.sums, T.float32(0), [i])
        self.column = self.local(stages * self.columns, "int32")
        self.fetched = self.local(self.columns * self.row_passes, storage(p.dtype)) if self.by_registers else None
        # Step 1. Fill all stages but one. What waits for indices stands behind what does not.
        for stage in range(stages):
            self.load_columns(stage, stage)
        for stage in range(stages - 1):
            self.copy_weights(stage, stage)
        for stage in range(stages - 1):
            self.copy_inputs(stage, stage)
            self.place_inputs(stage)
            self.ptx("cp.async.commit_group")
        # Step 2. Each turn multiplies one chunk and refills the stage of the turn before it.
        with T.serial(chunks) as chunk:
            self.ptx("cp.async.wait_group", stages - 2)
            self.barrier()
            ahead, free = T.Bind(chunk + (stages - 1)), T.Bind((chunk + (stages - 1)) % stages)
            with T.If(ahead < chunks), T.Then():
                self.copy_weights(ahead, free)
                self.copy_inputs(free, stages - 1)
            self.ptx("cp.async.commit_group")
            self.load_columns(ahead + 1, stages - 1)
            self.multiply(T.Bind(chunk % stages))
            with T.If(ahead < chunks), T.Then():
                self.place_inputs(free)
        # Step 3. The sums meet in shared memory, where rows of Y are whole. Step 1 may have filled stages of no chunk.
        self.ptx("cp.async.wait_group", 0)
        self.barrier()
        self.lay_out_sums()
        self.barrier()
        self.store()

    # ---- From global to shared memory ----

    def copy_weights(self, chunk: Expr, stage: Expr) -> None:
        """Start the copies of a chunk of W, all panels of the part."""
        T, p, tile = self.T, self.problem, self.tile
        per_row = p.panel // self.vector  # 16-byte chunks an input
        per_panel = tile.depth * per_row
        count = tile.panels * per_panel
        for i in range(-(-count // self.grid.threads)):
            n = self.thread + i * self.grid.threads
            with self.only(n, count, most=(i + 1) * self.grid.threads):
                panel, place = n // per_panel, n % per_panel
                k = place // per_row
                # Panels of 64 in 16 bits are stored as `swizzle_weights` wants them.
                swizzled = self.itemsize == 2 and p.panel == SWIZZLED_PANEL
                column = place % per_row if swizzled else self.swizzle_weights(k, place % per_row)
                to = self.weights_at(stage) + (panel * per_panel + k * per_row + column) * self.vector
                stream = T.cast(panel, "int64") * p.panel * T.cast(self.kept, "int64") if tile.panels > 1 else 0
                start = self.stream + stream + T.cast(chunk * (tile.depth * p.panel) + place * self.vector, "int64")
                valid = T.Select(chunk * tile.depth + k < self.kept, T.uint32(_CHUNK), T.uint32(0))
                self.ptx(
                    "cp.async.cg.shared.global",
                    self.memory.ptr_to([to]),
                    self.args["values"].ptr_to([start]),
                    _CHUNK,
                    valid,
                )

    def load_columns(self, chunk: Expr, slot: int) -> None:
        """Which inputs of X this thread copies for a chunk, -1 for those beyond the kept ones."""
        T, cols = self.T, self.problem.block[1]
        for i in range(self.columns):
            k = T.Bind(chunk * self.tile.depth + (self.thread % self.across + i * self.across) * self.tile.gather)
            index = self.args["indices"][self.first + k // cols] + k % cols
            T.buffer_store(self.column, T.if_then_else(k < self.kept, index, -1), [slot * self.columns + i])

    def inputs(self) -> Iterator[tuple[int, int, Expr, Expr]]:
        """This thread's share of a chunk of X: column, pass, row of the tile, and where in the stage it goes."""
        for i in range(self.columns):
            for j in range(self.row_passes):
                row = self.thread // self.across + j * self.rows_at_once
                k = (self.thread % self.across + i * self.across) * self.tile.gather
                place = (
                    row * self.tile.depth + self.swizzle_inputs(row, k // self.vector) * self.vector + k % self.vector
                )
                yield i, j, row, place

    def copy_inputs(self, stage: Expr, slot: int) -> None:
        """Start the copies of a chunk of X, or fetch it into registers; rows beyond the last are the last again."""
        T, p = self.T, self.problem
        for i, j, row, place in self.inputs():
            column = self.column[slot * self.columns + i]
            with self.only(row, self.schedule.tile_rows, most=(j + 1) * self.rows_at_once):
                start = T.min(self.first_row + T.cast(row, "int64"), self.args["rows"] - 1) * p.in_features
                if self.fetched is not None:
                    value = self.args["x"][start + T.cast(column, "int64")]
                    value = T.if_then_else(column >= 0, value, T.cast(0, storage(p.dtype)))
                    T.buffer_store(self.fetched, value, [i * self.row_passes + j])
                    continue
                size = self.tile.gather * self.itemsize
                self.ptx(
                    "cp.async.ca.shared.global",
                    self.memory.ptr_to([self.inputs_at(stage) + place]),
                    self.args["x"].ptr_to([start + T.cast(T.max(column, 0), "int64")]),
                    size,
                    T.Select(column >= 0, T.uint32(size), T.uint32(0)),
                )

    def place_inputs(self, stage: Expr) -> None:
        """Store what `copy_inputs` fetched into registers, if it did."""
        if self.fetched is None:
            return
        for i, j, row, place in self.inputs():
            with self.only(row, self.schedule.tile_rows, most=(j + 1) * self.rows_at_once):
                value = self.fetched[i * self.row_passes + j]
                self.T.buffer_store(self.memory, value, [self.inputs_at(stage) + place])

    # ---- Tensor cores ----

    def multiply(self, stage: Expr) -> None:
        """Add one chunk to this warp's sums."""
        tile = self.tile
        left, right = self.local(4 * self.tiles_m, "uint32"), self.local(2 * self.tiles_n, "uint32")
        for i in range(tile.depth // (self.step * tile.warps[2])):
            step = self.warp_k + i * tile.warps[2]
            self.load_inputs(right, stage, step)
            self.load_weights(left, stage, step)
            for m in range(self.tiles_m):
                for n in range(self.tiles_n):
                    at = 4 * (m * self.tiles_n + n)
                    sums = [self.sums[at + r] for r in range(4)]
                    a, b = [left[4 * m + r] for r in range(4)], [right[2 * n + r] for r in range(2)]
                    self.ptx(self.mma, *sums, *a, *b, *sums)

    def load_weights(self, left: Buffer, stage: Expr, step: Expr) -> None:
        """This warp's left operands [16 outputs, step] of a step."""
        p, tile, lane = self.problem, self.tile, self.lane
        for m in range(self.tiles_m):
            output = (self.warp_m * self.tiles_m + m) * 16
            panel, first = output // p.panel, output % p.panel // self.vector
            base = self.weights_at(stage) + panel * (tile.depth * p.panel)
            if not self.tf32:
                # Matrices: inputs 0-7 by outputs 0-7, outputs 8-15 beside them, then inputs 8-15.
                k = step * 16 + lane // 16 * 8 + lane % 8
                at = base + k * p.panel + self.swizzle_weights(k, first + lane // 8 % 2) * 8
                to = [left[4 * m + r] for r in range(4)]
                self.ptx("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16", *to, self.memory.ptr_to([at]))
                continue
            for r in range(4):
                # Register r holds output lane / 4 + 8 (r % 2) of input lane % 4 + 4 (r / 2).
                k, place = step * 8 + lane % 4 + r // 2 * 4, lane // 4 + r % 2 * 8
                at = base + k * p.panel + self.swizzle_weights(k, first + place // 4) * 4 + place % 4
                self.ptx("cvt.rna.tf32.f32", left[4 * m + r], self.memory[at])

    def load_inputs(self, right: Buffer, stage: Expr, step: Expr) -> None:
        """This warp's right operands [step, 8 rows] of a step."""
        lane, n = self.lane, 0
        while n < self.tiles_n:
            # Matrices of 8 rows by 16 bytes: the two of a tile, and those of the next where there is one.
            pair = n + 1 < self.tiles_n
            row = (self.warp_n * self.tiles_n + n) * 8 + (lane // 16 * 8 if pair else 0) + lane % 8
            at = self.inputs_at(stage) + row * self.tile.depth
            at = at + self.swizzle_inputs(row, step * 2 + lane // 8 % 2) * self.vector
            to = [right[2 * n + r] for r in range(4 if pair else 2)]
            self.ptx(f"ldmatrix.sync.aligned.m8n8.x{len(to)}.shared.b16", *to, self.memory.ptr_to([at]))
            n += len(to) // 2
        for r in range(2 * self.tiles_n if self.tf32 else 0):
            self.ptx("cvt.rna.tf32.f32", right[r], self.T.reinterpret("float32", right[r]))

    # ---- Sums and epilogue ----

    def lay_out_sums(self) -> None:
        """This warp's sums to shared memory, [warp along the inputs][row][output]."""
        T, lane = self.T, self.lane
        self.laid = T.decl_buffer((self.grid.shared_bytes // 4,), data=self.memory.data, scope="shared.dyn")
        for m in range(self.tiles_m):
            for n in range(self.tiles_n):
                for r in range(4):
                    # Register r holds output lane / 4 + 8 (r / 2) of row 2 (lane % 4) + r % 2.
                    output = (self.warp_m * self.tiles_m + m) * 16 + lane // 4 + r // 2 * 8
                    row = (self.warp_n * self.tiles_n + n) * 8 + lane % 4 * 2 + r % 2
                    at = (self.warp_k * self.schedule.tile_rows + row) * _pitch(self.tile) + output
                    T.buffer_store(self.laid, self.sums[4 * (m * self.tiles_n + n) + r], [at])

    def store(self) -> None:
        """Y of the tile, adjacent outputs by adjacent threads."""
        T, p, tile = self.T, self.problem, self.tile
        across = tile.outputs // tile.store
        count = self.schedule.tile_rows * across
        sums = self.local(tile.store, "float32")
        with T.serial(-(-count // self.grid.threads)) as i:
            n = T.Bind(i * self.grid.threads + self.thread)
            row, within = T.Bind(n // across), T.Bind(n % across * tile.store)
            y_row, output = T.Bind(self.first_row + T.cast(row, "int64")), T.Bind(self.output + self.part + within)
            valid = T.And(y_row < self.args["rows"], output < p.out_features)
            valid = T.And(valid, self.part + within < p.block[0])
            with T.If(T.And(n < count, valid)), T.Then():
                for warp in range(tile.warps[2]):
                    at = (warp * self.schedule.tile_rows + row) * _pitch(tile) + within
                    self.add(sums, at, first=warp == 0)
                self.finish(sums, y_row * p.out_features + T.cast(output, "int64"), output)

    def add(self, sums: Buffer, at: Expr, *, first: bool) -> None:
        """Add the adjacent sums from `at` on in shared memory; the first ones are what others are added to."""
        T, width = self.T, min(self.tile.store, 4)
        for v in range(0, self.tile.store, width):
            part = self.laid[adjacent(at + v, width)]
            here = adjacent(v, width)
            T.buffer_store(sums, part if first else sums[here] + part, [here])

    def finish(self, sums: Buffer, at: Expr, output: Expr) -> None:
        """The epilogue of the sums of adjacent outputs from `output` on, and their store to Y from `at` on."""
        T, p, width = self.T, self.problem, self.tile.store
        here = adjacent(0, width)
        read, narrowed = {}, []
        for name, where in (("bias", output), ("residual", at)):
            if name in self.args:
                read[name] = self.local(width, storage(p.dtype))
                T.buffer_store(read[name], self.args[name][adjacent(where, width)], [here])
        for v in range(width):
            value = sums[v]
            if "bias" in read:
                value = value + widen(read["bias"][v], p.dtype)
            value = activate(value, p.epilogue, lanes=1)
            if "residual" in read:
                value = value + widen(read["residual"][v], p.dtype)
            narrowed.append(narrow(value, p.dtype))
        size = 4 // self.itemsize
        if width % size:
            T.buffer_store(self.args["y"], narrowed[0], [at])
            return
        # The CUDA compiler would take a plain store of a vector apart.
        words = [self.word(narrowed[v : v + size]) for v in range(0, width, size)]
        vector = f".v{len(words)}" if len(words) > 1 else ""
        self.ptx(f"st.global{vector}.b32", self.args["y"].ptr_to([at]), *words)

    def word(self, elements: list[Expr]) -> Expr:
        """One or two elements as they are stored -> 32 bits."""
        T = self.T
        if len(elements) == 1:
            return T.reinterpret("uint32", elements[0])
        low, high = (T.cast(element, "uint32") for element in elements)
        return low | high << T.uint32(16)

    # ---- Places ----

    def weights_at(self, stage: Expr) -> Expr:
        """Where W of a stage starts in shared memory: [panel][input][output]."""
        return stage * ((self.tile.outputs + self.schedule.tile_rows) * self.tile.depth)

    def inputs_at(self, stage: Expr) -> Expr:
        """Where X of a stage starts: [row][input]."""
        return self.weights_at(stage) + self.tile.outputs * self.tile.depth

    def swizzle_weights(self, k: Expr, chunk: Expr) -> Expr:
        """Where 16-byte chunk `chunk` of the outputs of input k stands.

        For 16 bits the 8 inputs that `ldmatrix` reads of one chunk fall in different banks, and panels of 64 are as
        `SparseMatrix` has them. For TF32 it is 4 inputs of two adjacent chunks.
        """
        chunks = self.problem.panel // self.vector
        line = k * chunks * _CHUNK // _LINE
        return chunk ^ (line % (chunks // 2) * 2 if self.tf32 else line % chunks)

    def swizzle_inputs(self, row: Expr, chunk: Expr) -> Expr:
        """The same for the inputs of a row of X: 8 rows of one chunk fall in different banks."""
        chunks = min(self.tile.depth // self.vector, _LINE // _CHUNK)
        return chunk ^ (row * chunks * _CHUNK // _LINE % chunks)

    # ---- Statements ----

    def local(self, size: int, dtype: str) -> Buffer:
        """Registers, where every index is a constant."""
        return self.T.alloc_buffer((size,), dtype, scope="local")

    def ptx(self, instruction: str, *operands: Expr) -> None:
        self.T.evaluate(self.T.ptx[instruction](*operands))

    def barrier(self) -> None:
        """Of the thread block."""
        self.T.evaluate(self.T.tvm_storage_sync("shared.dyn"))

    @contextmanager
    def only(self, n: Expr, count: int, *, most: int) -> Iterator[None]:
        """Statements for n < count, where n < `most` in any case."""
        if most <= count:
            yield
            return
        with self.T.If(n < count), self.T.Then():
            yield


def adjacent(start: Expr, size: int) -> Expr:
    """`size` elements from `start` on, as one vector."""
    from tvm.tirx.script import builder as T

    return T.Ramp(T.cast(start, "int64"), T.int64(1), size) if size > 1 else start

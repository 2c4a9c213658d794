"""Warpgroup tensor cores (Hopper) for many rows: the weight is the A operand, the gathered rows of X are B.

    persistent thread block, for tile (one or two panels of 64 outputs x tile_rows rows of X):
        producer warpgroup                              two consumer warpgroups
        for 64 kept inputs:                             for 64 kept inputs:
            wait until the stage is empty                   wait until the stage is full
            W [64 inputs][64 outputs] by one bulk copy      for 16 inputs:
                a panel, X [rows][64 inputs] by 16-byte         acc[64 outputs, n rows] += W[16, 64].T @ X[n, 16].T
                copies, 32 bytes and more a block and row   stage is empty
            stage is full when both have arrived        Y[rows, outputs] = epilogue(acc), by way of shared memory

A block row with an even number of panels gives each consumer a panel, and both read the same rows of X; an odd one
gives each consumer half of the rows, and both read the same panel.

**Traffic.** A tile of 128 outputs and 256 rows needs, for 16 kept inputs, 4 KB of W and 8 KB of X from the second-level
cache for 2 * 128 * 256 * 16 operations: 85 a byte. At half of an H200's dense rate (495 TFLOP/s) that is 5.8 TB/s,
about what its second-level cache delivers, and so what bounds this kernel: an input of X serves only the 128 outputs
that share a block, whatever the tile. A tile of 256 x 128 has the same traffic, and a larger one has no registers for
its sums (128 x 256 float32 are half of the register file). One panel and 2 * 192 rows have 56 operations a byte, so
blocks of 64 outputs reach a third of the dense rate at best. Shared memory is written 12 KB and read 20 KB (each
consumer reads its 2 KB of W and all 8 KB of X) in the 512 cycles that half the rate takes, half of its 128 bytes a
cycle. In that time the producer's warps issue 16 copies, each of 16 pieces of 32 bytes.

**Prediction** for an H200, 8192 x 8192 in blocks of 128 x 16, 4096 rows, float16, not measured: with 5.5 TB/s from the
second-level cache, 7.76 tiles on each of 132 multiprocessors, and 3,000 cycles a tile for an epilogue that only the
copies for the next tile overlap, 0.38, 0.26 and 0.14 ms at 70, 80 and 90 % zeros. cuBLAS takes 0.79 ms at 700 TFLOP/s:
2.1, 3.1 and 5.8 times as long. All of it supposes that the cache is kept busy throughout, so these are upper limits.

**Order.** Tiles come in groups of rows whose X (16 MB) stays in the second-level cache while the weight streams by;
inside a group the block rows with most blocks come first, each with all its tiles of rows, so that blocks that run
together also share W. Every second wave runs through the thread blocks backwards, which evens out falling work.

**Operands in shared memory** (PTX ISA, "Strides" and "Shared Memory Matrix Layout"; CUTLASS, `mma_sm90_desc.hpp`), both
in the 128-byte swizzle: the 16-byte chunk j of the 128-byte row r stands at chunk j ^ (r % 8).

* W is "MN-major": a row of 128 bytes holds the 64 outputs of one input. CUTLASS's canonical layout, in outputs with
  T = 8 of them in 16 bytes, is ((T, 8, m), (8, k)) : ((1, T, LBO), (8T, SBO)): 8 inputs are an atom of 1,024 bytes, the
  next 8 follow after SBO = 1,024 bytes, and the next 64 outputs after LBO, which 64 outputs never reach (m = 1). 16
  inputs are two atoms, so the next step of 16 starts 2,048 bytes later.
* X is K-major: a row of 128 bytes holds 64 inputs of one row of X; 8 rows are an atom, the next 8 follow after SBO =
  1,024 bytes; LBO is not used. The next step of 16 inputs starts 32 bytes later: the swizzle is a function of the
  address, so a start inside the atom is allowed.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...target.cuda import TABLE
from ..elementwise import activate
from .abi import function, used
from .floats import widen
from .schedule import Grid

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...problem import Problem
    from .abi import Buffer, Expr
    from .schedule import GpuSchedule

_WARPGROUP = 128
# Kept inputs a stage: with 16 bits, 128 bytes of a row of X.
_STAGE = 64
_PANEL = 64
# Bytes of a panel in a stage; also of 64 rows of X in a stage, and of a consumer's buffer for its epilogue.
_TILE_BYTES = 8192
# Registers a thread after `setmaxnreg`: 128 * 40 + 256 * 232 <= 65,536.
_PRODUCER_REGISTERS, _CONSUMER_REGISTERS = 40, 232
# X of a group of tiles (see "Order"): a third of the second-level cache.
_GROUP_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class _Tile:
    """What a thread block computes at once.

    Attributes:
        panels: 2 where the consumers share the rows of X, 1 where they share the panel.
        rows: of X.
        stages: of the ring in shared memory.
    """

    panels: int
    rows: int
    stages: int

    @classmethod
    def of(cls, problem: Problem, schedule: GpuSchedule) -> _Tile:
        return cls(2 - problem.panels % 2, schedule.tile_rows, schedule.stages)

    @property
    def consumer_rows(self) -> int:
        """Rows of X of one consumer, N of its instructions."""
        return self.rows * self.panels // 2

    @property
    def stage_bytes(self) -> int:
        return self.panels * _TILE_BYTES + self.rows * _STAGE * 2

    @property
    def staging(self) -> int:
        """Offset of the consumers' buffers, behind the ring."""
        return self.stages * self.stage_bytes

    @property
    def barriers(self) -> int:
        """Offset of the barriers: one a stage for full, then one a stage for empty."""
        return self.staging + 2 * _TILE_BYTES

    @property
    def shared_bytes(self) -> int:
        return self.barriers + 2 * self.stages * 8


def obstacle(problem: Problem, schedule: GpuSchedule, arch: str) -> str:
    """Why this kernel cannot serve `problem` with `schedule` on `arch`, or ""."""
    rows, cols = problem.block
    tile = _Tile.of(problem, schedule)
    if arch != "sm_90a":
        return f"{arch} has no wgmma instructions; only sm_90a has"
    if problem.dtype not in ("float16", "bfloat16"):
        return f"wgmma wants 16-bit values, not {problem.dtype}"
    if rows % _PANEL or cols % 16:
        return f"wgmma wants blocks of a multiple of 64 outputs and of 16 inputs, not {rows}x{cols}"
    if problem.in_features % 8 or problem.out_features % 8:
        return f"rows of {problem.in_features} inputs or {problem.out_features} outputs are not whole 16-byte pieces"
    if schedule.warps != 12 or schedule.blocks_per_sm != 1:
        return "wgmma runs with 12 warps, persistent, one thread block a multiprocessor"
    if tile.consumer_rows not in (64, 128, 192, 256):
        return f"{tile.consumer_rows} rows of X a warpgroup: wgmma takes 64, 128, 192 or 256"
    if tile.stages < 3:
        return f"{tile.stages} stages: the ring needs 3 to hide the copies"
    if tile.shared_bytes > TABLE[arch].shared_bytes:
        return f"{tile.shared_bytes} bytes of shared memory are more than the {TABLE[arch].shared_bytes} of {arch}"
    return ""


def grids(problem: Problem, schedule: GpuSchedule) -> tuple[Grid, ...]:
    """The one launch."""
    tile = _Tile.of(problem, schedule)
    units = problem.block_rows * problem.panels // tile.panels
    return (Grid(units, tile.rows, 3 * _WARPGROUP, tile.shared_bytes, blocks_per_sm=1),)


def workspace(problem: Problem, schedule: GpuSchedule) -> int:
    """float32 of scratch memory for each row of X: none."""
    return 0


def emit(problem: Problem, schedule: GpuSchedule, symbol: str) -> Any:
    """The TVM function `symbol` for this problem and schedule."""
    from tvm.script.ir_builder import IRBuilder

    with IRBuilder() as builder, function(problem, symbol, used(problem, "order")) as args:
        _Emitter(problem, _Tile.of(problem, schedule), args).body()
    return builder.get()


@dataclass(frozen=True, slots=True)
class _Work:
    """One tile of the output as a thread block sees it.

    Attributes:
        row: first row of X, int64.
        output: first output.
        panel: first panel, counted in the block row.
        first, blocks: the block row's blocks.
        chunks: stages that it takes.
    """

    row: Expr
    output: Expr
    panel: Expr
    first: Expr
    blocks: Expr
    chunks: Expr


class _Emitter:
    """Emits one function; numbers are int32, addresses in shared memory uint32, indices into tensors int64."""

    def __init__(self, problem: Problem, tile: _Tile, args: dict[str, Any]) -> None:
        from tvm.tirx.script import builder

        self.T: Any = builder
        self.problem, self.tile, self.args = problem, tile, args
        self.units = problem.block_rows * problem.panels // tile.panels
        # Tiles of rows in a group, see "Order" above.
        self.group = max(1, _GROUP_BYTES // (tile.rows * problem.in_features * 2))

    def ptx(self, instruction: str, *operands: Expr) -> None:
        self.T.evaluate(self.T.ptx[instruction](*operands))

    def registers(self, size: int, dtype: str) -> Buffer:
        return self.T.alloc_buffer((size,), dtype, scope="local")

    def keep(self, value: Expr, dtype: str = "int32") -> Expr:
        """`value` in a register: unlike a binding, TVM neither computes it again at every use nor on the host."""
        register = self.registers(1, dtype)
        self.T.buffer_store(register, value, [0])
        return register[0]

    def body(self) -> None:
        T, tile, rows = self.T, self.tile, self.args["rows"]
        with (
            T.launch_thread("blockIdx.x", T.ceildiv(rows, T.int64(tile.rows)) * self.units) as block,
            T.launch_thread("threadIdx.x", 3 * _WARPGROUP) as thread,
            # Without this bound `setmaxnreg` is ignored.
            T.attr({"tirx.launch_bounds_min_blocks_per_sm": 1}),
        ):
            self.thread, self.block = thread, self.keep(T.cast(block, "int32"))
            self.rows = self.keep(rows, "int64")
            self.row_tiles = self.keep(T.cast(T.truncdiv(self.rows + (tile.rows - 1), T.int64(tile.rows)), "int32"))
            shared = T.alloc_buffer((tile.shared_bytes,), "uint8", scope="shared.dyn", align=1024)
            self.shared = self.keep(T.cuda.cvta_generic_to_shared(T.address_of(shared[0])), "uint32")
            self.init_barriers()
            with T.If(thread < _WARPGROUP):
                with T.Then():
                    self.produce()
                with T.Else():
                    self.consume()

    def init_barriers(self) -> None:
        T = self.T
        with T.If(self.thread == 0), T.Then():
            for stage in range(self.tile.stages):
                # Every producer's copies of X, and the one announcement of the bytes of W.
                self.ptx("mbarrier.init.shared.b64", self.full(stage), T.uint32(_WARPGROUP + 1))
                # The warps of the consumers.
                self.ptx("mbarrier.init.shared.b64", self.empty(stage), T.uint32(8))
            self.ptx("fence.mbarrier_init.release.cluster")
        T.evaluate(T.cuda.cta_sync())

    def at(self, offset: Expr) -> Expr:
        """The address of byte `offset` of shared memory."""
        return self.shared + self.T.cast(offset, "uint32")

    def full(self, stage: Expr) -> Expr:
        return self.at(self.tile.barriers + stage * 8)

    def empty(self, stage: Expr) -> Expr:
        return self.at(self.tile.barriers + (self.tile.stages + stage) * 8)

    def locate(self, step: Expr) -> tuple[Expr, Expr]:
        """The stage of the ring that the thread block's chunk number `step` uses, and the parity of its barriers."""
        T, stages = self.T, self.tile.stages
        stage = self.keep(T.truncmod(step, stages))
        return stage, self.keep(T.truncmod(T.truncdiv(step, stages), 2))

    @contextmanager
    def each_tile(self) -> Iterator[_Work]:
        """A loop over the tiles of this thread block, in the same order for producer and consumers."""
        T, p, tile, args, keep = self.T, self.problem, self.tile, self.args, self.keep
        tiles = keep(self.row_tiles * self.units)
        grid = keep(T.cuda.mov_sreg(32, "nctaid.x"))
        with T.serial(T.truncdiv(tiles + grid - 1, grid)) as wave:
            turn = T.Select(T.truncmod(wave, 2) == 1, grid - 1 - self.block, self.block)
            number = keep(wave * grid + turn)
            with T.If(number < tiles), T.Then():
                group = keep(T.truncdiv(number, self.units * self.group) * self.group)
                inside = keep(T.truncmod(number, self.units * self.group))
                size = keep(T.min(self.row_tiles - group, self.group))
                row_tile = keep(group + T.truncmod(inside, size))
                unit = keep(T.truncdiv(inside, size))
                in_block_row = p.panels // tile.panels
                block_row = keep(args["order"][T.truncdiv(unit, in_block_row)])
                panel = keep(T.truncmod(unit, in_block_row) * tile.panels)
                first = keep(args["indptr"][block_row])
                blocks = keep(args["indptr"][block_row + 1] - first)
                yield _Work(
                    row=keep(T.cast(row_tile, "int64") * tile.rows, "int64"),
                    output=keep(block_row * p.block[0] + panel * _PANEL),
                    panel=panel,
                    first=first,
                    blocks=blocks,
                    chunks=keep(T.truncdiv(blocks * p.block[1] + (_STAGE - 1), _STAGE)),
                )

    # Producer.

    def produce(self) -> None:
        """Fill the ring: thread t copies the 16-byte chunk t % 8 of the rows t // 8, t // 8 + 16, ... of X."""
        T = self.T
        self.ptx("setmaxnreg.dec.sync.aligned.u32", _PRODUCER_REGISTERS)
        step, column = self.registers(1, "int32"), self.registers(1, "int32")
        T.buffer_store(step, 0, [0])
        with self.each_tile() as work, T.If(work.blocks > 0), T.Then():
            T.buffer_store(column, self.column(work, T.int32(0)), [0])
            with T.serial(work.chunks) as chunk:
                stage, parity = self.locate(step[0] + chunk)
                inputs = self.keep(work.blocks * self.problem.block[1] - chunk * _STAGE)
                T.evaluate(T.cuda.mbarrier_wait(self.empty(stage), parity ^ 1))
                with T.If(self.thread == 0), T.Then():
                    self.copy_weights(work, chunk, stage, T.min(inputs, _STAGE))
                with T.If(T.truncmod(self.thread, 8) * 8 < inputs), T.Then():
                    self.copy_rows(work, stage, column[0])
                self.ptx("cp.async.mbarrier.arrive.noinc.shared.b64", self.full(stage))
                # The index comes while the copies are on their way.
                T.buffer_store(column, self.column(work, chunk + 1), [0])
            T.buffer_store(step, step[0] + work.chunks, [0])

    def column(self, work: _Work, chunk: Expr) -> Expr:
        """The input of X where this thread's 8 inputs of `chunk` start; past the end, those of the last."""
        T, width = self.T, self.problem.block[1]
        k = T.min(chunk * _STAGE + T.truncmod(self.thread, 8) * 8, work.blocks * width - 8)
        return self.args["indices"][work.first + T.truncdiv(k, width)] + T.truncmod(k, width)

    def copy_weights(self, work: _Work, chunk: Expr, stage: Expr, inputs: Expr) -> None:
        """`inputs` inputs of the tile's panels, as they lie in memory."""
        T, p, tile = self.T, self.problem, self.tile
        size = self.keep(T.cast(inputs * (_PANEL * 2), "uint32"), "uint32")
        self.ptx("mbarrier.arrive.expect_tx.shared.b64", self.full(stage), size * T.uint32(tile.panels))
        for panel in range(tile.panels):
            # Panel after panel in a block row, each the stream [blocks * C][64].
            stream = work.first * p.panels + (work.panel + panel) * work.blocks
            start = (T.cast(stream, "int64") * p.block[1] + T.cast(chunk, "int64") * _STAGE) * _PANEL
            self.ptx(
                "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes",
                self.at(stage * tile.stage_bytes + panel * _TILE_BYTES),
                T.address_of(self.args["values"][start]),
                size,
                self.full(stage),
            )

    def copy_rows(self, work: _Work, stage: Expr, column: Expr) -> None:
        """8 inputs from `column` on of every 16th row. Rows beyond the end are left as they are: nobody stores them."""
        T, tile = self.T, self.tile
        row, piece = T.truncdiv(self.thread, 8), T.truncmod(self.thread, 8)
        swizzled = row * 128 + (piece ^ T.truncmod(row, 8)) * 16
        target = self.keep(self.at(stage * tile.stage_bytes + tile.panels * _TILE_BYTES + swizzled), "uint32")
        first = self.keep(work.row + T.cast(row, "int64"), "int64")
        source = self.keep(first * self.problem.in_features + T.cast(column, "int64"), "int64")
        step = _WARPGROUP // 8
        copies = T.truncdiv(T.min(self.rows - first, T.int64(tile.rows)) + (step - 1), T.int64(step))
        with T.serial(T.cast(copies, "int32")) as i:
            # The rest of the cache line is a neighbour block's, which a thread block that runs at the same time wants.
            self.ptx(
                "cp.async.cg.shared.global.L2::128B",
                target + T.cast(i * (step * 128), "uint32"),
                T.address_of(self.args["x"][source + T.cast(i, "int64") * (step * self.problem.in_features)]),
                16,
            )

    # Consumers.

    def consume(self) -> None:
        """Multiply what the ring brings, and store."""
        T, tile = self.T, self.tile
        self.ptx("setmaxnreg.inc.sync.aligned.u32", _CONSUMER_REGISTERS)
        self.lane = self.keep(T.truncmod(self.thread, 32))
        self.warp = self.keep(T.truncmod(T.truncdiv(self.thread, 32), 4))
        self.consumer = self.keep(T.truncdiv(self.thread, _WARPGROUP) - 1)
        self.acc = self.registers(tile.consumer_rows // 2, "float32")
        step = self.registers(1, "int32")
        T.buffer_store(step, 0, [0])
        with self.each_tile() as work:
            with self.unrolled(tile.consumer_rows // 2) as i:
                T.buffer_store(self.acc, T.float32(0), [i])
            with T.serial(work.chunks) as chunk:
                stage, parity = self.locate(step[0] + chunk)
                T.evaluate(T.cuda.mbarrier_wait(self.full(stage), parity))
                inputs = T.min(work.blocks * self.problem.block[1] - chunk * _STAGE, _STAGE)
                self.multiply(stage, T.truncdiv(inputs, 16))
                # The chunk before this one is done with, while this one goes on.
                self.ptx("wgmma.wait_group.sync.aligned", 1)
                with T.If(chunk > 0), T.Then():
                    self.release(step[0] + chunk - 1)
            self.ptx("wgmma.wait_group.sync.aligned", 0)
            with T.If(work.chunks > 0), T.Then():
                self.release(step[0] + work.chunks - 1)
            T.buffer_store(step, step[0] + work.chunks, [0])
            self.epilogue(work)

    def multiply(self, stage: Expr, steps: Expr) -> None:
        """Start acc += W.T @ X.T for `steps` steps of 16 inputs."""
        T, tile = self.T, self.tile
        # Copies of single threads are visible to the tensor cores only behind a fence between the two proxies.
        self.ptx("fence.proxy.async.shared::cta")
        values = stage * tile.stage_bytes
        rows = values + tile.panels * _TILE_BYTES
        if tile.panels == 2:
            values = values + self.consumer * _TILE_BYTES
        else:
            rows = rows + self.consumer * (tile.consumer_rows * 128)
        # Straight where it can be; and each way fences and commits for itself, or ptxas adds synchronisation (C7519).
        with T.If(steps == 4):
            with T.Then():
                self.ptx("wgmma.fence.sync.aligned")
                for k in range(4):
                    self.step(values + k * 2048, rows + k * 32)
                self.ptx("wgmma.commit_group.sync.aligned")
            with T.Else(), T.serial(steps) as k:
                self.ptx("wgmma.fence.sync.aligned")
                self.step(values + k * 2048, rows + k * 32)
                self.ptx("wgmma.commit_group.sync.aligned")

    def step(self, values: Expr, rows: Expr) -> None:
        """Start acc += W.T @ X.T for 16 inputs, at these offsets of shared memory."""
        name = {"float16": "f16", "bfloat16": "bf16"}[self.problem.dtype]
        self.ptx(
            f"wgmma.mma_async.sync.aligned.m64n{self.tile.consumer_rows}k16.f32.{name}.{name}",
            *(self.acc[i] for i in range(self.tile.consumer_rows // 2)),
            self.descriptor(values),
            self.descriptor(rows),
            *(True, 1, 1, 1, 0),  # add to the sums; no negation; A transposed, B not
        )

    def descriptor(self, offset: Expr) -> Expr:
        """Of an operand in the 128-byte swizzle: address, LBO (any) and SBO in 16 bytes, the swizzle in bits 62-63."""
        T = self.T
        address = T.cast(self.at(offset) >> T.uint32(4), "uint64")
        return address | T.uint64(1 << 16 | (1024 >> 4) << 32 | 1 << 62)

    def release(self, step: Expr) -> None:
        """Give the stage of chunk `step` back to the producer, one arrival a warp."""
        with self.T.If(self.lane == 0), self.T.Then():
            self.ptx("mbarrier.arrive.shared.b64", self.empty(self.locate(step)[0]))

    # Epilogue.

    def epilogue(self, work: _Work) -> None:
        """Y = activation(acc + bias) + residual, 64 rows at a time through 8 KB of shared memory.

        A thread's sums belong to outputs 16 * warp + lane // 4 + 8h and rows 8i + 2 * (lane % 4) + v, at
        acc[4i + 2h + v]: `stmatrix` transposes 8 outputs x 8 rows, so that a row's 64 outputs become 128 bytes.
        """
        T, tile, p = self.T, self.tile, self.problem
        # The compiler must not read a sum before the wait above.
        with self.unrolled(tile.consumer_rows // 2) as i:
            T.evaluate(T.cuda.func_call("sparsec_keep", self.acc[i], source_code=_KEEP))
        row, output = work.row, work.output
        if tile.panels == 2:
            output = self.keep(output + self.consumer * _PANEL)
        else:
            row = self.keep(row + T.cast(self.consumer * tile.consumer_rows, "int64"), "int64")
        bias = self.load_bias(output)
        staging = self.keep(self.at(tile.staging + self.consumer * _TILE_BYTES), "uint32")
        # Of the 8x8 matrices 2 * (i % 2) + h, lanes 8m to 8m + 7 hold the addresses of the rows of matrix m.
        inside = T.truncmod(self.lane, 8)
        piece = self.warp * 2 + T.truncmod(T.truncdiv(self.lane, 8), 2)
        matrix = (T.truncdiv(self.lane, 16) * 8 + inside) * 128 + (piece ^ inside) * 16
        matrix = self.keep(staging + T.cast(matrix, "uint32"), "uint32")
        with self.unrolled(tile.consumer_rows // 64) as part:
            first = self.keep(row + T.cast(part, "int64") * 64, "int64")
            with self.unrolled(32) as i:
                value = activate(self.acc[part * 32 + i] + bias[T.truncmod(T.truncdiv(i, 2), 2)], p.epilogue, lanes=1)
                T.buffer_store(self.acc, value, [part * 32 + i])
            self.sync_consumer()
            if p.epilogue.residual:
                self.copy_out(first, output, staging, "residual")
                self.sync_consumer()
            with self.unrolled(4) as i:
                self.transpose(part * 32 + i * 8, matrix + T.cast(i * 2048, "uint32"))
            self.sync_consumer()
            self.copy_out(first, output, staging, "y")

    def unrolled(self, count: int) -> Any:
        """A loop that the CUDA compiler unrolls: TVM would write a long text for every turn."""
        return self.T.unroll(count, annotations={"pragma_unroll_explicit": self.T.bool(False)})

    def sync_consumer(self) -> None:
        self.T.evaluate(self.T.cuda.warpgroup_sync(1 + self.consumer))

    def load_bias(self, output: Expr) -> Buffer:
        """The bias of the thread's two outputs."""
        T, p = self.T, self.problem
        bias = self.registers(2, "float32")
        for h in range(2):
            where = T.min(output + (self.warp * 16 + T.truncdiv(self.lane, 4) + 8 * h), p.out_features - 1)
            value = widen(self.args["bias"][where], p.dtype) if p.epilogue.bias else T.float32(0)
            T.buffer_store(bias, value, [h])
        return bias

    def transpose(self, at: Expr, address: Expr) -> None:
        """Write 16 rows of the sums, from acc[`at`] on, to `address`, where the residual already is if there is one."""
        p = self.problem
        packed, residual = self.registers(4, "uint32"), self.registers(4, "uint32")
        if p.epilogue.residual:
            self.ptx("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16", *(residual[m] for m in range(4)), address)
        name = {"float16": "f16x2", "bfloat16": "bf16x2"}[p.dtype]
        for m in range(4):
            pair = [self.acc[at + (2 * m + v)] for v in range(2)]
            if p.epilogue.residual:
                pair = [value + self.half(residual[m], v) for v, value in enumerate(pair)]
            self.ptx(f"cvt.rn.{name}.f32", packed[m], pair[1], pair[0])
        self.ptx("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16", address, *(packed[m] for m in range(4)))

    def half(self, word: Expr, v: int) -> Expr:
        """Half `v` of two 16-bit values, as float32."""
        T = self.T
        return widen(T.cast(word >> T.uint32(16 * v), "uint16"), self.problem.dtype)

    def copy_out(self, row: Expr, output: Expr, staging: Expr, name: str) -> None:
        """64 rows x 64 outputs of shared memory to `y`, or of `residual` to shared memory, 16 bytes at a time."""
        T, p = self.T, self.problem
        thread = T.truncmod(self.thread, _WARPGROUP)
        piece = T.truncmod(thread, 8)
        words = self.registers(4, "uint32")
        column = output + piece * 8
        with self.unrolled(4) as i:
            inside = T.truncdiv(thread, 8) + i * 16
            line = self.keep(row + T.cast(inside, "int64"), "int64")
            exists = line < self.rows
            if p.out_features % p.block[0]:
                exists = T.And(exists, column < p.out_features)
            with T.If(exists), T.Then():
                memory = T.address_of(self.args[name][line * p.out_features + T.cast(column, "int64")])
                chunk = staging + T.cast(inside * 128 + (piece ^ T.truncmod(inside, 8)) * 16, "uint32")
                read, write = ("shared", "global") if name == "y" else ("global", "shared")
                source, target = (chunk, memory) if name == "y" else (memory, chunk)
                self.ptx(f"ld.{read}.v4.b32", *(words[w] for w in range(4)), source)
                self.ptx(f"st.{write}.v4.b32", target, *(words[w] for w in range(4)))


# An empty statement that reads and writes a register, in its place among the other statements.
_KEEP = """
__forceinline__ __device__ void sparsec_keep(float& value) {
  asm volatile("" : "+f"(value) : : "memory");
}
"""

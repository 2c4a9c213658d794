"""Few rows of X: multiply-adds on the plain cores, as fast as memory delivers the weights.

    thread block = tile of rows, panel, part of the panel's inputs:
        group of threads, one of `groups`, each with its own sums[tile_rows, panel]:
            for every `groups`-th item (`span` inputs) of the part:
                sums[r, :] += X[r, inputs] @ values[item, :]
        sums of all groups meet in shared memory
        Y[tile, panel] = epilogue(sums), or the workspace gets this part's sums and a second launch adds them

A thread's load is 16 bytes wherever the panel allows it, and the loads of a warp are adjacent. X is read through the
cache by the indices of the blocks: the threads of a group read the same input.

What bounds it, for 8192 outputs x 28672 inputs, 90 % zero in blocks of 32x1, float16, on an H200. All of this is
predicted, from the machine code for sm_90a and the datasheet; nothing was measured.
* Memory: 50 MB of weights and indices, 11.6 us at the 4.3 TB/s of a copy; 80 % of that is 14.5 us.
* Latency: 26 KB must be on the way in each multiprocessor (4.3 TB/s, 0.8 us). A thread has `unroll` loads on the way at
  all times, because registers are loaded again as soon as they are used up: 2 thread blocks of 8 warps and 4 loads are
  32 KB. Tiles of up to 4 rows take at most 128 registers, which leaves room for that; 8 rows take 168, and 3 thread
  blocks of 4 warps have 24 KB.
* Instructions: 33, 43, 63, 104 for each 512 bytes of weights with 1, 2, 4, 8 rows, where 14.5 us are time for 150 (4 a
  cycle at 1.8 GHz); 64 of the 104 are the multiply-adds. 16 rows, two tiles of 8, take 208 and so 20 us: tensor cores
  are the better tool from there on.
* X: a thread block reads 82 % of the sectors of a row of its inputs, 12 MB a row in all thread blocks, from the
  second-level cache (about 5.5 TB/s, weights included): 11, 13, 18, 27 us for 1, 2, 4, 8 rows. So from 4 rows on
  `split` pays: with 4 parts, X[8 rows, part] is 115 KB and stays in the first-level cache, where thread blocks with the
  same part share it. The second launch costs about 2 us.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ....ir.sparse_matrix import SWIZZLED_PANEL
from ...problem import itemsize
from ..elementwise import activate
from .abi import function, storage, used
from .floats import narrow, widen
from .schedule import Grid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ...problem import Problem
    from .abi import Buffer, Expr
    from .schedule import GpuSchedule

# The widest load of a thread.
_LOAD_BYTES = 16
# Shared memory in which the sums of a thread block's warps meet; what is left of it caches X.
_SHARED_BYTES = 32 << 10
# Registers for sums and loads in flight, of the 255 that a thread may have: beyond that the compiler spills some.
_MOST_REGISTERS = 160
# Registers that a thread needs for everything else; those of a multiprocessor, and threads that are plenty for it.
_OTHER_REGISTERS, _SM_REGISTERS, _SM_THREADS = 44, 1 << 16, 1024
# Threads a block of the launch that adds the parts of a split.
_REDUCE_THREADS = 256


@dataclass(frozen=True, slots=True)
class _Layout:
    """Which weights a thread takes: one load is `span` inputs of `outputs` adjacent outputs.

    Attributes:
        vector: values a load; the widest that fills whole inputs of a panel, or a whole number of a block's inputs.
        span: inputs a load covers.
        outputs: adjacent outputs that a thread sums.
        lanes: adjacent threads that share an item: `span` inputs of all outputs of a panel.
        groups: such groups of threads a thread block; each takes every `groups`-th item.
        items: items a block.
        wide: whether the inputs of an item are one load of X; blocks that were moved start anywhere.
    """

    vector: int
    span: int
    outputs: int
    lanes: int
    groups: int
    items: int
    wide: bool

    @classmethod
    def of(cls, problem: Problem, schedule: GpuSchedule) -> _Layout:
        panel, inputs = problem.panel, problem.block[1]
        vector = _LOAD_BYTES // itemsize(problem.dtype)
        while panel % vector and (vector % panel or inputs % (vector // panel)):
            vector //= 2
        span = max(1, vector // panel)
        lanes = max(1, panel // vector)
        groups = schedule.warps * 32 // lanes
        wide = span > 1 and problem.in_features % inputs == 0
        return cls(vector, span, vector // span, lanes, groups, inputs // span, wide)


def obstacle(problem: Problem, schedule: GpuSchedule, arch: str) -> str:
    """Why the schedule cannot serve the problem, or ""."""
    registers = _registers(problem, schedule)
    if registers > _MOST_REGISTERS:
        return f"{registers} registers for sums and loads, of {_MOST_REGISTERS} that a thread has for them"
    if schedule.warps * 32 < problem.panel:
        return f"{schedule.warps} warps are fewer threads than a panel's {problem.panel} outputs"
    if schedule.blocks_per_sm:
        return "thread blocks are not persistent here"
    return ""


def _registers(problem: Problem, schedule: GpuSchedule) -> int:
    """Registers of 32 bits for sums, and for the weights, the inputs, the index and an address of each load."""
    layout, size = _Layout.of(problem, schedule), itemsize(problem.dtype)
    inputs = layout.span * size // 4 if layout.wide else layout.span
    load = -(-layout.vector * size // 4) + schedule.tile_rows * inputs + 3
    return schedule.tile_rows * layout.outputs + schedule.unroll * load


def _resident(problem: Problem, schedule: GpuSchedule) -> int:
    """Thread blocks that a multiprocessor has registers for."""
    threads = schedule.warps * 32
    registers = _registers(problem, schedule) + _OTHER_REGISTERS
    return max(1, min(_SM_THREADS // threads, _SM_REGISTERS // (threads * registers)))


def grids(problem: Problem, schedule: GpuSchedule) -> tuple[Grid, ...]:
    """One launch, and one more that adds the parts where the inputs are split."""
    main = Grid(problem.block_rows * problem.panels * schedule.split, schedule.tile_rows, schedule.warps * 32)
    if schedule.split == 1:
        return (main,)
    return main, Grid(-(-problem.out_features // _REDUCE_THREADS), 1, _REDUCE_THREADS)


def workspace(problem: Problem, schedule: GpuSchedule) -> int:
    """float32 of scratch memory for each row of X: [split, N]."""
    return schedule.split * problem.out_features if schedule.split > 1 else 0


def emit(problem: Problem, schedule: GpuSchedule, symbol: str) -> Any:
    """The TVM function `symbol` for this problem and schedule."""
    from tvm.script.ir_builder import IRBuilder

    names = used(problem, *(["workspace"] if schedule.split > 1 else []))
    with IRBuilder() as builder, function(problem, symbol, names, workspace(problem, schedule)) as args:
        _Emitter(problem, schedule, args).launches()
    return builder.get()


@dataclass(frozen=True, slots=True)
class _Work:
    """What a thread block computes, as expressions; int32, but for `row` and `before`, which are int64.

    Attributes:
        row: first row of X of the tile. rows: how many rows of X there are from it on.
        output: first output of the panel. outputs: how many the panel has.
        block: first block of the block row. before: blocks, each of a panel only, that are stored before the panel's.
        begin, end: items of the panel's stream.
        part: which of the parts of the inputs.
    """

    row: Expr
    rows: Expr
    output: Expr
    outputs: Expr
    block: Expr
    before: Expr
    begin: Expr
    end: Expr
    part: Expr


class _Emitter:
    """Emits one function; its methods are in the order of the work."""

    def __init__(self, problem: Problem, schedule: GpuSchedule, args: dict[str, Any]) -> None:
        from tvm.tirx.script import builder

        self.T: Any = builder
        self.problem, self.schedule, self.args = problem, schedule, args
        self.layout = _Layout.of(problem, schedule)
        self.threads = schedule.warps * 32
        self.rows = range(schedule.tile_rows)

    def launches(self) -> None:
        T = self.T
        main, *reduce = grids(self.problem, self.schedule)
        resident = _resident(self.problem, self.schedule)
        # Left alone, the compiler sometimes takes many registers more than it needs. 1 would be leave to take all.
        bounds = T.attr({"tirx.launch_bounds_min_blocks_per_sm": resident}) if resident > 1 else nullcontext()
        with self.launch(main) as (block, thread), bounds:
            sums = T.alloc_buffer((len(self.rows) * self.layout.outputs,), "float32", scope="local")
            work = self.work(block)
            self.sum_items(work, thread, sums)
            self.meet(thread, sums, lambda r, o, value: self.store(work, r, o, value))
        for grid in reduce:
            with self.launch(grid) as (block, thread):
                self.add_parts(T.truncdiv(block, grid.units), T.truncmod(block, grid.units) * grid.threads + thread)

    @contextmanager
    def launch(self, grid: Grid) -> Iterator[tuple[Expr, Expr]]:
        """Open a device function; yields the numbers of the thread block and of the thread, int32."""
        T = self.T
        tiles = T.ceildiv(self.args["rows"], T.int64(grid.tile_rows))
        blocks = T.launch_thread("blockIdx.x", tiles * grid.units)
        with blocks as block, T.launch_thread("threadIdx.x", grid.threads) as thread:
            yield T.Bind(T.cast(block, "int32")), thread

    def work(self, block: Expr) -> _Work:
        """What thread block `block` computes.

        Tiles of rows that share weights are neighbours, so that the cache reads them once; so are the parts of the
        inputs: dealt out in turn to a number of multiprocessors that `split` divides, those that meet on one look at
        the same part of X.
        """
        T, p, size, split = self.T, self.problem, self.schedule.tile_rows, self.schedule.split
        tiles = T.Bind(T.truncdiv(T.cast(self.args["rows"], "int32") + (size - 1), size))
        part, tile = T.truncmod(block, split), T.truncdiv(block, split)
        panel = self.hold(T.truncdiv(tile, tiles), "int32")
        row = self.hold(T.cast(tile - panel * tiles, "int64") * size, "int64")
        block_row, in_row = T.truncdiv(panel, p.panels), T.truncmod(panel, p.panels)
        first = self.hold(self.args["indptr"][block_row], "int32")
        count = self.hold(self.args["indptr"][block_row + 1] - first, "int32")
        before = T.cast(first, "int64") * p.panels + T.cast(in_row * count, "int64")
        share = self.hold(T.truncdiv(count * self.layout.items + (split - 1), split), "int32")
        output = block_row * p.block[0] + in_row * p.panel
        return _Work(
            row=row,
            rows=self.hold(T.cast(self.args["rows"] - row, "int32"), "int32"),
            output=output,
            outputs=T.min(p.panel, T.min(p.block[0] - in_row * p.panel, p.out_features - output)),
            block=first,
            before=self.hold(before, "int64"),
            begin=self.hold(part * share, "int32"),
            end=self.hold(T.min((part + 1) * share, count * self.layout.items), "int32"),
            part=part,
        )

    # ---- Sums of a thread ----

    def sum_items(self, work: _Work, thread: Expr, sums: Buffer) -> None:
        """sums[r, o] = this thread's items of the panel's stream.

        The loads of the next step are issued before this one's registers are used up, those of the step after that
        wait for their indices:

            index = indices of step 0; weights, x = loads of step 0; index = indices of step 1
            for step:
                sums += x * weights
                weights, x = loads of step + 1
                index = indices of step + 2
        """
        T, layout, unroll = self.T, self.layout, self.schedule.unroll
        stored = storage(self.problem.dtype)
        index = T.alloc_buffer((unroll,), "int32", scope="local")
        weights = T.alloc_buffer((unroll * layout.vector,), stored, scope="local")
        x = T.alloc_buffer((unroll * len(self.rows) * layout.span,), stored, scope="local")
        for i in range(len(self.rows) * layout.outputs):
            T.buffer_store(sums, T.float32(0), [i])
        for u in range(unroll):
            T.buffer_store(index, 0, [u])
        group = self.hold(T.truncdiv(thread, layout.lanes), "int32")
        lane = T.truncmod(thread, layout.lanes)
        step = layout.groups * unroll

        def each(number: Expr, body: Callable[[int, Expr], None]) -> None:
            """`body` for the thread's items of a step, but not beyond the last."""
            for u in range(unroll):
                item = work.begin + group + number * step + u * layout.groups
                with T.If(item < work.end), T.Then():
                    body(u, item)

        def load_index(u: int, item: Expr) -> None:
            T.buffer_store(index, self.args["indices"][work.block + T.truncdiv(item, layout.items)], [u])

        def load_weights(u: int, item: Expr) -> None:
            value = self.args["values"][self.adjacent(self.weights_at(work, item, lane), layout.vector)]
            T.buffer_store(weights, value, [self.adjacent(u * layout.vector, layout.vector)])

        def load_x(number: Expr) -> None:
            start = work.begin + group + number * step
            columns = [self.column(index[u], start + u * layout.groups) for u in range(unroll)]
            at = [work.row * self.problem.in_features + column for column in columns]
            for r in self.rows:
                # The rows of X may end within the tile. Its first row needs no condition, and so the address that the
                # others are counted from is computed once.
                with ExitStack() as stack:
                    if r:
                        stack.enter_context(T.If(r < work.rows))
                        stack.enter_context(T.Then())
                    for u in range(unroll):
                        self.load_inputs(u, r, at[u], x)

        each(0, load_index)
        each(0, load_weights)
        load_x(0)
        each(1, load_index)
        whole = self.hold(T.truncdiv(T.max(work.end - work.begin, 0), step), "int32")
        with T.serial(whole) as i:
            for u in range(unroll):
                self.multiply(u, weights, x, sums)
            each(i + 1, load_weights)
            load_x(i + 1)
            each(i + 2, load_index)
        each(whole, lambda u, item: self.multiply(u, weights, x, sums))

    def weights_at(self, work: _Work, item: Expr, lane: Expr) -> Expr:
        """Where this lane's weights of an item start."""
        T, p, layout = self.T, self.problem, self.layout
        if itemsize(p.dtype) == 2 and p.panel == SWIZZLED_PANEL:
            lane = T.bitwise_xor(lane, T.bitwise_and(item, 7))
        # TVM makes one load of a vector only where it can prove that it starts at a whole one.
        start = work.before * (p.block[1] * p.panel)
        return start + T.cast(item * (layout.lanes * layout.vector) + lane * layout.vector, "int64")

    def column(self, index: Expr, item: Expr) -> Expr:
        """The first input of an item, in a block that starts at input `index`; int64."""
        T, layout = self.T, self.layout
        if layout.wide:
            index = T.truncdiv(index, layout.span) * layout.span
        return T.cast(index + T.truncmod(item, layout.items) * layout.span, "int64")

    def load_inputs(self, u: int, r: int, at: Expr, x: Buffer) -> None:
        """x[u, r, :] = the inputs of an item, in the row `r` rows after `at`."""
        span = self.layout.span
        width = span if self.layout.wide else 1
        for i in range(0, span, width):
            value = self.args["x"][self.adjacent(at + (r * self.problem.in_features + i), width)]
            self.T.buffer_store(x, value, [self.adjacent((u * len(self.rows) + r) * span + i, width)])

    def multiply(self, u: int, weights: Buffer, x: Buffer, sums: Buffer) -> None:
        """sums[r, o] += X[r, i] * W[i, o] for the inputs i of load u."""
        T, dtype, layout = self.T, self.problem.dtype, self.layout
        for i in range(layout.span):
            inputs = [T.Bind(widen(x[(u * len(self.rows) + r) * layout.span + i], dtype)) for r in self.rows]
            for o in range(layout.outputs):
                weight = T.Bind(widen(weights[u * layout.vector + i * layout.outputs + o], dtype))
                for r in self.rows:
                    at = r * layout.outputs + o
                    T.buffer_store(sums, sums[at] + inputs[r] * weight, [at])

    # ---- Sums of a thread block ----

    def meet(self, thread: Expr, sums: Buffer, store: Callable[[Expr, Expr, Expr], None]) -> None:
        """Call `store(r, o, sum)` for each row and output of the tile, in one thread each.

        The groups' sums go to shared memory; a value's are added by several threads, and theirs by one.
        """
        T, layout, panel = self.T, self.layout, self.problem.panel
        size = layout.groups * panel
        together = _divisor(len(self.rows), _SHARED_BYTES // (4 * size))
        values = together * panel
        parts = _divisor(layout.groups, self.threads // values)
        shared = T.alloc_buffer((together * size,), "float32", scope="shared")
        meeting = T.alloc_buffer((parts * values,), "float32", scope="shared")
        total = T.alloc_buffer((1,), "float32", scope="local")

        def add(buffer: Buffer, count: int, start: Expr, stride: int) -> Expr:
            T.buffer_store(total, T.float32(0), [0])
            with T.serial(count) as i:
                T.buffer_store(total, total[0] + buffer[start + i * stride], [0])
            return total[0]

        for begin in range(0, len(self.rows), together):
            # Threads beyond the last whole group have sums that are others' too.
            with T.If(thread < layout.groups * layout.lanes), T.Then():
                for r in range(together):
                    self.share(sums, begin + r, shared, r * size + thread * layout.outputs)
            with self.dealt(thread, parts * values) as number:
                part, value = T.truncdiv(number, values), T.truncmod(number, values)
                r, o = T.truncdiv(value, panel), T.truncmod(value, panel)
                mine = add(shared, layout.groups // parts, r * size + part * panel + o, parts * panel)
                if parts == 1:
                    store(r + begin, o, mine)
                else:
                    T.buffer_store(meeting, mine, [number])
            if parts > 1:
                with self.dealt(thread, values) as value:
                    r, o = T.truncdiv(value, panel), T.truncmod(value, panel)
                    store(r + begin, o, add(meeting, parts, value, values))

    def share(self, sums: Buffer, row: int, shared: Buffer, at: Expr) -> None:
        """Copy a row's sums to shared memory, where threads in order are groups in order and their lanes in order."""
        outputs = self.layout.outputs
        width = 4 if outputs % 4 == 0 else 1
        for o in range(0, outputs, width):
            value = sums[self.adjacent(row * outputs + o, width)]
            self.T.buffer_store(shared, value, [self.adjacent(at + o, width)])

    @contextmanager
    def dealt(self, thread: Expr, count: int) -> Iterator[Expr]:
        """The numbers below `count`, dealt out to the threads."""
        T = self.T
        with T.serial(-(-count // self.threads)) as i:
            number = T.Bind(i * self.threads + thread)
            with T.If(number < count), T.Then():
                yield number

    # ---- Y ----

    def store(self, work: _Work, r: Expr, o: Expr, value: Expr) -> None:
        """Y, or this part of it in the workspace, where the tile and the panel do not stick out."""
        T, n, split = self.T, self.problem.out_features, self.schedule.split
        with T.If(T.And(r < work.rows, o < work.outputs)), T.Then():
            row, output = T.Bind(work.row + T.cast(r, "int64")), T.Bind(work.output + o)
            if split == 1:
                self.finish(row, output, value)
            else:
                at = (row * split + T.cast(work.part, "int64")) * n + T.cast(output, "int64")
                T.buffer_store(self.args["workspace"], value, [at])

    def add_parts(self, row: Expr, output: Expr) -> None:
        """Y[row, output] from its parts in the workspace."""
        T, n, split = self.T, self.problem.out_features, self.schedule.split
        with T.If(output < n), T.Then():
            row = T.Bind(T.cast(row, "int64"))
            at = row * (split * n) + T.cast(output, "int64")
            parts = [self.args["workspace"][at + part * n] for part in range(split)]
            self.finish(row, output, sum(parts[1:], parts[0]))

    def finish(self, row: Expr, output: Expr, value: Expr) -> None:
        """Y[row, output] = epilogue(value)."""
        T, p, args = self.T, self.problem, self.args
        at = T.Bind(row * p.out_features + T.cast(output, "int64"))
        if p.epilogue.bias:
            value = value + widen(args["bias"][output], p.dtype)
        value = activate(T.Bind(value), p.epilogue, 1)
        if p.epilogue.residual:
            value = value + widen(args["residual"][at], p.dtype)
        T.buffer_store(args["y"], narrow(value, p.dtype), [at])

    # ---- Registers ----

    def hold(self, value: Expr, dtype: str) -> Expr:
        """`value`, computed here: TVM would repeat what `Bind` names wherever it is used, divisions included."""
        held = self.T.alloc_buffer((1,), dtype, scope="local")
        self.T.buffer_store(held, value, [0])
        return self.T.Bind(held[0])

    def adjacent(self, start: Expr, lanes: int) -> Expr:
        """The index of `lanes` adjacent elements."""
        return self.T.Ramp(start, 1, lanes) if lanes > 1 else start


def _divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`, or 1."""
    return next((d for d in range(min(number, most), 0, -1) if number % d == 0), 1)

"""Every kernel against float64, and that it neither reads nor writes anything it was not asked to."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import re
from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparsec.codegen.generate.cpu import generate
from sparsec.codegen.kernels.cpu import EMITTERS
from sparsec.codegen.kernels.cpu.abi import POINTERS
from sparsec.codegen.kernels.cpu.schedule import Schedule
from sparsec.codegen.kernels.cpu.weights import is_flat
from sparsec.codegen.problem import TOGETHER, Problem
from sparsec.codegen.target import CpuTarget, parse_cpu
from sparsec.codegen.tune.gpu.measure import activated
from sparsec.ir import Activation, BlockPattern, Epilogue, SparseMatrix
from sparsec.ir.values import Codebook, Floats, Int8, Values
from sparsec.ir.values.floats import DTYPES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Array = NDArray[Any]

X86 = platform.machine() in ("x86_64", "AMD64")
EPSILON = float(np.finfo(np.float32).eps)
# A NaN that no arithmetic gives: what memory holds where nothing may be read or written.
UNTOUCHED = np.uint32(0x7FC12345)
# float32 on either side of what a kernel may write.
GUARD = 64
PLAIN = Epilogue()
FLOAT32 = Floats()
# Those of single products; for several at a time see test_bfloat16.py and test_integers.py.
KERNELS = sorted(EMITTERS.keys() - {"dots"})

# ---- Kernels and data ----


@dataclass(frozen=True)
class Code:
    """What is compiled."""

    schedule: Schedule
    shape: tuple[int, int]  # out, in
    block: tuple[int, int]
    epilogue: Epilogue = PLAIN
    kind: Values = FLOAT32
    x: str = "float"

    @property
    def pattern(self) -> BlockPattern:
        return BlockPattern(*self.block)

    @property
    def problem(self) -> Problem:
        # No kernel depends on the density: one compiled kernel serves all of them.
        empty = self.packed(np.zeros(self.shape, dtype=np.float32))
        return replace(Problem.of(empty, self.epilogue, self.x), density=0.5)

    def packed(self, weight: Array) -> SparseMatrix:
        return SparseMatrix.from_dense(weight, self.pattern, kind=self.kind, together=TOGETHER[self.x])


@dataclass(frozen=True)
class Work:
    """What it is run on: `rows` and `panels` are shares of all of them, from and to."""

    height: int
    density: float
    rows: tuple[float, float] = (0, 1)
    panels: tuple[float, float] = (0, 1)
    seed: int = 0


@dataclass(frozen=True)
class Data:
    matrix: SparseMatrix
    x: Array
    bias: Array
    residual: Array

    @classmethod
    def random(cls, code: Code, work: Work) -> Data:
        rng = np.random.default_rng(work.seed)
        out, inputs = code.shape
        blocks = rng.random(code.pattern.grid(code.shape)) < work.density
        weight = rng.standard_normal(code.shape) * code.pattern.expand(blocks, code.shape)
        return cls(
            code.packed(weight.astype(np.float32)),
            rng.standard_normal((work.height, inputs)).astype(np.float32),
            rng.standard_normal(out).astype(np.float32),
            rng.standard_normal((work.height, out)).astype(np.float32),
        )


def expected(data: Data, epilogue: Epilogue, x_kind: str = "float") -> tuple[Array, Array]:
    """The product and its epilogue in float64, and how far from it float32 may be.

    The bound is 16 units of the last place of the sum of all terms' magnitudes: sums of 200 terms are off by less. An
    activation adds one term of magnitude 1, as its own error is absolute; none is steeper than 1.13.
    """
    given = data.x.astype(DTYPES["bfloat16"]) if x_kind == "bfloat16" else data.x
    x, weight = given.astype(np.float64), data.matrix.to_dense().astype(np.float64)
    z, size = x @ weight.T, np.abs(x) @ np.abs(weight).T
    if epilogue.bias:
        z, size = z + data.bias, size + np.abs(data.bias)
    y, size = activated(z, epilogue), size + (epilogue.activation is not Activation.NONE)
    if epilogue.residual:
        y, size = y + data.residual, size + np.abs(data.residual)
    return y, 16 * EPSILON * size


# ---- Calls ----


def pointers(arrays: Sequence[Array]) -> list[Any]:
    return [ctypes.c_void_p(array.ctypes.data) for array in arrays]


def arguments(data: Data, y: Array, scratch: Array) -> list[Array]:
    """Everything behind a kernel's pointers, in their order."""
    m = data.matrix
    table = m.kind.laid_out(m.table, m.panels * m.panel)
    parts = {"x": data.x, "values": m.values, "indices": m.indices, "indptr": m.indptr, "table": table, "y": y}
    parts |= {"bias": data.bias, "residual": data.residual, "workspace": scratch}
    return [parts.get(name, np.zeros(0, dtype=np.float32)) for name in POINTERS]


def ranges(code: Code, work: Work) -> tuple[int, int, int, int]:
    """The rows and panels of a call, from and to; at least one of each."""

    def span(size: int, shares: tuple[float, float]) -> tuple[int, int]:
        begin = min(int(min(shares) * size), size - 1)
        return begin, max(begin + 1, ceil(max(shares) * size))

    panels = code.problem.block_rows * code.problem.panels
    return *span(work.height, work.rows), *span(panels, work.panels)


def requested(code: Code, work: Work) -> Array:
    """Which elements of Y a call computes."""
    problem = code.problem
    row_begin, row_end, panel_begin, panel_end = ranges(code, work)
    output = np.arange(problem.out_features)
    panel = output // problem.block[0] * problem.panels + output % problem.block[0] // problem.panel
    row = np.arange(work.height)[:, None]
    return (row_begin <= row) & (row < row_end) & (panel_begin <= panel) & (panel < panel_end)


def guarded(size: int) -> tuple[Array, Array]:
    """An array of float32 in the middle of untouched memory; and all of that memory."""
    memory = np.full(size + 2 * GUARD, UNTOUCHED).view(np.float32)
    return memory[GUARD : GUARD + size], memory


def untouched(memory: Array) -> bool:
    return bool((memory.view(np.uint32) == UNTOUCHED).all())


def check(code: Code, work: Work, call: Callable[..., Any]) -> None:
    """Run a compiled kernel: right where it was asked to compute, and nothing else changed."""
    data = Data.random(code, work)
    y, y_memory = guarded(work.height * code.shape[0])
    scratch, scratch_memory = guarded(EMITTERS[code.schedule.kernel].workspace(code.problem, code.schedule))
    given = arguments(data, y, scratch)
    read = [array for array in given if array is not y and array is not scratch]
    before = [array.copy() for array in read]
    call(*pointers(given), *ranges(code, work))

    asked = requested(code, work)
    result = y.reshape(asked.shape)
    right, bound = expected(data, code.epilogue, code.x)
    wrong = asked & ~(np.abs(result - right) <= bound)
    assert not wrong.any(), f"{wrong.sum()} of {asked.sum()} wrong, first at {np.argwhere(wrong)[0]}"
    assert untouched(result[~asked]), "wrote to Y outside of its range"
    for memory, size in ((y_memory, y.size), (scratch_memory, scratch.size)):
        assert untouched(memory[:GUARD]), "wrote before a buffer"
        assert untouched(memory[GUARD + size :]), "wrote beyond a buffer"
    assert all(np.array_equal(a, b) for a, b in zip(read, before, strict=True)), "wrote to what is only read"


def compiled(code: Code, target: CpuTarget) -> Callable[..., Any]:
    call = generate(code.problem, code.schedule, target).call
    assert call is not None
    return call


@pytest.fixture(scope="module")
def host() -> CpuTarget:
    return parse_cpu()


# ---- Right results ----

SCHEDULES = {
    "outputs": st.builds(
        Schedule,
        st.just("outputs"),
        tile_rows=st.sampled_from((1, 2, 3, 4, 6, 8)),
        pack=st.booleans(),
        accumulators=st.sampled_from((1, 4, 8)),
        prefetch=st.sampled_from((0, 8)),
        pairs=st.booleans(),
    ),
    "rows": st.builds(
        Schedule, st.just("rows"), tile_rows=st.sampled_from((4, 8, 16, 32)), accumulators=st.sampled_from((1, 4, 8))
    ),
    "inputs": st.builds(
        Schedule, st.just("inputs"), tile_rows=st.sampled_from((1, 2, 3, 4)), accumulators=st.sampled_from((1, 4))
    ),
}
# The block sizes that people prune to, as well as any other.
BLOCKS = st.one_of(
    st.sampled_from([(1, 1), (1, 16), (2, 1), (4, 1), (4, 4), (8, 1), (8, 8), (16, 1), (32, 1), (32, 32)]),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
EPILOGUES = st.builds(
    Epilogue,
    st.sampled_from((Activation.NONE, Activation.RELU, Activation.SILU)),
    alpha=st.just(1.5),
    bias=st.booleans(),
    residual=st.booleans(),
)
SHARES = st.tuples(st.floats(0, 1), st.floats(0, 1))
WORK = st.builds(
    Work,
    height=st.integers(1, 40),
    density=st.sampled_from((0.0, 0.03, 0.2, 0.6, 1.0)),
    rows=st.one_of(st.just((0.0, 1.0)), SHARES),
    panels=st.one_of(st.just((0.0, 1.0)), SHARES),
    seed=st.integers(0, 2**16),
)
# A kernel takes a while to compile: it is run on several weights and inputs.
WORKS = st.lists(WORK, min_size=4, max_size=6)
EVERYTHING = [Work(height, density, seed=height) for height in (1, 2, 5, 40) for density in (0.0, 0.2, 1.0)]


@pytest.mark.parametrize("kernel", KERNELS)
def test_equals_float64(kernel: str, host: CpuTarget) -> None:
    """Any shape, block, schedule, epilogue, number of rows, density and range of rows and panels."""

    @settings(max_examples=22, deadline=None, derandomize=True, database=None)
    @given(
        st.builds(Code, SCHEDULES[kernel], st.tuples(st.integers(1, 200), st.integers(1, 200)), BLOCKS, EPILOGUES),
        WORKS,
    )
    @example(Code(Schedule(kernel, 4), (1, 1), (1, 1)), EVERYTHING)
    @example(Code(Schedule(kernel, 4), (67, 37), (1, 3), Epilogue(bias=True)), EVERYTHING)
    @example(Code(Schedule(kernel, 4), (33, 50), (3, 2), Epilogue(residual=True)), EVERYTHING)
    @example(Code(Schedule(kernel, 4, pack=True, pairs=True), (38, 70), (5, 1)), EVERYTHING)
    @example(Code(Schedule(kernel, 2), (75, 19), (37, 6)), EVERYTHING)
    def property_(code: Code, works: list[Work]) -> None:
        call = compiled(code, host)
        for work in works:
            check(code, work, call)

    property_()


KINDS = (Floats("bfloat16"), Floats("float16"), Int8(), Int8(16), Codebook(16), Codebook(256))


@pytest.mark.parametrize(
    ("kernel", "kind"), [(name, kind) for name in KERNELS for kind in KINDS if name != "inputs" or is_flat(kind)]
)
def test_every_kind_of_values(kernel: str, kind: Values, host: CpuTarget) -> None:
    """What is stored in fewer bits than float32, in panels of every width, whole and not."""
    blocks = st.sampled_from([(1, 1), (1, 16), (2, 2), (3, 1), (4, 4), (8, 1), (12, 2), (16, 1), (20, 4), (32, 1)])

    @settings(max_examples=3, deadline=None, derandomize=True, database=None)
    @given(
        st.builds(
            Code,
            SCHEDULES[kernel],
            st.tuples(st.integers(1, 100), st.integers(1, 100)),
            blocks,
            EPILOGUES,
            st.just(kind),
        ),
        WORKS,
    )
    @example(Code(Schedule(kernel, 8, pack=True, prefetch=8), (70, 64), (32, 1), kind=kind), EVERYTHING)
    @example(Code(Schedule(kernel, 4, pack=True, pairs=True), (37, 50), (16, 2), Epilogue(bias=True), kind), EVERYTHING)
    @example(Code(Schedule(kernel, 4), (21, 33), (3, 1), kind=kind), EVERYTHING)
    def property_(code: Code, works: list[Work]) -> None:
        call = compiled(code, host)
        for work in works:
            check(code, work, call)

    property_()


@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_activation(kernel: str, activation: Activation, host: CpuTarget) -> None:
    alpha, beta = {Activation.CLIP: (-0.5, 0.7), Activation.LEAKY_RELU: (0.1, 0.0)}.get(activation, (1.0, 0.0))
    epilogue = Epilogue(activation, alpha, beta, bias=True, residual=True)
    # Whole vectors of outputs, and a panel that sticks out.
    code = Code(Schedule(kernel, 2), (38, 24), (4, 4), epilogue)
    call = compiled(code, host)
    for height in (1, 7):
        check(code, Work(height, 0.5, seed=height), call)


def test_large_tiles(host: CpuTarget) -> None:
    """The tiles that many rows are computed in, with whole tiles and without."""
    for schedule, block in (
        (Schedule("outputs", 14, pack=True, prefetch=8), (32, 1)),
        (Schedule("rows", 64), (1, 1)),
        (Schedule("rows", 48), (8, 4)),
        (Schedule("outputs", 14, pack=True, pairs=True), (16, 1)),
        (Schedule("inputs", 8), (1, 16)),
    ):
        code = Code(schedule, (96, 100), block, Epilogue(Activation.RELU, bias=True))
        for height in (3, 33, 64, 150):
            check(code, Work(height, 0.2), compiled(code, host))


def test_parts_make_the_whole(host: CpuTarget) -> None:
    """Calls for all pairs of a range of rows and a range of panels compute Y, whatever the ranges."""
    for kernel in KERNELS:
        code = Code(Schedule(kernel, 4), (50, 30), (3, 2), Epilogue(Activation.TANH, bias=True))
        call, work = compiled(code, host), Work(21, 0.5)
        seen = np.zeros((21, 50), dtype=int)
        for rows in ((0, 0.2), (0.2, 0.6), (0.6, 1)):
            for panels in ((0, 0.5), (0.5, 1)):
                part = replace(work, rows=rows, panels=panels)
                check(code, part, call)
                seen += requested(code, part)
        assert (seen >= 1).all()


# ---- Memory ----


class Fence:
    """Memory whose end is the end of a page, the next of which may not be read."""

    def __init__(self, array: Array) -> None:
        pages = -(-max(array.nbytes, 1) // mmap.PAGESIZE) + 1
        self.memory = mmap.mmap(-1, pages * mmap.PAGESIZE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.end = start + (pages - 1) * mmap.PAGESIZE
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(self.end), mmap.PAGESIZE, 0) == 0
        self.pointer = ctypes.c_void_p(self.end - array.nbytes)
        ctypes.memmove(self.pointer, array.ctypes.data, array.nbytes)


@pytest.mark.skipif(not hasattr(os, "fork") or platform.system() != "Linux", reason="needs fork and mprotect")
@pytest.mark.parametrize("block", [(1, 1), (1, 5), (3, 3), (4, 4), (5, 2), (8, 8), (40, 3)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize(("kernel", "kind"), [*((name, FLOAT32) for name in KERNELS), *(("outputs", k) for k in KINDS)])
def test_reads_nothing_beyond_its_arguments(kernel: str, kind: Values, block: tuple[int, int], host: CpuTarget) -> None:
    """In a child process, which a read of one byte too much would kill."""
    schedule = Schedule(kernel, 4, pack=True, prefetch=8, pairs=True)
    code = Code(schedule, (43, 51), block, Epilogue(bias=True, residual=True), kind)
    call = compiled(code, host)
    child = os.fork()
    if child == 0:
        try:
            for work in (Work(1, 0.5), Work(6, 0.3), Work(13, 1.0)):
                data = Data.random(code, work)
                y = np.zeros_like(data.residual)
                scratch = np.zeros(EMITTERS[kernel].workspace(code.problem, code.schedule), dtype=np.float32)
                fences = [Fence(array) for array in arguments(data, y, scratch)]
                call(*(fence.pointer for fence in fences), *ranges(code, work))
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


# ---- Other processors ----


def executable(code: Code, target: CpuTarget) -> Any:
    import tvm

    function = EMITTERS[code.schedule.kernel].emit(code.problem, code.schedule, "kernel", target)
    return tvm.compile(tvm.IRModule({"kernel": function}), target=target.tvm)


SMALL = {
    "outputs": Code(
        Schedule("outputs", 4, pack=True, prefetch=8), (48, 40), (16, 1), Epilogue(Activation.GELU, bias=True)
    ),
    "rows": Code(Schedule("rows", 16), (50, 40), (1, 1), Epilogue(Activation.GELU, bias=True)),
    "inputs": Code(Schedule("inputs", 2), (50, 40), (4, 4), Epilogue(Activation.GELU, bias=True)),
}


def supported(target: CpuTarget, host: CpuTarget) -> bool:
    return target.arch == host.arch and set(target.requires) <= set(host.requires)


@pytest.mark.parametrize("cpu", ["x86-64", "x86-64-v3", "x86-64-v4"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_right_on_older_processors(kernel: str, cpu: str, host: CpuTarget) -> None:
    target = parse_cpu(cpu)
    if not supported(target, host):
        pytest.skip(f"this machine lacks what {target} may use")
    code = SMALL[kernel]
    call = executable(code, target)["kernel"]
    for height in (1, 9, 33):
        check(code, Work(height, 0.3), call)


@pytest.mark.parametrize("kernel", KERNELS)
def test_object_for_aarch64(kernel: str) -> None:
    code = SMALL[kernel]
    made = generate(code.problem, code.schedule, parse_cpu("neoverse-n1"))
    assert made.elf[:4] == b"\x7fELF"
    assert int.from_bytes(made.elf[18:20], "little") == 183  # EM_AARCH64
    assert f"__tvm_ffi_{made.symbol}".encode() in made.elf


# ---- Machine code ----


def loops(assembly: str) -> list[str]:
    """The innermost loops of a function: from a label to the first jump back to it, with no label between."""
    return re.findall(r"^(\.L\w+):\n((?:(?!^\.LBB).*\n)*?\tj\w+\t\1)\n", _without_debug(assembly), re.M)


def _without_debug(assembly: str) -> str:
    return re.sub(r"^(\.Ltmp.*|\t\.(loc|cfi|file|p2align).*|\s*#.*)\n", "", assembly, flags=re.M)


@pytest.mark.parametrize(
    ("schedule", "block", "vectors"),
    [
        (Schedule("outputs", 14, pack=True, prefetch=8), (32, 1), 28),
        (Schedule("outputs", 8), (32, 32), 16),
        (Schedule("outputs", 14, pack=True, prefetch=8, pairs=True), (16, 1), 14),
        (Schedule("rows", 64), (4, 1), 16),
        (Schedule("rows", 16), (1, 1), 8),
        (Schedule("inputs", 4), (4, 4), 8),
    ],
    ids=str,
)
def test_avx512_loop(schedule: Schedule, block: tuple[int, int], vectors: int) -> None:
    """All sums stay in registers: as many fused multiply-adds on 512 bits as there are sums, and no stores."""
    code = Code(schedule, (256, 256), block, Epilogue(bias=True))
    target = parse_cpu("x86-64-v4")
    made = generate(code.problem, schedule, target)
    assert b"TVMBackendAllocWorkspace" not in made.elf, "sums on the heap"
    assembly = executable(code, target).mod.inspect_source("asm")
    body = max((body for _, body in loops(assembly)), key=lambda body: body.count("vfmadd"))
    assert len(re.findall(r"\tvfmadd\w+ps\t.*%zmm", body)) >= vectors
    assert not re.search(r"\tvmovups\t%zmm\d+, ", body), f"stores between multiply-adds:\n{body}"

"""The time of one schedule on a GPU, after its result was found to be right.

Every timed run finds its weights in memory, not in the second-level cache: between two runs a sweep reads twice as much
as the cache holds. (Writing would do too, but the next kernel would then pay for writing the dirty lines back.)
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ....ir import Activation, BlockPattern, SparsecError, SparseMatrix
from ....ir.sparse_matrix import SWIZZLED_PANEL
from ....ir.values.floats import DTYPES, Floats
from ...kernel import ANY_ROWS, CudaVariant, Launch
from .device import Buffer, Device, Event, open_device

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from ....ir import Epilogue
    from ...problem import Problem

    Array = NDArray[Any]

# Seconds that the timing of one schedule may take, and rounds that it has at least and at most.
_TIME, _ROUNDS = 0.03, (5, 100)
# Sweeps that keep the device busy at most.
_MOST_BUSY = 200
# Rows of Y that are compared with float64, at least; as many as the largest tile has.
_COMPARED = 256
# Every byte of what a kernel must write: a NaN in each dtype.
_POISON = 0xFF
# Relative error of a product whose operands are cut to TF32's 10 bits.
_TF32_ERROR = 2e-3

# Reads `rows` times 16 bytes at `x`; the store to `y` is there so that the reads stay.
_SWEEP = CudaVariant(
    symbol="sweep",
    arch="compute_70",
    max_rows=ANY_ROWS,
    launches=(Launch("sweep", ("x", "y", "rows"), units=1, tile_rows=256, threads=256, blocks_per_sm=8),),
    workspace=0,
    image=b"""
.version 7.0
.target sm_70
.address_size 64
.visible .entry sweep(.param .u64 x, .param .u64 y, .param .s64 rows)
{
    .reg .pred %p<3>;
    .reg .b32 %r<12>;
    .reg .b64 %rd<10>;
    ld.param.u64 %rd1, [x];
    ld.param.u64 %rd2, [y];
    ld.param.s64 %rd3, [rows];
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %ntid.x;
    mov.u32 %r3, %tid.x;
    mov.u32 %r4, %nctaid.x;
    mad.wide.u32 %rd4, %r1, %r2, 0;
    cvt.u64.u32 %rd5, %r3;
    add.s64 %rd4, %rd4, %rd5;
    mul.wide.u32 %rd6, %r4, %r2;
    mov.u32 %r11, 0;
loop:
    setp.ge.s64 %p1, %rd4, %rd3;
    @%p1 bra done;
    shl.b64 %rd7, %rd4, 4;
    add.s64 %rd8, %rd1, %rd7;
    ld.global.v4.u32 {%r5, %r6, %r7, %r8}, [%rd8];
    xor.b32 %r9, %r5, %r6;
    xor.b32 %r10, %r7, %r8;
    xor.b32 %r9, %r9, %r10;
    or.b32 %r11, %r11, %r9;
    add.s64 %rd4, %rd4, %rd6;
    bra loop;
done:
    setp.eq.u32 %p2, %r11, 0;
    @%p2 bra exit;
    st.global.u32 [%rd2], %r11;
exit:
    ret;
}
\0""",
)


def measure(problem: Problem, variant: CudaVariant, rows: int, number: int, tf32: bool = False) -> float:
    """Median seconds of one run of `variant` on the GPU `number`, for `rows` rows of X, weights not in the cache.

    The weights and the reference of the last problem are kept for the next call.

    Args:
        problem: what the variant computes.
        variant: compiled for that GPU.
        rows: of X.
        number: of the GPU.
        tf32: whether the variant rounds float32 operands to TF32, and so may be off by as much.

    Raises:
        SparsecError: no GPU, a CUDA error, or a wrong result.
    """
    return _workload(problem, open_device(number)).seconds(variant, rows, tf32)


class Workload:
    """Random weights of a problem on a device; made once, timed with many variants and numbers of rows.

    Attributes:
        matrix: the weight; exactly `problem.density` of its blocks, rounded to whole ones, are stored.
    """

    def __init__(self, problem: Problem, device: Device) -> None:
        self.problem, self.device = problem, device
        self.matrix = random_matrix(problem)
        counts = np.diff(self.matrix.indptr)
        bias = np.random.default_rng(1).standard_normal(problem.out_features)
        arrays = {
            "values": self.matrix.values,
            "indices": self.matrix.indices,
            "indptr": self.matrix.indptr,
            "order": np.argsort(-counts, kind="stable").astype(np.int32),
            "bias": bias.astype(DTYPES[problem.dtype]),
        }
        self._bias: Array = arrays["bias"].astype(np.float64)
        self._buffers = {name: device.upload(array) for name, array in arrays.items()}
        self._batch: _Batch | None = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of the packed weight and of the order of its block rows."""
        return self.matrix.nbytes + self._buffers["order"].nbytes

    def seconds(self, variant: CudaVariant, rows: int, tf32: bool = False) -> float:
        """As `measure`."""
        return float(np.median(alternate(self.device, [self.checked(variant, rows, tf32)])))

    def checked(self, variant: CudaVariant, rows: int, tf32: bool = False) -> Callable[[], None]:
        """A run of `variant`, to be enqueued as often as wanted, after its result was compared with float64.

        Every output of at least 256 rows is compared, and every output of the others must be a number. The rows are an
        odd distance apart: in a tile of any power of two up to 256 rows, each place has its turn.

        Raises:
            SparsecError: the result is wrong.
        """
        batch = self._inputs(rows)
        program = self.device.load(variant)
        workspace = self.device.allocate(program.workspace(rows))
        buffers = {**self._buffers, **batch.buffers, "workspace": workspace}
        workspace.fill(_POISON)
        batch.buffers["y"].fill(_POISON)
        program(buffers, rows)
        y = batch.buffers["y"].read(DTYPES[self.problem.dtype], (rows, self.problem.out_features))
        error = batch.error(y)
        limit = tolerance(self.problem, tf32)
        # Not `error > limit`: that is false for NaN.
        if not error <= limit:
            raise SparsecError(
                f"kernel '{variant.symbol}' is wrong for {rows} rows of problem '{self.problem.key}' on "
                f"{self.device.name}: relative error {error:.2g}, expected at most {limit:.2g}; please report it"
            )
        return lambda: program(buffers, rows)

    def _inputs(self, rows: int) -> _Batch:
        """X, the residual and what Y must be; the last ones are kept."""
        if self._batch is None or self._batch.rows != rows:
            self._batch = None  # Its memory is free before new memory is taken.
            p, rng, dtype = self.problem, np.random.default_rng(rows), DTYPES[self.problem.dtype]
            x = rng.standard_normal((rows, p.in_features), dtype=np.float32).astype(dtype)
            compared = np.unique(np.append(np.arange(0, rows, max(rows // _COMPARED - 1, 0) | 1), rows - 1))
            z = product(x[compared].astype(np.float64), self.matrix)
            buffers = {"x": self.device.upload(x), "y": self.device.allocate(rows * p.out_features * dtype.itemsize)}
            if p.epilogue.bias:
                z += self._bias
            z = activated(z, p.epilogue)
            if p.epilogue.residual:
                residual = rng.standard_normal((rows, p.out_features), dtype=np.float32).astype(dtype)
                buffers["residual"] = self.device.upload(residual)
                z += residual[compared].astype(np.float64)
            self._batch = _Batch(rows, buffers, compared, z)
        return self._batch


_workload = lru_cache(maxsize=1)(Workload)


@dataclass(frozen=True)
class _Batch:
    """Inputs of some rows, and the outputs [compared, N] float64 that some of them must have."""

    rows: int
    buffers: dict[str, Buffer]
    compared: NDArray[np.int64]
    expected: NDArray[np.float64]

    def error(self, y: Array) -> float:
        """‖y - expected‖ / ‖expected‖ over the compared rows; NaN where any output of any row is none."""
        if not np.isfinite(y).all():
            return math.nan
        difference = y[self.compared].astype(np.float64) - self.expected
        return float(np.linalg.norm(difference) / max(np.linalg.norm(self.expected), 1e-30))


def tolerance(problem: Problem, tf32: bool = False) -> float:
    """The relative error that a right result may have.

    Rounding Y costs at most half a unit in the last place of its dtype; sums of K terms in float32 are off by some
    units times the square root of K.
    """
    import ml_dtypes

    unit = float(ml_dtypes.finfo(DTYPES[problem.dtype]).eps)
    sums = float(np.finfo(np.float32).eps) * math.sqrt(problem.in_features)
    return unit + sums + (_TF32_ERROR if tf32 else 0.0)


def alternate(device: Device, calls: Sequence[Callable[[], None]], seconds: float = _TIME) -> NDArray[np.float64]:
    """Seconds of each call [rounds, calls], taken in turn, the second-level cache swept before each.

    Every call enqueues work on the device's stream. There are as many rounds as fit `seconds` for each call, but at
    least 5 and at most 100. Before each round the device is kept busy for as long as it takes to enqueue the round: it
    must never wait for us between two events.
    """
    sweep = _sweep(device)
    for call in calls:  # Code is loaded and libraries choose their kernels at the first call.
        call()
    device.synchronize()
    begun = time.perf_counter()
    trial = _round(device, [*calls, sweep], sweep)
    enqueueing = time.perf_counter() - begun
    device.synchronize()
    *each, swept = _seconds(trial)
    least, most = _ROUNDS
    rounds = int(min(max(seconds * len(calls) / max(sum(each), 1e-9), least), most))
    events = []
    for i in range(rounds):
        for _ in range(min(math.ceil(enqueueing / max(swept, 1e-6)), _MOST_BUSY)):
            sweep()
        events.append(_round(device, calls, sweep, backwards=i % 2 == 1))
    device.synchronize()
    return np.array([_seconds(pairs) for pairs in events])


def _round(
    device: Device, calls: Sequence[Callable[[], None]], sweep: Callable[[], None], backwards: bool = False
) -> list[tuple[Event, Event]]:
    """Enqueue every call once; the events before and after each."""
    pairs = [(device.event(), device.event()) for _ in calls]
    turns = list(zip(calls, pairs, strict=True))
    for call, (start, end) in reversed(turns) if backwards else turns:
        sweep()
        start.record()
        call()
        end.record()
    return pairs


def _seconds(pairs: Sequence[tuple[Event, Event]]) -> list[float]:
    return [end.since(start) for start, end in pairs]


@lru_cache(maxsize=1)
def _sweep(device: Device) -> Callable[[], None]:
    """What empties the second-level cache."""
    program, data, sink = device.load(_SWEEP), device.allocate(2 * device.l2_bytes), device.allocate(4)
    data.fill(0)
    return lambda: program({"x": data, "y": sink}, data.nbytes // 16)


# ---- The reference ----


def random_matrix(problem: Problem, seed: int = 0) -> SparseMatrix:
    """A weight of the problem: blocks at random places, standard normal values.

    Packed block row by block row, and so in a moment where a dense weight of gigabytes would be cut up.
    """
    rng = np.random.default_rng(seed)
    (rows, cols), out, inputs = problem.block, problem.out_features, problem.in_features
    grid = (problem.block_rows, problem.block_cols)
    stored = max(1, round(problem.density * grid[0] * grid[1]))
    kept = (rng.permutation(grid[0] * grid[1]) < stored).reshape(grid)
    indptr = np.concatenate(([0], np.cumsum(kept.sum(axis=1)))).astype(np.int32)
    starts = np.minimum(np.arange(grid[1]) * cols, inputs - cols)
    over = grid[1] * cols - inputs
    values = []
    for i, row in enumerate(kept):
        weight = np.zeros((row.sum() * cols, problem.panels * problem.panel), dtype=np.float32)
        height = min(rows, out - i * rows)
        weight[:, :height] = rng.standard_normal((len(weight), height), dtype=np.float32)
        if over and row[-1]:  # The last block was moved back: zeros where it overlaps its neighbour.
            weight[-cols:][:over] = 0
        stream = weight.reshape(-1, problem.panels, problem.panel).transpose(1, 0, 2).astype(DTYPES[problem.dtype])
        values.append(_interchanged(stream).ravel())
    indices = starts[np.nonzero(kept)[1]].astype(np.int32)
    dtype = problem.dtype
    return SparseMatrix(
        BlockPattern(rows, cols), (out, inputs), np.concatenate(values), indices, indptr, Floats(dtype), dtype=dtype
    )


def product(x: NDArray[np.float64], matrix: SparseMatrix) -> NDArray[np.float64]:
    """`x [rows, in] @ W.T` [rows, out] in float64."""
    (rows, cols), panels, panel = matrix.block, matrix.panels, matrix.panel
    z: NDArray[np.float64] = np.zeros(((len(matrix.indptr) - 1) * rows, len(x)))
    # Rows are gathered several times faster than columns.
    turned = np.ascontiguousarray(x.T)
    for i in range(len(matrix.indptr) - 1):
        begin, end = matrix.indptr[i : i + 2]
        size = panels * cols * panel
        stream = _interchanged(matrix.values[begin * size : end * size].reshape(panels, (end - begin) * cols, panel))
        weight = stream.transpose(1, 0, 2).reshape((end - begin) * cols, panels * panel)[:, :rows]
        inputs = (matrix.indices[begin:end, None] + np.arange(cols)).ravel()
        z[i * rows : (i + 1) * rows] = weight.T.astype(np.float64) @ turned[inputs]
    y: NDArray[np.float64] = z[: matrix.shape[0]].T
    return y


def _interchanged(stream: Array) -> Array:
    """A stream [panels, inputs, panel] with the chunks of swizzled panels interchanged; its own inverse.

    Written anew from the words in `SparseMatrix`, so that the packer is not what the kernels are checked by.
    """
    panels, inputs, panel = stream.shape
    if stream.itemsize != 2 or panel != SWIZZLED_PANEL:
        return stream
    k, j = np.arange(inputs)[:, None], np.arange(panel // 8)[None, :]
    return stream.reshape(panels, inputs, panel // 8, 8)[:, k, j ^ (k % 8)].reshape(stream.shape)


def activated(z: NDArray[np.float64], e: Epilogue) -> NDArray[np.float64]:
    """The activation by its definition."""
    match e.activation:
        case Activation.NONE:
            return z
        case Activation.RELU:
            return np.maximum(z, 0)
        case Activation.CLIP:
            return np.clip(z, e.alpha, e.beta)
        case Activation.LEAKY_RELU:
            return np.where(z < 0, e.alpha * z, z)
        case Activation.SIGMOID:
            return _sigmoid(z)
        case Activation.TANH:
            return np.tanh(z)
        case Activation.GELU:
            erf: NDArray[np.float64] = np.vectorize(math.erf, otypes=[float])(z / math.sqrt(2))
            return z * (1 + erf) / 2
        case Activation.GELU_TANH:
            # (1 + tanh(u)) / 2 is sigmoid(2u).
            return z * _sigmoid(2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z * z * z))
        case Activation.SILU:
            return z * _sigmoid(e.alpha * z)


def _sigmoid(z: NDArray[np.float64]) -> NDArray[np.float64]:
    # By tanh, which overflows nowhere.
    y: NDArray[np.float64] = (1 + np.tanh(z / 2)) / 2
    return y

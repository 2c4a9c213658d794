"""Sparse kernels against everything a GPU user could run instead, in two steps on two machines.

    python benchmarks/gpu.py prepare FOLDER [--arch sm_90a] [--points N]
    PYTHONPATH=.typing python benchmarks/gpu.py run FOLDER [--part I/N] [--json FILE] [--minutes M]

`prepare` needs TVM and no GPU: it compiles, for every point of the grid below, the schedules predicted to be the
fastest, three of each kind of kernel. `run` needs a GPU and its driver, numpy, ml_dtypes, and PyTorch for the other
sides; a side that cannot run is recorded with its error. It works in a second process, so that a kernel that crashes or
hangs costs that kernel and not the run.

The grid: 6 shapes x 7 blocks x 5 shares of zeros x 6 numbers of rows in float16; two shapes, three blocks, 80 and 90 %
zeros and 1, 16 and 512 rows in float32 (exact, and with TF32) and bfloat16. The most telling points come first, so a
part that runs out of time loses the least.

Every kernel is compared with float64 before it is timed. The sides of a point are timed in turn, on one stream, by
events, with the second-level cache emptied before each run (codegen/tune/gpu/measure.py); a figure is the median with
its quartiles. cuBLAS and cuBLASLt stand for the dense side in every precision; inputs and weights are already in that
precision. The weights of PyTorch's block format have the point's own block where PyTorch allows it, else a square one;
2:4 always has half of its weights. The ceilings are this run's own: the bytes a second of a large copy, read and
written, and cuBLAS's rate for 8192^3.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import sparsec
from sparsec.codegen.kernel import CudaVariant, Launch
from sparsec.codegen.problem import Problem
from sparsec.codegen.tune.gpu.device import Device, open_device
from sparsec.codegen.tune.gpu.measure import Workload, alternate
from sparsec.ir import Activation, Epilogue, SparsecError
from sparsec.ir.sparse_matrix import panel_width
from sparsec.ir.values.floats import DTYPES

# Each axis by falling importance.
DTYPE_ORDER = ("float16", "float32", "tfloat32", "bfloat16")
SHAPES = ((8192, 28672), (8192, 8192), (4096, 11008), (4096, 4096), (1024, 4096), (768, 3072))
BLOCKS = ((32, 1), (128, 16), (64, 64), (64, 16), (16, 1), (32, 32), (128, 128))
ZEROS = (0.9, 0.8, 0.7, 0.95, 0.5)
ROWS = (1, 16, 4096, 512, 8, 64)
# Schedules of each kind of kernel that a point is compiled with; the first points have all.
EACH, EVERY = 3, 1000
# The folder that travels to the GPU machine stays below this many bytes.
FOLDER_BYTES = 48 << 20
# The density that all points of a shape and block are compiled for: no kernel depends on it.
COMPILED_DENSITY = 0.1
# Seconds without a sign of life after which the working process is given up.
SILENCE = 90.0
# A side slower than this many seconds a run is timed once.
SLOW = 0.2

# What the working process tries first.
CEILINGS = "the ceilings"

Say = Callable[[str, Any], None]
Run = Callable[[], Any]
Record = dict[str, Any]


# ---- The grid ----


@dataclass(frozen=True)
class Point:
    """One row of the table; `dtype` is that of `Problem`, or "tfloat32" for float32 cut to TF32."""

    dtype: str
    out: int
    inputs: int
    block: tuple[int, int]
    zeros: float
    rows: int

    @property
    def problem(self) -> Problem:
        dtype = "float32" if self.tf32 else self.dtype
        panel = panel_width(self.block[0], dtype)
        return Problem(self.inputs, self.out, self.block, panel, round(1 - self.zeros, 2), dtype=dtype)

    @property
    def tf32(self) -> bool:
        return self.dtype == "tfloat32"

    def __str__(self) -> str:
        r, c = self.block
        return f"{self.dtype} {self.out}x{self.inputs} block {r}x{c} zeros {self.zeros:.0%} rows {self.rows}"


def bars() -> list[Point]:
    """What the kernels are judged by first: a large weight with few rows, and a product that fills the GPU."""
    few = [Point(dtype, 8192, 28672, (32, 1), 0.9, n) for dtype in DTYPE_ORDER[:3] for n in (1, 8, 16)]
    return few + [Point("float16", 8192, 8192, (128, 16), zeros, 4096) for zeros in (0.7, 0.8, 0.9)]


def points() -> list[Point]:
    """The grid, the most telling points first; the points of one weight are neighbours."""
    weights = []
    for d, dtype in enumerate(DTYPE_ORDER):
        for s, shape in enumerate(SHAPES):
            for b, block in enumerate(BLOCKS):
                for z, zeros in enumerate(ZEROS):
                    if dtype == "float16" or (shape in (SHAPES[0], SHAPES[3]) and b < 3 and z < 2):
                        rows = ROWS if dtype == "float16" else (1, 16, 512)
                        group = [Point(dtype, *shape, block, zeros, n) for n in rows]
                        weights.append((s + b + z + 2 * d, group))
    weights.sort(key=lambda pair: pair[0])
    return list(dict.fromkeys([*bars(), *(point for _, group in weights for point in group)]))


def part_of(grid: Sequence[Point], part: str) -> list[Point]:
    """Part I of N neighbouring parts, "I/N" with I from 1.

    Raises:
        SparsecError: there is no such part.
    """
    try:
        i, n = (int(word) for word in part.split("/"))
    except ValueError:
        i, n = 0, 0
    if not 1 <= i <= n:
        raise SparsecError(f"--part {part}: expected I/N with I from 1 to N, such as 1/8")
    return list(grid[(i - 1) * len(grid) // n : i * len(grid) // n])


# What is only compared with float64: edges that no block, panel or tile divides, and every part of an epilogue.
_RELU, _GELU = Epilogue(Activation.RELU, bias=True), Epilogue(Activation.GELU, residual=True)
_SILU, _CLIP = Epilogue(Activation.SILU, 1.0, bias=True, residual=True), Epilogue(Activation.CLIP, -1.0, 2.0, bias=True)
CHECKS = tuple(
    (Problem(inputs, out, block, panel_width(block[0], dtype), 0.3, epilogue, dtype), rows)
    for dtype in DTYPES
    for inputs, out, block, epilogue, rows in (
        (77, 203, (32, 1), _RELU, 3),
        (1000, 520, (16, 1), _GELU, 9),
        (208, 320, (64, 16), _SILU, 33),
        (272, 384, (128, 16), _CLIP, 300),
        (130, 190, (64, 64), Epilogue(), 65),
        (512, 512, (128, 128), _SILU, 129),
        (96, 100, (32, 32), _GELU, 1),
    )
)


def check_key(problem: Problem, rows: int) -> str:
    return f"{problem.key} rows {rows}"


# ---- Preparing, on a machine with TVM ----


def prepare(folder: Path, arch: str, grid: Sequence[Point], checks: Sequence[tuple[Problem, int]] = CHECKS) -> None:
    """Write images and `index.json`; what the folder already holds of the same code is not compiled again."""
    from sparsec.codegen.generate.version import code_version
    from sparsec.codegen.target import parse_cuda

    gpu = parse_cuda(arch)[0]
    folder.mkdir(parents=True, exist_ok=True)
    index: Record = {"arch": gpu.arch, "code": code_version(), "sparsec": sparsec.__version__}
    old = json.loads((folder / "index.json").read_text()) if (folder / "index.json").exists() else {}
    same = all(old.get(name) == index[name] for name in index)
    index["variants"] = old["variants"] if same else {}
    for path in () if same else folder.glob("*.gz"):
        path.unlink()
    # Step 1. Which kernels each check and point wants; many share theirs.
    wanted: dict[str, tuple[Problem, Any]] = {}
    groups: dict[str, dict[str, list[tuple[str, str]]]] = {"checks": {}, "points": {}}
    for problem, rows in checks:
        groups["checks"][check_key(problem, rows)] = choose(problem, rows, False, gpu, EACH, wanted)
    first = bars()
    for point in grid:
        each = EVERY if point in first else EACH
        groups["points"][str(point)] = choose(point.problem, point.rows, point.tf32, gpu, each, wanted)
    # Step 2. Compile what is new, the most telling first.
    new = [name for name in wanted if name not in index["variants"]]
    size = sum(path.stat().st_size for path in folder.glob("*.gz"))
    begun = time.monotonic()
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(compile_one, *wanted[name], gpu) for name in new]
        try:
            for i, (name, job) in enumerate(zip(new, jobs, strict=True)):
                if i % 20 == 0:
                    print(f"{i} of {len(new)} kernels, {size >> 10} KiB, {time.monotonic() - begun:.0f} s", flush=True)
                if size > FOLDER_BYTES:
                    break
                try:
                    variant = job.result()
                except Exception as error:  # A kernel that does not compile is a result like others.
                    print(f"{name}: {sentence(error)}")
                    index["variants"][name] = {"error": sentence(error)}
                    continue
                packed = gzip.compress(variant.image, mtime=0)
                (folder / f"{variant.symbol}.gz").write_bytes(packed)
                size += len(packed)
                index["variants"][name] = {k: v for k, v in asdict(variant).items() if k != "image"}
        finally:
            pool.shutdown(cancel_futures=True)
            # Step 3. What is there, even after an interruption.
            for group, keys in groups.items():
                index[group] = {
                    key: names for key, names in keys.items() if all(n in index["variants"] for _, n in names)
                }
                print(f"{len(index[group])} of {len(keys)} {group} are ready")
            (folder / "index.json").write_text(json.dumps(index))


def choose(
    problem: Problem, rows: int, tf32: bool, gpu: Any, each: int, wanted: dict[str, tuple[Problem, Any]]
) -> list[tuple[str, str]]:
    """The schedules predicted to be the fastest of each kind of kernel, with the names that they have in `wanted`."""
    from sparsec.codegen.tune.gpu.space import candidates

    found = candidates(problem, gpu, rows, tf32=tf32)
    if tf32:
        exact = candidates(problem, gpu, rows)
        found = [schedule for schedule in found if schedule not in exact]
    kinds: dict[str, list[Any]] = {}
    for schedule in found:
        kinds.setdefault(schedule.kernel, []).append(schedule)
    chosen = []
    same_code = replace(problem, density=COMPILED_DENSITY)
    for schedule in [schedule for kind in kinds.values() for schedule in kind[:each]]:
        name = f"{same_code.key}, {schedule}"
        wanted[name] = (same_code, schedule)
        chosen.append((str(schedule), name))
    return chosen


def compile_one(problem: Problem, schedule: Any, gpu: Any) -> CudaVariant:
    from sparsec.codegen.generate.cuda import generate

    return generate(problem, schedule, gpu, "cubin")


def load_variant(folder: Path, described: Record) -> CudaVariant:
    """What `prepare` wrote.

    Raises:
        SparsecError: it could not be compiled.
    """
    if "error" in described:
        raise SparsecError(described["error"])
    launches = tuple(Launch(**{**launch, "arguments": tuple(launch["arguments"])}) for launch in described["launches"])
    image = gzip.decompress((folder / f"{described['symbol']}.gz").read_bytes())
    return CudaVariant(**{**described, "launches": launches, "image": image})


# ---- The other sides, by PyTorch ----


class Others:
    """What PyTorch offers instead, on the same stream; without PyTorch every side is that sentence."""

    DENSE = ("float16", "bfloat16", "float32", "tfloat32", "float8")

    def __init__(self, device: Device) -> None:
        self.missing, self.versions = "", {}
        self._dense: dict[tuple[int, int, str], Any] = {}
        try:
            import torch
        except ImportError:
            self.missing = "PyTorch is not installed: python -m pip install torch"
            return
        if not torch.cuda.is_available():
            self.missing = f"this PyTorch ({torch.__version__}) cannot use the GPU"
            return
        self.torch: Any = torch
        torch.cuda.set_device(device.number)
        torch.cuda.set_stream(torch.cuda.ExternalStream(device.stream))
        torch.set_default_device("cuda")
        self.versions = {
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }

    def sides(self, point: Point) -> dict[str, Callable[[], Run]]:
        """By name, what prepares a side and returns its run; both may raise."""
        found: dict[str, Callable[[], Run]] = {}
        for precision in self.DENSE:
            found[f"dense {precision}"] = partial(self.dense, point, precision, "cublas")
        found[f"dense {point.dtype}, cuBLASLt"] = partial(self.dense, point, point.dtype, "cublaslt")
        found["PyTorch BSR"] = partial(self.bsr, point, triton=False)
        found["PyTorch BSR, Triton"] = partial(self.bsr, point, triton=True)
        found["cuSPARSE CSR"] = partial(self.csr, point)
        found["2:4"] = partial(self.two_of_four, point)
        return found

    def dense(self, point: Point, precision: str, library: str) -> Run:
        """CuBLAS or cuBLASLt, `x @ W.T`."""
        torch = self._torch()
        if precision == "float8":
            return self._float8(point)
        x, w = self._random(point.rows, point.inputs, precision), self._weight(point, precision)
        y = torch.empty(point.rows, point.out, dtype=x.dtype)

        def call() -> None:
            torch.backends.cuda.preferred_blas_library(library)
            torch.backends.cuda.matmul.allow_tf32 = precision == "tfloat32"
            torch.mm(x, w.t(), out=y)

        return call

    def _float8(self, point: Point) -> Run:
        torch = self._torch()
        one = torch.ones(())
        x = self._random(point.rows, point.inputs, "bfloat16").to(torch.float8_e4m3fn)
        w = self._weight(point, "float8")
        return lambda: torch._scaled_mm(x, w.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    def bsr(self, point: Point, triton: bool) -> Run:
        """PyTorch's own block-sparse product in the point's block or, below PyTorch's least of 16, a square one.

        By `linear`, or by the Triton kernel that torchao's block sparsity calls.
        """
        torch = self._torch()
        r, c = point.block if min(point.block) >= 16 else (point.block[0], point.block[0])
        kept = torch.rand(point.out // r, point.inputs // c) >= point.zeros
        crow = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)]).int()
        values = self._random(int(crow[-1]) * r, c, point.dtype).reshape(-1, r, c)
        w = torch.sparse_bsr_tensor(crow, kept.nonzero()[:, 1].int(), values, size=(point.out, point.inputs))
        x = self._random(point.rows, point.inputs, point.dtype)
        if triton:
            from torch.sparse._triton_ops import bsr_dense_addmm

            y = torch.zeros(point.out, point.rows, dtype=x.dtype)
            call = partial(bsr_dense_addmm, y, w, x.t(), beta=0)
        else:
            call = partial(torch.nn.functional.linear, x, w)

        def run() -> None:
            torch.backends.cuda.matmul.allow_tf32 = point.tf32
            call()

        return run

    def csr(self, point: Point) -> Run:
        """CuSPARSE on the same blocks, weight by weight."""
        torch = self._torch()
        r, c = point.block
        kept = torch.rand(point.out // r, point.inputs // c) >= point.zeros
        w = self._weight(point, point.dtype) * kept.repeat_interleave(r, 0).repeat_interleave(c, 1)
        w = w.to_sparse_csr()
        w = torch.sparse_csr_tensor(w.crow_indices().int(), w.col_indices().int(), w.values(), size=w.shape)
        x = self._random(point.rows, point.inputs, point.dtype).t().contiguous()
        return lambda: torch.sparse.mm(w, x)

    def two_of_four(self, point: Point) -> Run:
        """Semi-structured sparsity by cuSPARSELt or CUTLASS, whichever this PyTorch has."""
        torch = self._torch()
        half = torch.tensor([1, 0, 0, 1], dtype=torch.bool).repeat(point.inputs // 4)
        w = torch.sparse.to_sparse_semi_structured(self._weight(point, point.dtype) * half)
        x = self._random(point.rows, point.inputs, point.dtype)
        return lambda: torch.nn.functional.linear(x, w)

    def cublas_rates(self, device: Device) -> dict[str, float | str]:
        """Operations a second of an 8192^3 product, by precision."""
        rates: dict[str, float | str] = {}
        for precision in self.DENSE:
            try:
                call = self.dense(Point(precision, 8192, 8192, (1, 1), 0.0, 8192), precision, "cublas")
                rates[precision] = 2 * 8192**3 / float(np.median(alternate(device, [call], 0.2)))
            except Exception as error:  # A precision that this GPU or PyTorch lacks.
                rates[precision] = sentence(error)
        return rates

    def _torch(self) -> Any:
        if self.missing:
            raise SparsecError(self.missing)
        return self.torch

    def _random(self, rows: int, cols: int, precision: str) -> Any:
        dtype = "float32" if precision == "tfloat32" else precision
        return self.torch.randn(rows, cols, dtype=getattr(self.torch, dtype))

    def _weight(self, point: Point, precision: str) -> Any:
        """A dense weight of the point's shape; those of the last shape are kept."""
        shape = (point.out, point.inputs)
        if any(key[:2] != shape for key in self._dense):
            self._dense.clear()
            self.torch.cuda.empty_cache()
        key = (*shape, "float32" if precision == "tfloat32" else precision)
        if key not in self._dense:
            weight = self._random(*shape, "bfloat16" if precision == "float8" else precision)
            self._dense[key] = weight.to(self.torch.float8_e4m3fn) if precision == "float8" else weight
        return self._dense[key]


# ---- Measuring, in the working process ----


class LostError(Exception):
    """CUDA gives nothing but errors any more; a new process is needed."""


class Sides:
    """The runs of a point or check by the names of their sides, and the errors of those that cannot run."""

    def __init__(self, key: str, device: Device, given_up: dict[str, str], say: Say) -> None:
        self.key, self.device, self.given_up, self.say = key, device, given_up, say
        self.calls: dict[str, Run] = {}
        self.errors: dict[str, str] = {}

    def attempt(self, side: str, make: Callable[[], Run]) -> None:
        """Prepare a side and run it once.

        Raises:
            LostError: it took CUDA down.
        """
        label = f"{self.key}, {side}"
        if label in self.given_up:
            self.errors[side] = self.given_up[label]
            return
        self.say("try", label)
        try:
            call = make()
            call()
            self.device.synchronize()
            self.calls[side] = call
        except Exception as error:  # Whatever a library raises is that side's result.
            self.errors[side] = sentence(error)
            try:
                self.device.synchronize()
            except SparsecError:
                raise LostError(self.errors[side]) from error


def work(folder: Path, todo: Sequence[str], given_up: dict[str, str], say: Say) -> None:
    """Check and time everything in `todo`, the texts of checks and points; `given_up` holds what not to try, and why.

    Says "ceilings" once, "try" with the name of what comes next, and "check" or "point" with a record.
    """
    index = json.loads((folder / "index.json").read_text())
    grid = {str(point): point for point in points()}
    checks = {check_key(problem, rows): (problem, rows) for problem, rows in CHECKS}
    say("try", CEILINGS)
    device = open_device()
    others = Others(device)
    say("ceilings", ceilings(device, others))
    workload: Workload | None = None
    for key in todo:
        say("try", key)
        point = grid.get(key)
        problem, rows = (point.problem, point.rows) if point else checks[key]
        if workload is None or workload.problem != problem:
            workload = None  # Its memory is free before new memory is taken.
            workload = Workload(problem, device)
        sides = Sides(key, device, given_up, say)
        for schedule, name in index["points" if point else "checks"][key]:
            tf32 = bool(point and point.tf32)
            sides.attempt(schedule, partial(checked, workload, folder, index["variants"][name], rows, tf32))
        if point:
            say("point", timed(point, sides, others, workload))
        else:
            say("check", {"check": key, "right": sorted(sides.calls), "errors": sides.errors})


def checked(workload: Workload, folder: Path, described: Record, rows: int, tf32: bool) -> Run:
    """The run of a prepared kernel whose result is right."""
    return workload.checked(load_variant(folder, described), rows, tf32)


def timed(point: Point, sides: Sides, others: Others, workload: Workload) -> Record:
    """Times of the fastest right candidate and of all other sides, in turn."""
    device, candidates = sides.device, sides.calls
    record: Record = {"point": str(point), **asdict(point), "sides": {}, "errors": sides.errors}
    # Step 1. The fastest candidate.
    sides.calls = {}
    if candidates:
        trial = np.median(alternate(device, list(candidates.values()), 0.01), axis=0)
        record["candidates_us"] = {name: micro(t) for name, t in zip(candidates, trial, strict=True)}
        record["schedule"] = list(candidates)[int(trial.argmin())]
        sides.calls["sparse"] = candidates[record["schedule"]]
    # Step 2. The other sides; slow ones have their time already.
    for side, make in others.sides(point).items():
        sides.attempt(side, make)
        if side in sides.calls and (seconds := once(device, sides.calls[side])) > SLOW:
            record["sides"][side] = {"us": micro(seconds), "note": "one run"}
            del sides.calls[side]
    # Step 3. All in turn.
    sides.say("try", str(point))
    calls = sides.calls
    times = dict(zip(calls, alternate(device, list(calls.values())).T, strict=True)) if calls else {}
    for side, seconds in times.items():
        low, us, high = np.quantile(seconds, (0.25, 0.5, 0.75))
        record["sides"][side] = {"us": micro(us), "quartiles": [micro(low), micro(high)], "runs": len(seconds)}
        if "sparse" in times:
            ratio = np.quantile(seconds / times["sparse"], (0.5, 0.25, 0.75))
            record["sides"][side]["ratio"] = [round(float(r), 3) for r in ratio]
    item = DTYPES[workload.problem.dtype].itemsize
    record["bytes"] = workload.weight_bytes + (point.inputs + point.out) * point.rows * item
    record["operations"] = 2 * workload.matrix.values.size * point.rows
    return record


def once(device: Device, call: Run) -> float:
    """Seconds of one run."""
    start, end = device.event(), device.event()
    start.record()
    call()
    end.record()
    device.synchronize()
    return end.since(start)


def ceilings(device: Device, others: Others) -> Record:
    """What this GPU reaches at most, read off it now."""
    source, target = device.allocate(1 << 30), device.allocate(1 << 30)
    source.fill(1)
    copy = 2 * source.nbytes / float(np.median(alternate(device, [lambda: target.copy(source)], 0.2)))
    return {
        "gpu": device.name,
        "sms": device.sms,
        "l2_bytes": device.l2_bytes,
        "driver": ".".join(map(str, device.driver_version)),
        "versions": {"sparsec": sparsec.__version__, "numpy": np.__version__, **others.versions},
        "copy_bytes_per_second": copy,
        "cublas_operations_per_second": others.cublas_rates(device),
        "nothing_us": micro(float(np.median(alternate(device, [lambda: None])))),
    }


def sentence(error: Exception) -> str:
    """The first line of an error, at most 300 characters."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def micro(seconds: float) -> float:
    return round(float(seconds) * 1e6, 2)


# ---- The process around it ----


def supervise(
    start: Callable[[list[str], dict[str, str], Any], Any],
    todo: Sequence[str],
    deadline: float,
    silence: float = SILENCE,
) -> Iterator[tuple[str, Any]]:
    """What the working process says, until all is done or what is next might not end in time.

    Where a process dies or falls silent, a new one goes on, and what the old one was at is given up: a side, or a whole
    point where no side was named. The last word is ("left", keys) for what there was no time for.

    Args:
        start: given the keys left, what is given up and a pipe, starts a process.
        todo: keys of checks and points, in order.
        deadline: on the clock of `time.monotonic`.
        silence: seconds.

    Raises:
        SparsecError: the process cannot even start.
    """
    left, given_up, longest = list(todo), dict[str, str](), 0.0
    while left and time.monotonic() + longest < deadline:
        trying, begun = "", time.monotonic()
        with closing(listen(start, left, given_up, silence)) as messages:
            for what, value in messages:
                if what == "try":
                    trying = value
                elif what == "died":
                    if trying in ("", CEILINGS):
                        raise SparsecError(f"the working process could not start: {value}")
                    yield "failure", {"at": trying, "error": value}
                    given_up[trying] = value
                    left = [key for key in left if key != trying]
                else:
                    yield what, value
                    now = time.monotonic()
                    if what in ("check", "point"):
                        left.remove(value[what])
                        longest = max(longest, now - begun)
                    begun = now
                    if not left or now + longest > deadline:
                        break
    yield "left", left


def listen(
    start: Callable[[list[str], dict[str, str], Any], Any], todo: list[str], given_up: dict[str, str], silence: float
) -> Iterator[tuple[str, Any]]:
    """The messages of one process, and ("died", why) where it ends; it does not outlive this."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process, why = start(todo, given_up, theirs), ""
    theirs.close()
    try:
        while ours.poll(silence):
            what, value = ours.recv()
            if what == "lost":
                why = value
            else:
                yield what, value
        why = f"no sign of life for {silence:g} s"
    except EOFError:
        process.join()
        why = why or f"the process ended with code {process.exitcode}"
    finally:
        process.kill()
        process.join()
    yield "died", why


def start_process(folder: Path, todo: list[str], given_up: dict[str, str], pipe: Any) -> Any:
    """`work` in a process of its own; a new one, not a copy, because CUDA does not survive a fork."""
    process = multiprocessing.get_context("spawn").Process(target=_work, args=(folder, todo, given_up, pipe))
    process.start()
    return process


def _work(folder: Path, todo: list[str], given_up: dict[str, str], pipe: Any) -> None:
    def say(what: str, value: Any) -> None:
        pipe.send((what, value))

    try:
        work(folder, todo, given_up, say)
    except Exception as error:  # The process around it takes it from here.
        say("lost", sentence(error))


def run(folder: Path, part: str, out: Path | None, minutes: float) -> Path:
    """Measure a part of the grid, print it and merge it into a file of results, which is returned.

    Raises:
        SparsecError: nothing was prepared, or there is no GPU.
    """
    deadline = time.monotonic() + 60 * minutes
    if not (folder / "index.json").exists():
        raise SparsecError(f"{folder} holds no index.json: first `python benchmarks/gpu.py prepare {folder}`")
    index = json.loads((folder / "index.json").read_text())
    wanted = [str(point) for point in part_of(points(), part)]
    todo = [*(index["checks"] if part.startswith("1/") else ()), *(key for key in wanted if key in index["points"])]
    record: Record = {"date": time.strftime("%Y-%m-%d %H:%M"), "part": part, "code": index["code"]}
    record |= {"not_prepared": len(wanted) - sum(key in index["points"] for key in wanted), "before": clocks()}
    record |= {"checks": [], "failures": []}
    for what, value in supervise(partial(start_process, folder), todo, deadline):
        point = None
        if what == "ceilings":
            record |= value
            out = out or Path(__file__).parent / "results" / f"{slug(record['gpu'])}.json"
            print_ceilings(record)
        elif what == "point":
            point = {**value, **shares(value, record), "run": record["date"]}
            print(line(point), flush=True)
        elif what == "left":
            record |= {"left": value, "after": clocks()}
            print(f"no time for {len(value)} points: {value[0]} and what follows" if value else "all done")
        else:
            record["checks" if what == "check" else "failures"].append(value)
            print(check_line(value) if what == "check" else f"failed: {value['at']}: {value['error']}", flush=True)
        if out is not None:
            merge(out, record, point)
    if out is None:
        raise SparsecError(f"part {part} holds nothing that {folder} was prepared for")
    return out


# ---- Results ----


def merge(path: Path, run: Record, point: Record | None = None) -> None:
    """Put the run, and a point where there is one, into the file, in place of those of the same name."""
    old: Record = json.loads(path.read_text()) if path.exists() else {"runs": [], "points": {}}
    same = ("date", "part")
    runs = [other for other in old["runs"] if any(other[name] != run[name] for name in same)]
    new = {"gpu": run["gpu"], "runs": [*runs, run], "points": old["points"]}
    if point is not None:
        new["points"][point["point"]] = point
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(new, indent=1) + "\n")
    scratch.replace(path)


def shares(point: Record, run: Record) -> Record:
    """How near the sparse side comes to the run's ceilings: of the copy's bandwidth, and of cuBLAS's rate."""
    if "sparse" not in point["sides"]:
        return {}
    seconds = point["sides"]["sparse"]["us"] * 1e-6
    found = {"copy_share": round(point["bytes"] / seconds / run["copy_bytes_per_second"], 3)}
    rate = run["cublas_operations_per_second"].get(point["dtype"])
    if isinstance(rate, float):
        found["cublas_share"] = round(point["operations"] / seconds / rate, 3)
    return found


# Sides in the table, with their heads; the JSON has all.
COLUMNS = {
    "dense {dtype}": "dense", "dense {dtype}, cuBLASLt": "Lt", "dense float8": "fp8", "PyTorch BSR": "BSR",
    "PyTorch BSR, Triton": "Triton",
    "cuSPARSE CSR": "CSR", "2:4": "2:4",
}  # fmt: skip


def head() -> str:
    others = "".join(f"{name:>8}" for name in COLUMNS.values())
    return f"{'us; other sides as multiples of it':58} {'sparse':>9}{others}  {'ceiling':>12}  schedule"


def line(point: Record) -> str:
    """A row of the table: times of the other sides over the sparse side's."""
    cells = []
    for side in COLUMNS:
        ratio = point["sides"].get(side.format(**point), {}).get("ratio")
        cells.append(f"{ratio[0]:7.2f}x" if ratio else f"{'-':>8}")
    us = f"{point['sides']['sparse']['us']:9.1f}" if "sparse" in point["sides"] else f"{'none':>9}"
    share = ""
    if point["rows"] <= 32 and "copy_share" in point:
        share = f"{point['copy_share']:.0%} of copy"
    elif "cublas_share" in point:
        share = f"{point['cublas_share']:.0%} of cuBLAS"
    return f"{point['point']:58} {us}{''.join(cells)}  {share:>12}  {point.get('schedule', 'no right kernel')}"


def check_line(check: Record) -> str:
    wrong = "".join(f"; {schedule}: {error}" for schedule, error in check["errors"].items())
    return f"check {check['check']}: {len(check['right'])} right{wrong}"


def print_ceilings(run: Record) -> None:
    print(f"{run['gpu']}, CUDA {run['driver']}, {run['before']}")
    print(f"copy {run['copy_bytes_per_second'] / 1e12:.2f} TB/s, nothing at all {run['nothing_us']:.1f} us")
    for precision, rate in run["cublas_operations_per_second"].items():
        print(f"cuBLAS {precision}: " + (f"{rate / 1e12:.0f} TFLOP/s" if isinstance(rate, float) else rate))
    print(head(), flush=True)


def clocks() -> str:
    """Driver, clocks, temperature and power as nvidia-smi tells them."""
    query = "driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi: {sentence(error)}"


def slug(name: str) -> str:
    """A GPU's name as a file's."""
    return "-".join(name.lower().split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("prepare", help="compile the kernels; needs TVM and no GPU")
    first.add_argument("folder", type=Path)
    first.add_argument("--arch", default="sm_90a", help="architecture of the GPU")
    first.add_argument("--points", type=int, help="only the first, most telling points")
    second = commands.add_parser("run", help="check and time them; needs a GPU and no TVM")
    second.add_argument("folder", type=Path)
    second.add_argument("--part", default="1/1", help="I/N: the Ith of N parts of the grid")
    second.add_argument("--json", type=Path, help="file of results; benchmarks/results/<gpu>.json if not given")
    second.add_argument("--minutes", type=float, default=8.0, help="nothing is begun that might end later")
    arguments = parser.parse_args()
    try:
        if arguments.command == "prepare":
            prepare(arguments.folder, arguments.arch, points()[: arguments.points])
        else:
            run(arguments.folder, arguments.part, arguments.json, arguments.minutes)
    except SparsecError as error:
        parser.exit(error.exit_code, f"error: {error}\n")


if __name__ == "__main__":
    main()

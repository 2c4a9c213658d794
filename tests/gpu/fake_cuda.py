"""A GPU that is not there: `fake_cuda.c` in place of NVIDIA's driver, and a kernel in numpy."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from sparsec.codegen.kernel import ANY_ROWS, CudaVariant, Launch
from sparsec.codegen.problem import Problem
from sparsec.codegen.tune.gpu import device, measure
from sparsec.codegen.tune.gpu.fleet import register
from sparsec.ir import BlockPattern, SparseMatrix
from sparsec.ir.values.floats import DTYPES, Floats

COMPILER = shutil.which("cc")
_ALIVE: list[Any] = []
HOOK = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint, ctypes.POINTER(ctypes.c_void_p)
)
# The kernel that `Fake.run` stands for takes all that an epilogue without residual needs.
ARGUMENTS = ("y", "values", "x", "indptr", "indices", "order", "bias", "rows")


def build(folder: Path) -> Path:
    """`libcuda.so.1` in `folder`."""
    path = folder / "libcuda.so.1"
    source = Path(__file__).with_name("fake_cuda.c")
    assert COMPILER is not None
    subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", str(source), "-o", str(path)], check=True)
    return path


class Fake:
    """The library, as tests see it."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.fake_log.restype = ctypes.c_char_p
        self.library.fake_reset()
        self._hook: Any = None

    @property
    def log(self) -> list[str]:
        """Calls so far: the function's name and what matters of its arguments."""
        return self.library.fake_log().decode().splitlines()

    def calls(self, *names: str) -> list[str]:
        """Those of these functions."""
        return [line for line in self.log if line.split(" ")[0] in names]

    def fail(self, function: str, code: int) -> None:
        """Let every call of `function` fail from now on."""
        self.library.fake_fail(function.encode(), code)

    def count(self, what: str) -> int:
        """ "allocated" memory, "modules" or "events" that nobody has given back."""
        return int(getattr(self.library, f"fake_{what}")())

    def on_launch(self, function: Callable[..., None]) -> None:
        """Call `function(entry, blocks, threads, shared, arguments)` at every launch but the sweep's."""
        self._hook = HOOK(function)
        self.library.fake_hook(self._hook)


@contextmanager
def installed(path: Path, monkeypatch: Any) -> Iterator[Fake]:
    """The fake driver in place of the real one, and nothing left open of any other."""
    fake = Fake(path)
    library, cdll = fake.library, ctypes.CDLL
    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: library if name == "libcuda.so.1" else cdll(name))
    caches = (device._driver, device._opened, measure._sweep, measure._workload)
    for cache in caches:
        cache.cache_clear()
    yield fake
    for cache in caches:
        cache.cache_clear()


def variant(problem: Problem, symbol: str = "right") -> CudaVariant:
    """What `numpy_kernel` computes when `entry` is `symbol`."""
    launch = Launch(symbol, ARGUMENTS, units=problem.block_rows, tile_rows=4, threads=128)
    return CudaVariant(symbol, "sm_90a", ANY_ROWS, (launch,), 0, b"ELF fake")


def numpy_kernel(problem: Problem, spoil: Callable[[Any], None] = lambda y: None) -> Callable[..., None]:
    """A launch that computes the product, its bias and ReLU by `SparseMatrix.to_dense`, and then spoils it."""
    dtype = DTYPES[problem.dtype]

    def run(entry: bytes, blocks: int, threads: int, shared: int, arguments: Any) -> None:
        values = {name: ctypes.c_int64.from_address(arguments[i]).value for i, name in enumerate(ARGUMENTS)}

        def array(name: str, kind: Any, *shape: int) -> Any:
            count = int(np.prod(shape)) * np.dtype(kind).itemsize
            return np.frombuffer((ctypes.c_char * count).from_address(values[name]), dtype=kind).reshape(shape)

        rows, out, inputs = values["rows"], problem.out_features, problem.in_features
        indptr = array("indptr", np.int32, problem.block_rows + 1)
        stored = int(indptr[-1])
        size = stored * problem.panels * problem.panel * problem.block[1]
        matrix = SparseMatrix(
            BlockPattern(*problem.block),
            (out, inputs),
            array("values", dtype, size),
            array("indices", np.int32, stored),
            indptr,
            Floats(problem.dtype),
            dtype=problem.dtype,
        )
        order = array("order", np.int32, problem.block_rows)
        assert (np.diff(np.diff(indptr)[order]) <= 0).all()
        y = array("x", dtype, rows, inputs).astype(np.float64) @ matrix.to_dense().T
        if problem.epilogue.bias:
            y = np.maximum(y + array("bias", dtype, out).astype(np.float64), 0)
        spoil(y)
        array("y", dtype, rows, out)[...] = y.astype(dtype)

    return run


def offer(path: str, problem: Problem) -> None:
    """In a server's process, for as long as it lives: the fake driver with the kernel, and what the fleet calls."""
    fake, cdll = Fake(Path(path)), ctypes.CDLL
    ctypes.CDLL = lambda name: fake.library if name == "libcuda.so.1" else cdll(name)  # type: ignore[assignment, misc]
    fake.on_launch(numpy_kernel(problem))
    _ALIVE.append(fake)
    register()

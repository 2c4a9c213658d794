"""From a problem and a schedule to an image for GPUs, by TVM's CUDA back end; needs neither a GPU nor its driver."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..kernel import ANY_ROWS, CUDA_ARGUMENTS, CudaVariant, Launch
from ..kernels.gpu import EMITTERS
from .nvrtc import compile_cuda

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ..kernels.gpu.schedule import GpuSchedule, Grid
    from ..problem import Problem
    from ..target import CudaTarget

# What TVM's code may ask of a launch. Anything else, such as a second dimension or a cluster, `Launch` cannot say.
_SHARED = "tirx.use_dyn_shared_memory"
_LAUNCH_PARAMETERS = frozenset({"blockIdx.x", "threadIdx.x", _SHARED})

# TVM begins each source with this for NVRTC. It takes 2 seconds to compile, 20 times as long as a kernel.
_TYPE_TRAITS = re.compile(r"#include <cuda/std/type_traits>\s*namespace std \{[^{}]*\}")


@dataclass(frozen=True, slots=True)
class Source:
    """A schedule as CUDA C++.

    Attributes:
        symbol: made from the problem, the schedule and the architecture, so equal code has equal names.
        arch: such as "sm_80" or "sm_90a" for machine code, "compute_90" for PTX.
        text: the source of all device functions; their names begin with `symbol`.
        launches: in order.
    """

    symbol: str
    arch: str
    text: str
    launches: tuple[Launch, ...]


@lru_cache(maxsize=512)
def generate(problem: Problem, schedule: GpuSchedule, target: CudaTarget, form: str = "cubin") -> CudaVariant:
    """Compile `schedule` for `problem`; takes 0.2 to 2 seconds.

    Args:
        problem: as any that the kernel has no obstacle for.
        schedule: its kernel is one of `EMITTERS`.
        target: the architecture.
        form: "cubin" for machine code; "ptx" for text, which later architectures run too. Code for one architecture
            alone, such as "sm_90a", cannot be PTX: obstacles are asked for "compute_90".

    Returns:
        The variant for any number of rows; who chooses between variants sets `max_rows`.

    Raises:
        SparsecError: there is no CUDA compiler, or it does not know the architecture.
        ValueError: the kernel contradicts its own description.
    """
    source = translate(problem, schedule, target, form)
    return CudaVariant(
        symbol=source.symbol,
        arch=source.arch,
        max_rows=ANY_ROWS,
        launches=source.launches,
        workspace=EMITTERS[schedule.kernel].workspace(problem, schedule),
        image=compile_cuda(source.text, source.arch, form),
    )


def translate(problem: Problem, schedule: GpuSchedule, target: CudaTarget, form: str = "cubin") -> Source:
    """The CUDA C++ of `schedule` for `problem`; the arguments and the ValueError are those of `generate`."""
    emitter = EMITTERS[schedule.kernel]
    plain = target.arch.rstrip("a")
    arch, tvm_arch = (target.arch, target.arch) if form == "cubin" else (plain.replace("sm_", "compute_"), plain)
    symbol = "sparsec_" + hashlib.sha256(f"{problem.key}|{schedule}|{arch}".encode()).hexdigest()[:16]
    host, device = _lower(emitter.emit(problem, schedule, symbol), {**target.tvm, "arch": tvm_arch})
    launches = _launches(host, emitter.grids(problem, schedule))
    return Source(symbol, arch, _source(device), launches)


def _lower(function: Any, target: dict[str, Any]) -> tuple[Any, Any]:
    """TVM's passes up to code generation.

    Returns:
        The body of the host's function, which launches the kernels, and the module of the kernels.
    """
    import tvm
    from tvm import tirx
    from tvm.tirx.build import split_host_device_mods

    # Functions of `T.device_entry()` and functions of `T.launch_thread` take different passes.
    pipeline, _, finish = tirx.get_tir_pipeline("s_tir" if function.attrs.get("s_tir") else "tirx")
    # Elimination of common subexpressions would compute expressions of `rows` on the host and make them arguments of
    # the kernel. The CUDA compiler does the same inside the kernel.
    with tvm.transform.PassContext(disabled_pass=["tirx.CommonSubexprElim"]):
        bound = tirx.transform.BindTarget(tvm.target.Target(target, host="llvm"))(tvm.IRModule.from_expr(function))
        hosts, devices = split_host_device_mods(pipeline(bound))
        (host,) = hosts.functions.values()
        (device,) = devices.values()
        return host.body, finish()(device)


def _source(device: Any) -> str:
    """CUDA C++ of a module of kernels."""
    from tvm.tirx.build import codegen_build

    target = next(iter(device.functions.values())).attrs["target"]
    with _no_compiler():
        text = str(codegen_build(device, target).inspect_source("cuda"))
    short = _TYPE_TRAITS.sub("", text)
    return text if "std::is_" in short else short


@contextmanager
def _no_compiler() -> Iterator[None]:
    """Where there is a driver, TVM compiles what it generates at once, by its own way to NVRTC; prevent that."""
    import tvm

    name = "tvm_callback_cuda_compile"
    kept = tvm.get_global_func(name)
    tvm.register_global_func(name, lambda code: b"", override=True)
    try:
        yield
    finally:
        tvm.register_global_func(name, kept, override=True)


def _launches(host: Any, grids: Sequence[Grid]) -> tuple[Launch, ...]:
    """The launches in a host's function, which must be as `grids` says.

    Only this function tells which argument is which: TVM gives the parameters of a device function an order and names
    of their own.
    """
    pointers: dict[Any, Any] = {}
    calls = list(_calls(host, pointers))
    if len(calls) != len(grids):
        raise ValueError(f"{len(calls)} launches, but {len(grids)} grids")
    return tuple(_launch(call, grid, pointers) for call, grid in zip(calls, grids, strict=True))


def _calls(statement: Any, pointers: dict[Any, Any]) -> Iterator[Any]:
    """The launches in order, none of them under a condition; `pointers` gets where each buffer lies."""
    from tvm import tirx

    if isinstance(statement, tirx.SeqStmt):
        for part in statement.seq:
            yield from _calls(part, pointers)
    elif isinstance(statement, tirx.AttrStmt):
        yield from _calls(statement.body, pointers)
    elif isinstance(statement, tirx.DeclBuffer):
        pointers[statement.buffer] = statement.data
    elif isinstance(statement, tirx.Evaluate) and _is_call(statement.value, "tirx.call_ffi_kernel"):
        yield statement.value


def _launch(call: Any, grid: Grid, pointers: dict[Any, Any]) -> Launch:
    """The launch that `call` makes: device function, its arguments, then the launch's parameters."""
    from tvm import tirx

    entry, parameters = str(call.args[0].value), [str(name) for name in call.attrs.launch_params]
    if not _LAUNCH_PARAMETERS.issuperset(parameters):
        raise ValueError(f"'{entry}' is launched with {', '.join(parameters)}, which a launch cannot say")
    split = len(call.args) - len(parameters)
    values = dict(zip(parameters, call.args[split:], strict=True))
    threads, shared = (int(values.get(name, tirx.const(0))) for name in ("threadIdx.x", _SHARED))
    if threads != grid.threads:
        raise ValueError(f"'{entry}' has {threads} threads a block, but its grid says {grid.threads}")
    # It may be less: TVM cuts a buffer down to the elements that it sees accessed, and it sees no copy by address.
    if shared > grid.shared_bytes:
        raise ValueError(f"'{entry}' has {shared} bytes of shared memory, but its grid says {grid.shared_bytes}")
    arguments = tuple(_name(value, pointers) for value in call.args[1:split])
    return Launch(entry, arguments, **dataclasses.asdict(grid))


def _name(value: Any, pointers: dict[Any, Any]) -> str:
    """The parameter of the function that the argument `value` of a device function is."""
    from tvm import ir

    while _is_call(value, "tirx.buffer_data"):
        value = pointers[value.args[0]]
    name = str(value.name) if isinstance(value, ir.Var) else str(value)
    if name not in CUDA_ARGUMENTS:
        raise ValueError(f"a kernel's argument is {name}, which is none of {', '.join(CUDA_ARGUMENTS)}")
    return name


def _is_call(value: Any, operator: str) -> bool:
    from tvm import ir

    return isinstance(value, ir.Call) and value.op.name == operator

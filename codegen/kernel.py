"""What code generation hands to the library: machine code, and how the operator may call it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..ir import Epilogue
    from ..ir.values import Values

# `max_rows` of a variant that has no upper limit.
ANY_ROWS = 2**63 - 1


@dataclass(frozen=True, slots=True)
class CpuVariant:
    """One compiled schedule of a kernel for CPUs, for inputs of at most `max_rows` rows.

    The code is a TVM function over raw pointers and 64-bit integers,
    `(x, values, indices, indptr, table, sums, bias, residual, y, workspace, parameters, row_begin, row_end,
    panel_begin, panel_end)` (see `kernels/cpu/abi.py`): it computes rows `row_begin` to `row_end`-1 of panels
    `panel_begin` to `panel_end`-1 and touches no other part of `y` [rows, out]. It is serial; the operator splits the
    work.

    Attributes:
        symbol: name of the TVM function; its entry is `__tvm_ffi_<symbol>`.
        max_rows: the largest number of rows of X that this variant is meant for.
        row_grain: rows that are computed together; the operator cuts the rows at multiples of it.
        workspace: float32 of private scratch memory that a call needs; 0 for none.
        parts_per_thread: pieces of work a thread that the operator should aim for.
        code: an ELF object file.
    """

    symbol: str
    max_rows: int
    row_grain: int
    workspace: int
    parts_per_thread: int
    code: bytes


# What a CUDA kernel may take, by name. All but `rows` are addresses in device memory.
CUDA_ARGUMENTS = (
    "x",  # [rows, K], of the problem's dtype like `values`, `bias`, `residual` and `y`
    "values",  # as in SparseMatrix
    "indices",  # int32, as in SparseMatrix
    "indptr",  # int32, as in SparseMatrix
    "order",  # [block rows] int32: the block rows by falling number of blocks, the first of equals first
    "bias",  # [N]
    "residual",  # [rows, N]
    "y",  # [rows, N]
    "workspace",  # float32, see `CudaVariant.workspace`
    "rows",  # int64, the rows of X; the only one that is no address
)


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of a device function, on a grid of one dimension.

    The grid has `units * ceil(rows / tile_rows)` thread blocks, but no more than `blocks_per_sm` a multiprocessor where
    that is not 0: the kernel then loops over what is left (a persistent kernel).

    Attributes:
        entry: name of the device function in the image.
        arguments: names out of `CUDA_ARGUMENTS`, in the order of the device function's parameters.
        units: thread blocks a tile of rows.
        tile_rows: rows of X a tile.
        threads: threads a block.
        shared_bytes: dynamic shared memory a block.
        blocks_per_sm: 0 for a thread block a unit of work.
    """

    entry: str
    arguments: tuple[str, ...]
    units: int
    tile_rows: int
    threads: int
    shared_bytes: int = 0
    blocks_per_sm: int = 0


@dataclass(frozen=True, slots=True)
class CudaVariant:
    """One compiled schedule of a kernel for one GPU architecture, for inputs of at most `max_rows` rows.

    Attributes:
        symbol: made from the problem, the schedule and the architecture, so equal code has equal names.
        arch: such as "sm_80" or "sm_90a" for machine code, "compute_90" for PTX.
        max_rows: the largest number of rows of X that this variant is meant for.
        launches: in order, on one stream.
        workspace: float32 of scratch memory for each row of X, rounded up to whole tiles of the first launch.
        image: a cubin, or PTX text that ends with a zero byte.
    """

    symbol: str
    arch: str
    max_rows: int
    launches: tuple[Launch, ...]
    workspace: int
    image: bytes


@dataclass(frozen=True, slots=True)
class Kernel:
    """The variants of one sparse operator, by rising `max_rows`; the last is for `ANY_ROWS`.

    A kernel for float32 always has variants for CPUs. ONNX Runtime's CPU provider has no 16-bit products to be faster
    than, so kernels for 16 bits have none.

    Attributes:
        name: what the node's attribute `kernel` says.
        in_features, out_features: K and N of the weight [N, K].
        block: (R, C) as stored.
        panel: outputs a panel.
        epilogue: what is fused; `bias` and `residual` say which pointers the code reads.
        cpu: variants for CPUs.
        cuda: variants for GPUs, one architecture after another.
        dtype: of X, bias, residual and Y.
        kind, x, y: as in `Problem`.
    """

    name: str
    in_features: int
    out_features: int
    block: tuple[int, int]
    panel: int
    epilogue: Epilogue
    cpu: tuple[CpuVariant, ...]
    cuda: tuple[CudaVariant, ...] = ()
    dtype: str = "float32"
    kind: Values | None = None
    x: str = "float"
    y: str = "float"

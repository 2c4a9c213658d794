"""From a problem and a schedule to an object file, by TVM's LLVM back end."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..kernels.cpu import EMITTERS

if TYPE_CHECKING:
    import tvm

    from ..kernels.cpu.schedule import Schedule
    from ..problem import Problem
    from ..target import CpuTarget


@dataclass(frozen=True, eq=False)
class Code:
    """One compiled schedule. LLVM makes machine code twice, for a file and for this process: each when it is wanted.

    Attributes:
        symbol: name of the function, made from the problem, the schedule and the target, so equal code has equal names.
        workspace: float32 of scratch memory a call needs.
        executable: TVM's.
        host: whether the target is this machine.
    """

    symbol: str
    workspace: int
    executable: tvm.runtime.Executable
    host: bool

    @cached_property
    def elf(self) -> bytes:
        """The object file."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.o"
            self.executable.mod.write_to_file(str(path), "o")
            return path.read_bytes()

    @cached_property
    def call(self) -> Callable[..., Any] | None:
        """The function itself where the target is this machine, else None. Takes pointers and integers."""
        return self.executable[self.symbol] if self.host else None


@lru_cache(maxsize=512)
def generate(problem: Problem, schedule: Schedule, target: CpuTarget) -> Code:
    """Compile `schedule` for `problem`; takes 0.1 to 1 second, with large tiles of integers several."""
    import tvm

    emitter: ModuleType = EMITTERS[schedule.kernel]
    symbol = "sparsec_" + hashlib.sha256(f"{problem.key}|{schedule}|{target}".encode()).hexdigest()[:16]
    function = emitter.emit(problem, schedule, symbol, target)
    executable = tvm.compile(tvm.IRModule({symbol: function}), target=target.tvm)
    return Code(symbol, emitter.workspace(problem, schedule), executable, target.host)

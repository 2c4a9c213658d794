"""sparsec: prune ONNX models into shapes that hardware can use, and compile kernels for exactly those weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compiler.artifact import load
    from .compiler.config import CompileConfig
    from .compiler.driver import CompiledModel, compile
    from .compiler.report import Report
    from .ir.errors import SparsecError, UsageError

__version__ = "0.1.0"

# Where each public name lives; imported when first asked for, so that `import sparsec` costs nothing (PEP 562).
_HOMES = {
    "compile": ".compiler.driver",
    "CompiledModel": ".compiler.driver",
    "CompileConfig": ".compiler.config",
    "Report": ".compiler.report",
    "load": ".compiler.artifact",
    "SparsecError": ".ir.errors",
    "UsageError": ".ir.errors",
}

__all__ = ["CompileConfig", "CompiledModel", "Report", "SparsecError", "UsageError", "__version__", "compile", "load"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sparsec' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return __all__

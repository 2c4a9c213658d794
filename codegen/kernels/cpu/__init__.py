"""Kernels for CPUs, on raw pointers and serial: the operator splits the work among ONNX Runtime's threads.

Every file offers `workspace(problem, schedule) -> int` and `emit(problem, schedule, symbol, target)`.
"""

from __future__ import annotations

from types import ModuleType

from . import dots, inputs, outputs, rows

EMITTERS: dict[str, ModuleType] = {"outputs": outputs, "rows": rows, "inputs": inputs, "dots": dots}

"""The ground: programs, layers, patterns, packed weights, decisions. numpy and onnx-ir only."""

from .decision import Decision, Timing
from .epilogue import Activation, Epilogue
from .errors import SparsecError, UsageError
from .grid import Grid
from .layer import Layer, LayerKind
from .patterns import BlockPattern, Pattern, parse_pattern
from .program import Program
from .sparse_matrix import SparseMatrix

__all__ = [
    "Activation",
    "BlockPattern",
    "Decision",
    "Epilogue",
    "Grid",
    "Layer",
    "LayerKind",
    "Pattern",
    "Program",
    "SparseMatrix",
    "SparsecError",
    "Timing",
    "UsageError",
    "parse_pattern",
]

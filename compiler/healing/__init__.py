"""Healing: a pruned model is trained, by PyTorch, to do again what the dense one does.

PyTorch is imported when the functions of this file are called, and nowhere else in sparsec.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...ir import SparsecError
from .device import CPU, check_device, parse_device
from .healed import Healed, with_vectors
from .limit import Limit, parse_limit

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_ir

    from ...ir import Program
    from ..calibration import Samples, Weights
    from .training import Trainer

__all__ = [
    "CPU",
    "Healed",
    "Limit",
    "check_operators",
    "check_torch",
    "make_trainer",
    "parse_device",
    "parse_limit",
    "with_vectors",
]


def check_torch(device: str = CPU) -> None:
    """Whether there is anything to train with, before a model is read.

    Raises:
        SparsecError: PyTorch is not installed or has no such device.
    """
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise SparsecError(
            f"--heal needs PyTorch, which cannot be imported ({error}): pip install 'sparsec[torch]'"
        ) from None
    check_device(device)


def check_operators(model: onnx_ir.Model) -> None:
    """Whether PyTorch can compute a model, before anything takes time; `check_torch` raises nothing.

    Raises:
        SparsecError: an operator of `model` has no mapping.
    """
    from .network import Network

    Network(model)


def make_trainer(
    program: Program,
    weights: Mapping[str, Weights],
    samples: Samples,
    seed: int,
    threads: int,
    device: str = "cpu",
) -> Trainer:
    """What trains the kept weights of pruned layers, where `check_torch` and `check_operators` raise nothing.

    Args:
        program: the dense model.
        weights: of the pruned layers, by name; where a matrix is zero it stays zero.
        samples: to train with.
        seed: of the order of the samples.
        threads: that PyTorch may use.
        device: that it computes on, in its words.

    Raises:
        SparsecError: PyTorch cannot compute the model or take its inputs.
    """
    from .training import Trainer

    return Trainer(program, weights, samples, seed, threads, device)

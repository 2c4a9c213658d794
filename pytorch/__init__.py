"""Pruning while a PyTorch model is trained, in sparsec's patterns, and the way from the model to the artifact.

    pruner = prune(model, PruneConfig(pattern="group:16", sparsity=0.9, schedule=Gradual(steps=2000)))
    ...                                 # any training loop, with pruner.step() after optimizer.step()
    export(model, (x,), "out")          # zeros made real, torch.onnx.export, sparsec.compile

The folder is called `pytorch` because one called `torch` in the root of the repository would hide PyTorch from
everything that is run there.
"""

from __future__ import annotations

try:
    import torch as _torch
except ImportError as error:
    raise ImportError(
        f"sparsec.torch needs PyTorch, which cannot be imported ({error}): pip install 'sparsec[torch]'"
    ) from None
del _torch

from .config import PruneConfig
from .distillation import distillation_loss
from .export import export
from .finalize import finalize
from .methods import PSP, Magnitude
from .prune import prune
from .pruner import Pruner
from .schedules import Gradual, Iterative, OneShot

__all__ = [
    "PSP",
    "Gradual",
    "Iterative",
    "Magnitude",
    "OneShot",
    "PruneConfig",
    "Pruner",
    "distillation_loss",
    "export",
    "finalize",
    "prune",
]

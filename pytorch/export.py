"""From a PyTorch model to the artifact, in one call."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..compiler.artifact import check_output
from ..compiler.config import CompileConfig
from ..compiler.driver import compile
from ..ir import SparsecError
from .finalize import finalize, pruned_parameters

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..compiler.context import Progress
    from ..compiler.driver import CompiledModel


def export(
    model: nn.Module | torch.export.ExportedProgram | torch.onnx.ONNXProgram,
    args: tuple[Any, ...] | None,
    out: str | Path,
    config: CompileConfig | None = None,
    progress: Progress | None = None,
    force: bool = False,
    **options: Any,
) -> CompiledModel:
    """Export `model` to ONNX, compile that, and write the artifact to the folder `out`.

    Args:
        model: a module, with masks or without (it is not changed: masks are made final in a copy, in which dropout and
            norms are as in inference); or what `torch.export.export` or `torch.onnx.export` made of a final one.
        args: example inputs; None where `model` has been exported already.
        out: the folder.
        config: of `sparsec.compile`; by default the zeros that are there are compiled and no weight changes.
        progress: is told what happens.
        force: replace `out` whatever it is.
        options: of `torch.onnx.export`, such as `dynamo`, `dynamic_shapes`, `dynamic_axes`, `input_names`, `kwargs`.

    Returns:
        The compiled model, which has the report.

    Raises:
        SparsecError: PyTorch cannot export the model, sparsec cannot compile it, or `out` cannot be
            written. Nothing was written.
    """
    check_output(Path(out), force)
    if isinstance(model, torch.onnx.ONNXProgram):
        _check_final(model.model.graph.initializers)
    elif isinstance(model, torch.export.ExportedProgram):
        _check_final(model.state_dict)
    with tempfile.TemporaryDirectory(prefix="sparsec-") as folder:
        file = Path(folder) / "model.onnx"
        if isinstance(model, torch.onnx.ONNXProgram):
            model.save(file)
        else:
            source = _ready(model) if isinstance(model, nn.Module) else model
            try:
                torch.onnx.export(source, args or (), file, **{"verbose": False, **options})
            except Exception as error:  # whatever PyTorch's exporters raise
                raise SparsecError(
                    f"export: PyTorch cannot write {type(model).__name__} as ONNX: {_words(error)}. Try the "
                    f"other exporter (dynamo={not options.get('dynamo', True)}), or give export() an ONNXProgram"
                ) from error
        compiled = compile(file, config, progress)
    compiled.save(out, force)
    return compiled


def _ready(model: nn.Module) -> nn.Module:
    """The model in inference with its zeros in its weights; a copy where anything has to change."""
    # What wraps a module for training is not part of it.
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return _ready(model.module)
    if hasattr(model, "_orig_mod"):  # torch.compile
        return _ready(model._orig_mod)
    if not any(module.training or pruned_parameters(module) for module in model.modules()):
        return model
    try:
        copied = copy.deepcopy(model)
    except Exception as error:  # whatever a module of the user's raises
        raise SparsecError(
            f"export: {type(model).__name__} cannot be copied ({_words(error)}): call finalize(model) and model.eval() "
            "first"
        ) from error
    for module in copied.modules():
        module._compiled_call_impl = None  # of module.compile(): bound to the module that was copied
    # First inference: what else is put on weights, such as a spectral norm, must not take another step of training.
    return finalize(copied.eval())


def _check_final(names: Iterable[str]) -> None:
    masks = [name for name in names if "parametrizations." in name and name.endswith((".mask", ".kept"))]
    if masks:
        raise SparsecError(
            f"export: this program computes its weights with masks whenever it runs ('{masks[0]}'): call finalize() "
            "before torch's export, or give export() the model itself"
        )


def _words(error: BaseException) -> str:
    """What went wrong first, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__

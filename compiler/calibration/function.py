"""A user's function by its name: "FILE.py:FUNCTION" or "package.module:FUNCTION"."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...ir import SparsecError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType


def names_function(text: str) -> bool:
    """Whether `text` has the form "FILE.py:FUNCTION" or "package.module:FUNCTION"; nothing is opened."""
    where, _, name = text.rpartition(":")
    return name.isidentifier() and (where.endswith(".py") or all(part.isidentifier() for part in where.split(".")))


def load_function(text: str, what: str) -> Callable[..., Any]:
    """The function that `text` names. Its file or module is run, with its own folder or the working one importable.

    Args:
        text: of a form that `names_function` knows.
        what: the thing that the function serves as, for messages: "calibration data".

    Raises:
        SparsecError: the file cannot be run, or has no such function.
    """
    where, _, name = text.rpartition(":")
    try:
        module = _run_file(Path(where)) if where.endswith(".py") else _import(where)
    except (Exception, SystemExit) as error:  # whatever a user's file may raise; a script's own exit among them
        raise SparsecError(f"{what} '{text}': the file cannot be run ({words(error)})") from error
    if not hasattr(module, name):
        raise SparsecError(f"{what} '{text}': the file has no '{name}'")
    function = getattr(module, name)
    if not callable(function):
        raise SparsecError(f"{what} '{text}': '{name}' is of type {type(function).__name__}, expected a function")
    return function  # type: ignore[no-any-return]  # callable() tells no signature


def words(error: BaseException) -> str:
    """An exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _run_file(path: Path) -> ModuleType:
    # The name is one that no import could mean, and stands in sys.modules because dataclasses look themselves up there.
    name = f"sparsec:{path.resolve()}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _importable(path.resolve().parent):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import(name: str) -> ModuleType:
    with _importable(Path.cwd()):
        return importlib.import_module(name)


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """`folder` first in the path of imports, as Python has it for a script."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))

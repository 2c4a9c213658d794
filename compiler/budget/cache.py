"""Solved options in a folder, so that another point of the frontier needs no second solving. Safe to delete."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...codegen.generate.version import code_version
from ...ir import Timing
from .options import Kept, Option, Options

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...ir import Layer, Program
    from ..config import CompileConfig

_TABLE, _ARRAYS, _FRONTIER = "options.json", "options.npz", "frontier.json"
# What does not change the options.
_FREE = {"pick", "max_drop", "speedup", "heal", "solutions", "cache", "calib", "labels", "metric"}
_FREE |= {"eval_data", "eval_labels"}


class Cache:
    """Options by what they depend on: read from one folder, written to another, which takes its place in the end."""

    def __init__(self, old: Path | None, new: Path, program: Program, config: CompileConfig) -> None:
        """Without `old` nothing is read or written; what cannot be read is as good as not there."""
        self._old, self._new = old, new
        self._key = _key(program, config) if old is not None else ""
        self._pattern = config.pattern

    def load(self, layers: Mapping[str, Layer]) -> Options | None:
        """What was stored for the same model and configuration, or None."""
        if self._old is None:
            return None
        try:
            table = json.loads((self._old / _TABLE).read_text(encoding="utf-8"))
            if table["key"] != self._key or list(table["layers"]) != list(layers):
                return None
            with np.load(self._old / _ARRAYS, allow_pickle=False) as arrays:
                return {
                    name: tuple(
                        _option(record, arrays, f"{number}.{i}", layers[name]) for i, record in enumerate(found)
                    )
                    for number, (name, found) in enumerate(table["layers"].items())
                }
        except (OSError, ValueError, KeyError, TypeError):
            return None  # missing or damaged: it is made again

    def store(self, options: Options) -> None:
        """Keep the options."""
        if self._old is None:
            return
        arrays: dict[str, Any] = {}
        table: dict[str, list[dict[str, Any]]] = {}
        for number, (name, found) in enumerate(options.items()):
            table[name] = []
            for i, option in enumerate(found):
                arrays[f"{number}.{i}.mask"], arrays[f"{number}.{i}.values"] = option.kept.mask, option.kept.values
                table[name].append(
                    {f.name: getattr(option, f.name) for f in dataclasses.fields(option) if f.name != "kept"}
                    | {"timings": [dataclasses.asdict(timing) for timing in option.timings]}
                )
        self._new.mkdir(exist_ok=True)
        np.savez(self._new / _ARRAYS, **arrays)
        document = json.dumps({"key": self._key, "pattern": self._pattern, "layers": table})
        (self._new / _TABLE).write_text(document, encoding="utf-8")

    def training(self, begun: str) -> tuple[Path, Path] | None:
        """Where the state of a training that began so is, and where it is to be left; None to keep none."""
        if self._old is None:
            return None
        name = hashlib.sha256(f"{self._key} {begun}".encode()).hexdigest()
        self._new.mkdir(exist_ok=True)
        old, new = (folder / f"training-{name[:16]}.pt" for folder in (self._old, self._new))
        return (new if new.exists() else old), new

    def load_frontier(self) -> dict[str, Any] | None:
        """What was stored beside these options, or None."""
        if self._old is None:
            return None
        try:
            found = json.loads((self._old / _FRONTIER).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and found.get("key") == self._key else None

    def store_frontier(self, frontier: dict[str, Any]) -> None:
        """Keep a frontier, so that its points keep their numbers."""
        if self._old is not None:
            document = json.dumps({"key": self._key, **frontier})
            (self._new / _FRONTIER).write_text(document, encoding="utf-8")


def stored_pattern(folder: Path | None) -> str | None:
    """The pattern of the options that were stored, if any were: another pick is from the same."""
    try:
        table = json.loads((folder / _TABLE).read_text(encoding="utf-8")) if folder is not None else {}
        return str(table["pattern"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _option(record: dict[str, Any], arrays: Any, name: str, layer: Layer) -> Option:
    timings = tuple(Timing(**{**one, "spread": tuple(one["spread"])}) for one in record["timings"])
    shape = (layer.out_features, layer.in_features)
    kept = Kept(shape, arrays[f"{name}.mask"], arrays[f"{name}.values"])
    return Option(**{**record, "timings": timings, "kept": kept})


def _key(program: Program, config: CompileConfig) -> str:
    """Of the weights, the configuration, the code and the data; of a folder or a function of data only its name."""
    digest = hashlib.sha256()
    for layer in program.layers:
        digest.update(layer.name.encode())
        digest.update(np.ascontiguousarray(layer.weight).tobytes())
    digest.update(json.dumps(config.model_dump(mode="json", exclude=_FREE), sort_keys=True).encode())
    # How long is trained changes no option; that there is training does: weights are then solved for other samples.
    digest.update(b"trained" if config.heal is not None else b"")
    for source in (config.calib, config.labels):
        digest.update(str(source).encode())
        if isinstance(source, str | Path) and Path(source).is_file():
            digest.update(Path(source).read_bytes())
    digest.update(f"{version('sparsec')} {code_version()}".encode())
    return digest.hexdigest()

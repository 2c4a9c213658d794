"""Where a training stands, in a file, so that a longer run goes on from there. Safe to delete."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from .ops import Tensor


def digest(seed: int, *tensors: Mapping[str, Tensor]) -> str:
    """Of what a training begins with."""
    found = hashlib.sha256(f"{seed}".encode())
    for group in tensors:
        for name, tensor in group.items():
            found.update(name.encode())
            found.update(tensor.detach().cpu().numpy().tobytes())
    return found.hexdigest()


def read_state(file: Path, key: str) -> dict[str, Any] | None:
    """What was written for the same beginning, or None."""
    try:
        found = torch.load(file, "cpu", weights_only=True)
        return found["state"] if found["key"] == key else None
    except Exception:  # missing or damaged, in whatever way: it is begun again
        return None


def write_state(file: Path, key: str, state: Mapping[str, Any]) -> None:
    """Leave tensors and numbers in `file`."""
    torch.save({"key": key, "state": dict(state)}, file)

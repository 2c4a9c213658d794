"""`make demo`: compile the trained, pruned digits classifier that the repository ships, and show what came of it."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import onnxruntime

from .digits import DENSE, GROUP16, accuracy, load_split, predictor

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def _working_in(folder: str) -> Iterator[None]:
    """`contextlib.chdir`, which Python 3.10 does not have."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def main() -> int:
    """Compile, print the table, compare accuracy and speed."""
    from ..compiler.artifact import load
    from ..compiler.cli import main as cli

    print(f"$ sparsec {os.path.relpath(GROUP16)} -o out --batch 1,16\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        with _working_in(folder):  # the recipe that is printed then says "out", as the command does
            code = cli([str(GROUP16.resolve()), "-o", out.name, "--batch", "1,16"])
        if code:
            return code
        _, _, x_test, y_test = load_split()
        cpu = ["CPUExecutionProvider"]
        sessions = {
            "dense twin (no zeros), ONNX Runtime": onnxruntime.InferenceSession(DENSE, providers=cpu),
            "pruned model, ONNX Runtime": onnxruntime.InferenceSession(GROUP16, providers=cpu),
            "pruned model, sparsec": load(out),
        }
        print(f"\nAccuracy on {len(y_test)} held-out digits:")
        for name, session in sessions.items():
            share = accuracy(predictor(session), x_test, y_test)
            print(f"  {share:7.2%}  {name}")
    print("\nThe demo's out/ was temporary and is gone: the command above makes one that stays.")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The version of the code that sparsec generates."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=1)
def code_version() -> str:
    """Changes whenever the generated code may: a hash of what generates it and TVM's version."""
    from importlib.metadata import version

    codegen = Path(__file__).parent.parent
    sources = [*(codegen / "kernels").rglob("*.py"), *(codegen / "generate").glob("*.py"), codegen / "problem.py"]
    digest = hashlib.sha256(version("apache-tvm").encode())
    for source in sorted(sources):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]

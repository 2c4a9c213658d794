"""Where training runs."""

from __future__ import annotations

import re

from ...ir import SparsecError, UsageError

CPU = "cpu"


def parse_device(text: str) -> str:
    """`cpu`, `cuda`, or `cuda:1` for the second one, as PyTorch says it.

    Raises:
        UsageError: it is none of them.
    """
    found = text.strip().lower()
    if not re.fullmatch(r"cpu|cuda(:\d+)?", found):
        raise UsageError(f"'{text}' is no device to train on: expected cpu, cuda, or cuda:1 for the second one")
    return found


def check_device(device: str) -> None:
    """Whether PyTorch can compute there.

    Raises:
        SparsecError: it cannot; the message says what it has.
    """
    import torch

    if device == CPU:
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        built = "finds no GPU that it can use" if torch.version.cuda else "was built for processors only"
        raise SparsecError(
            f"--heal-on {device}: PyTorch {torch.__version__} {built}. Leave --heal-on out to train on the "
            "processor, or see to it that torch.cuda.is_available() is true"
        )
    number = int(device.partition(":")[2] or 0)
    if number >= count:
        raise SparsecError(f"--heal-on {device}: PyTorch has {count} of them: expected cuda:0 to cuda:{count - 1}")

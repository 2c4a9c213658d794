"""How long and where to train: as it is written, what of it is spent, and what is refused. No PyTorch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sparsec import CompileConfig
from sparsec.compiler.healing import Limit, parse_device, parse_limit
from sparsec.ir import UsageError


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("5m", Limit(300, True)),
        ("90s", Limit(90, True)),
        ("1h", Limit(3600, True)),
        ("1.5m", Limit(90, True)),
        (" 2s ", Limit(2, True)),
        ("500", Limit(500, False)),
    ],
)
def test_times_and_steps(text: str, limit: Limit) -> None:
    assert parse_limit(text) == limit
    assert parse_limit(str(limit)) == limit


@pytest.mark.parametrize(
    "text", ["", "m", "0", "0s", "-5m", "5 m", "1d", "2.5", "nan", "inf", "1e3", "5m30s", "9" * 400]
)
def test_what_is_neither_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"such as 5m \(90s, 1h\), or a number of steps such as 500"):
        parse_limit(text)
    with pytest.raises(ValueError, match="is no time"):
        CompileConfig(heal=text)


@pytest.mark.parametrize("text", ["cpu", "cuda", "cuda:1", " CUDA:0 "])
def test_devices(text: str) -> None:
    assert CompileConfig(heal_on=text).heal_on == parse_device(text) == text.strip().lower()


@pytest.mark.parametrize("text", ["", "gpu", "cuda:", "cuda:-1", "mps", "cpu:0"])
def test_what_is_no_device_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected cpu, cuda, or cuda:1"):
        parse_device(text)
    with pytest.raises(ValueError, match="is no device to train on"):
        CompileConfig(heal_on=text)


def test_what_is_spent() -> None:
    assert Limit(300, True).spent(7, 75.0) == 0.25
    assert Limit(200, False).spent(50, 1e9) == 0.25


def test_a_share_of_few_steps_is_one() -> None:
    assert Limit(4, False) * 0.125 == Limit(1, False)
    assert Limit(80, False) * 0.125 == Limit(10, False)
    assert Limit(60, True) * 0.125 == Limit(7.5, True)


def test_all_samples_are_taken_where_weights_are_trained() -> None:
    assert CompileConfig().most_samples == 256
    assert CompileConfig(heal="5m").most_samples > 10**9
    assert CompileConfig(heal="5m", samples=3).most_samples == 3


def test_pytorch_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, sparsec.compiler.driver, sparsec.compiler.healing; print('torch' in sys.modules)"
    root = Path(__file__).parents[2] / ".typing"
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"

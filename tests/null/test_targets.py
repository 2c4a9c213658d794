"""Which targets there are, in which words the others are refused, and what a GPU's driver is asked."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparsec.codegen.target import cuda, parse_target
from sparsec.codegen.target.cuda import TABLE
from sparsec.compiler.doctor import examine
from sparsec.ir import UsageError

EXPECTED = "expected auto, cpu, cpu:NAME such as cpu:x86-64-v3 or cpu:neoverse-n1, cuda, or cuda:ARCH such as"
KNOWN = "sm_80, sm_86, sm_89, sm_90, sm_100"

# Attributes as cuda.h numbers them, with what an H200 says.
MAJOR, MINOR, SMS, CLOCK, L2, SHARED, MEMORY_CLOCK, BUS = 75, 76, 16, 13, 38, 97, 36, 37
H200 = {
    "name": "NVIDIA H200",
    MAJOR: 9,
    MINOR: 0,
    SMS: 132,
    CLOCK: 1_980_000,
    L2: 50 << 20,
    SHARED: 227 << 10,
    MEMORY_CLOCK: 3_201_000,
    BUS: 6144,
}


class FakeDriver:
    """Answers like libcuda.so.1; a GPU is a dictionary of its attributes, of which some may be missing."""

    def __init__(self, *gpus: dict[Any, Any], status: int = 0) -> None:
        self.gpus, self.status = gpus, status

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.status

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = 12080
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = len(self.gpus)
        return self.status

    def cuDeviceGet(self, handle: Any, number: int) -> int:  # noqa: N802
        handle._obj.value = 7 + number
        return 0

    def cuDeviceGetName(self, name: Any, size: int, handle: int) -> int:  # noqa: N802
        name.value = self.gpus[handle - 7]["name"].encode()[: size - 1]
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, handle: int) -> int:  # noqa: N802
        value._obj.value = self.gpus[handle - 7].get(attribute, -1)
        return int(attribute not in self.gpus[handle - 7])


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeDriver | None], None]:
    return lambda fake: monkeypatch.setattr(cuda, "_load_driver", lambda: fake)


# Names


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gpu", EXPECTED),
        ("", EXPECTED),
        ("cpu:", EXPECTED),
        ("cuda:", EXPECTED),
        ("cuda:sm_75", f"sparsec has no kernels for 'sm_75'; it has them for {KNOWN}"),
        ("cuda:sm_80+sm_70", f"sparsec has no kernels for 'sm_70'; it has them for {KNOWN}"),
        ("cuda:90", f"sparsec has no kernels for '90'; it has them for {KNOWN}"),
        ("cuda:sm_80+", f"'+' stands between two architectures out of {KNOWN}"),
        ("cuda:+sm_80", f"'+' stands between two architectures out of {KNOWN}"),
        ("cuda:sm_80+sm_80", "'sm_80' is named twice"),
        ("cuda:sm_90+sm_90a", "'sm_90a' is named twice"),
        ("cpu:zen9", "LLVM knows no 64-bit CPU 'zen9'; examples: x86-64-v3"),
        ("cpu:i386", "LLVM knows no 64-bit CPU 'i386'"),
        ("cpu:sm_90", "LLVM knows no 64-bit CPU 'sm_90'"),
    ],
)
def test_what_is_no_target_is_refused_in_a_sentence(text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_target(text)
    assert str(caught.value).startswith(f"target '{text}': ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_architectures_come_oldest_first(driver: Any) -> None:
    driver(None)
    target = parse_target("cuda:sm_90+sm_80")
    assert target.cuda == (TABLE["sm_80"], TABLE["sm_90a"])
    assert str(target) == "cuda:sm_80+sm_90a"
    assert parse_target(str(target)) == target


# The driver


def test_no_driver(driver: Any) -> None:
    driver(None)
    with pytest.raises(UsageError, match="no NVIDIA GPU that sparsec has kernels for, or no driver") as caught:
        parse_target("cuda")
    assert "cuda:sm_90" in str(caught.value)
    assert parse_target("cuda:sm_80").cuda[0].device is None


def test_a_missing_library_is_no_error(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert cuda.find_driver() is None
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("status", "gpus"), [(100, ()), (803, (H200,)), (0, ())])
def test_a_driver_without_a_gpu(driver: Any, status: int, gpus: Any) -> None:
    driver(FakeDriver(*gpus, status=status))
    assert cuda.find_driver() == cuda.Driver("12.8", (), status)
    with pytest.raises(UsageError, match="target 'cuda': this machine has no NVIDIA GPU"):
        parse_target("cuda")


def test_a_gpu_gives_its_numbers(driver: Any) -> None:
    driver(FakeDriver(H200))
    (target,) = parse_target("cuda").cuda
    assert (target.arch, target.device, target.model) == ("sm_90a", 0, "NVIDIA H200")
    assert target.bandwidth == pytest.approx(4.917e12, rel=1e-3)
    assert (target.sms, target.l2_bytes, target.shared_bytes) == (132, 50 << 20, 227 << 10)
    # The clock that the datasheet's rates are of is 1.98 GHz.
    for dtype, rate in TABLE["sm_90a"].flops:
        assert target.rate(dtype) == pytest.approx(rate, rel=0.02)


def test_rates_follow_multiprocessors_and_clock(driver: Any) -> None:
    driver(FakeDriver({**H200, SMS: 66, CLOCK: 990_000}))
    (target,) = parse_target("cuda").cuda
    for dtype, rate in TABLE["sm_90a"].flops:
        assert target.rate(dtype) == pytest.approx(rate / 4, rel=0.02)


@pytest.mark.parametrize("arch", TABLE)
def test_what_the_driver_does_not_say_comes_from_the_table(driver: Any, arch: str) -> None:
    row = TABLE[arch]
    driver(FakeDriver({"name": "silent", MAJOR: row.capability[0], MINOR: row.capability[1]}))
    (target,) = parse_target("cuda").cuda
    assert replace(target, flops=row.flops) == replace(row, model="silent", device=0)
    assert [rate for _, rate in target.flops] == pytest.approx([rate for _, rate in row.flops])


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ((7, 5), None),
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((8, 7), "sm_86"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90a"),
        ((9, 1), None),  # "a" is for 9.0 alone
        ((10, 0), "sm_100"),
        ((10, 3), "sm_100"),
        ((12, 0), None),
    ],
)
def test_the_newest_code_that_a_gpu_runs(driver: Any, capability: tuple[int, int], arch: str | None) -> None:
    driver(FakeDriver({**H200, MAJOR: capability[0], MINOR: capability[1]}))
    if arch is None:
        with pytest.raises(UsageError, match="this machine has no NVIDIA GPU that sparsec has kernels for"):
            parse_target("cuda")
    else:
        (target,) = parse_target("cuda").cuda
        assert target.arch == arch
        assert target.capability == TABLE[arch].capability
        # What runs on every GPU of an architecture fits into the table's shared memory.
        assert target.shared_bytes <= TABLE[arch].shared_bytes


def test_each_architecture_has_the_numbers_of_its_first_device(driver: Any) -> None:
    old = {"name": "NVIDIA T4", MAJOR: 7, MINOR: 5}
    a100 = {"name": "NVIDIA A100", MAJOR: 8, MINOR: 0, SMS: 108}
    driver(FakeDriver(old, H200, a100, {**H200, "name": "second"}))
    found = parse_target("cuda").cuda
    assert [(t.arch, t.model, t.device) for t in found] == [("sm_80", "NVIDIA A100", 2), ("sm_90a", "NVIDIA H200", 1)]
    assert [t.device for t in parse_target("cuda:sm_86+sm_90").cuda] == [None, 1]


# What `sparsec doctor` says


def findings(tmp_path: Path) -> dict[str, str]:
    found = examine(tmp_path)
    assert not [f for f in found if f.name in ("GPU", "CUDA compiler") and f.problem], "sparsec works without a GPU"
    return {finding.name: finding.value for finding in found}


@pytest.mark.parametrize(
    ("fake", "value"),
    [
        (None, "none: no NVIDIA driver"),
        (FakeDriver(), "none that CUDA can use, driver for CUDA 12.8"),
        (FakeDriver(status=803), "none that CUDA can use (CUDA error 803), driver for CUDA 12.8"),
        (FakeDriver(H200, H200), "NVIDIA H200, compute capability 9.0; driver for CUDA 12.8"),
        (
            FakeDriver({"name": "NVIDIA T4", MAJOR: 7, MINOR: 5}),
            "NVIDIA T4, compute capability 7.5 (no kernels for it); driver for CUDA 12.8",
        ),
    ],
)
def test_doctor_names_the_gpu(driver: Any, fake: FakeDriver | None, value: str, tmp_path: Path) -> None:
    driver(fake)
    assert findings(tmp_path)["GPU"] == value


def test_doctor_says_how_to_get_a_cuda_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from sparsec.codegen.generate import nvrtc

    monkeypatch.setattr(nvrtc, "_find_nvrtc", lambda: nvrtc.CudaCompiler("NVRTC 13.5", lambda *_: (b"", "")))
    monkeypatch.setattr(nvrtc, "_find_nvcc", lambda: nvrtc.CudaCompiler("nvcc 13.0", lambda *_: (b"", "")))
    assert findings(tmp_path)["CUDA compiler"] == "NVRTC 13.5, nvcc 13.0"
    monkeypatch.setattr(nvrtc, "_find_nvrtc", lambda: None)
    monkeypatch.setattr(nvrtc, "_find_nvcc", lambda: None)
    assert "pip install 'sparsec[cuda]'" in findings(tmp_path)["CUDA compiler"]

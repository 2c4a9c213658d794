"""Products of bfloat16, two inputs at a time: what float64 gives of the rounded operands, on every processor."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_kernels import (
    EPILOGUES,
    EVERYTHING,
    WORKS,
    X86,
    Code,
    Data,
    Work,
    check,
    compiled,
    executable,
    pointers,
    ranges,
    supported,
)
from test_kernels import arguments as arguments_of

import sparsec
from sparsec.codegen.generate.cpu import generate
from sparsec.codegen.kernels.cpu import dots
from sparsec.codegen.kernels.cpu.schedule import Schedule
from sparsec.codegen.problem import Problem
from sparsec.codegen.target import parse_cpu
from sparsec.compiler import runtime
from sparsec.compiler.config import Tune
from sparsec.compiler.runtime import Comparison
from sparsec.ir import Activation, Epilogue, UsageError
from sparsec.ir.values import Floats, Int8
from sparsec.models.mlp import mlp

if TYPE_CHECKING:
    from pathlib import Path

    from sparsec.codegen.target import CpuTarget

BFLOAT16, BIASED = Floats("bfloat16"), Epilogue(bias=True)
SCHEDULES = st.builds(
    Schedule, st.just("dots"), tile_rows=st.integers(1, 4), accumulators=st.sampled_from((1, 4, 8, 16))
)
BLOCKS = st.one_of(
    st.sampled_from([(32, 2), (16, 2), (32, 32), (4, 2), (20, 6), (64, 16), (8, 8), (1, 2), (3, 4)]),
    st.tuples(st.integers(1, 70), st.integers(1, 20).map(lambda pairs: 2 * pairs)),
)
SHAPES = st.tuples(st.integers(1, 150), st.integers(1, 80).map(lambda pairs: 2 * pairs))


@pytest.fixture(scope="module")
def host() -> CpuTarget:
    return parse_cpu()


def pairs(tile: int, shape: tuple[int, int], block: tuple[int, int], epilogue: Epilogue = BIASED) -> Code:
    return Code(Schedule("dots", tile), shape, block, epilogue, BFLOAT16, "bfloat16")


def test_equals_float64(host: CpuTarget) -> None:
    """Any shape, block, schedule, epilogue, number of rows, density and range of rows and panels."""

    @settings(max_examples=8, deadline=None, derandomize=True, database=None)
    @given(st.builds(Code, SCHEDULES, SHAPES, BLOCKS, EPILOGUES, st.just(BFLOAT16), st.just("bfloat16")), WORKS)
    @example(pairs(3, (38, 74), (5, 6)), EVERYTHING)
    @example(pairs(1, (1, 2), (1, 2)), EVERYTHING)
    @example(pairs(13, (96, 64), (32, 2)), EVERYTHING)
    def property_(code: Code, works: list[Work]) -> None:
        call = compiled(code, host)
        for work in works:
            check(code, work, call)

    property_()


def test_x_is_rounded_to_the_nearest(host: CpuTarget) -> None:
    """Ties to even, up to infinity, NaN stays NaN whatever its bits: each output is one input."""
    bits = np.array([0x3F800000, 0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0x80000000])
    nan = np.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFC00000])
    x = np.concatenate([bits, nan]).astype(np.uint32).view(np.float32)
    code = pairs(2, (len(x), len(x)), (4, 2), Epilogue())
    nothing = np.zeros(0, dtype=np.float32)
    # NaN and infinity would reach every output of their row: a row for each input, of zeros but for it.
    data = Data(code.packed(np.eye(len(x), dtype=np.float32)), np.diag(x), nothing, nothing)
    y = np.zeros((len(x), len(x)), dtype=np.float32)
    scratch = np.zeros(dots.workspace(code.problem, code.schedule), dtype=np.float32)
    work = Work(len(x), 1.0)
    compiled(code, host)(*pointers(arguments_of(data, y, scratch)), *ranges(code, work))
    with np.errstate(invalid="ignore", over="ignore"):
        right = x.astype(BFLOAT16.dtype).astype(np.float32)
    np.testing.assert_array_equal(np.diag(y), right)


@pytest.mark.parametrize("cpu", ["x86-64", "x86-64-v3", "skylake-avx512"])
def test_right_on_older_processors(cpu: str, host: CpuTarget) -> None:
    target = parse_cpu(cpu)
    if not supported(target, host):
        pytest.skip(f"this machine lacks what {target} may use")
    code = pairs(3, (53, 40), (20, 4), Epilogue(Activation.GELU, bias=True))
    call = executable(code, target)["kernel"]
    for height in (1, 9, 33):
        check(code, Work(height, 0.3, seed=height), call)


@pytest.mark.skipif(not X86, reason="LLVM may have no other back end")
@pytest.mark.parametrize("cpu", ["cooperlake", "sapphirerapids", "znver4"])
@pytest.mark.parametrize(("block", "register"), [((32, 2), "zmm"), ((8, 2), "ymm"), ((4, 2), "xmm")])
def test_instruction(cpu: str, block: tuple[int, int], register: str) -> None:
    """One for a pair of inputs of a whole vector of outputs, with nothing called or widened beside it."""
    code = pairs(2, (64, 64), block)
    text = str(executable(code, parse_cpu(cpu)).mod.inspect_source("asm"))
    assert re.search(rf"\tvdpbf16ps\t.*%{register}", text)
    assert "sparsec_dpbf16ps" not in text.replace(".file", "")
    assert "avx512bf16" in parse_cpu(cpu).requires, "the library asks for it"


def test_object_for_aarch64() -> None:
    made = generate(pairs(1, (53, 40), (20, 4)).problem, Schedule("dots", 1), parse_cpu("neoverse-n1"))
    assert int.from_bytes(made.elf[18:20], "little") == 183  # EM_AARCH64


def test_what_is_no_problem() -> None:
    good = pairs(1, (32, 32), (16, 2)).problem
    for change in ({"kind": None}, {"kind": Int8()}, {"block": (16, 3)}, {"in_features": 33}):
        with pytest.raises(ValueError, match="products of bfloat16 need such weights and pairs of inputs"):
            replace(good, **change)
    plain = Code(Schedule("outputs", 1), (32, 32), (16, 2), kind=BFLOAT16).packed(np.ones((32, 32), np.float32))
    with pytest.raises(ValueError, match="X as 'bfloat16' and inputs 1 together"):
        Problem.of(plain, Epilogue(), "bfloat16")


# ---- From the model to the artifact ----

X = np.random.default_rng(0).standard_normal((16, 96)).astype(np.float32)


@pytest.fixture
def _sparse_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "compare", lambda dense, sparse, pairs=7: Comparison(2.0, 1.0, 2.0, (2.0, 2.0)))


@pytest.mark.usefixtures("_sparse_wins")
@pytest.mark.parametrize("pattern", ["auto", "block:32x4", "group:16"])
def test_artifact(tmp_path: Path, pattern: str) -> None:
    """Checked against the dense model with the same weights and X rounded by ONNX's own Cast."""
    common = {"layer_sparsity": (("*", 0.7),), "tune": Tune.OFF, "threads": 2, "cache": tmp_path, "batch": (1, 16)}
    model = mlp((96, 128, 128))
    config = sparsec.CompileConfig(values="bf16", activations="bf16", pattern=pattern, **common)
    result = sparsec.compile(model, config)
    form = {"auto": ("block:16x2", "bfloat16"), "block:32x4": ("block:32x4", "bfloat16")}
    wanted = form.get(pattern, ("group:16", "float"))
    assert [(d.pattern, d.inputs) for d in result.report.decisions] == [wanted] * 2
    assert result.report.verification is not None
    assert result.report.verification.error < 1e-5
    for node in onnx.load(result._folder / "model.onnx").graph.node:
        a = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert (a.get("products"), a["value_type"]) == ((b"bf16" if wanted[1] != "float" else None), b"bf16")
    plain = sparsec.compile(model, sparsec.CompileConfig(pattern=wanted[0], **common))
    expected, actual = (one.run({"input": X})["output"] for one in (plain, result))
    assert 0 < np.linalg.norm(actual - expected) < 0.01 * np.linalg.norm(expected)


def test_such_products_need_such_weights(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--activations bf16 goes with --values bf16; the values are int8"):
        sparsec.compile(mlp((96, 128)), sparsec.CompileConfig(values="int8", activations="bf16", cache=tmp_path))

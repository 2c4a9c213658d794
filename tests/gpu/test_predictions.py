"""Choosing without a GPU: the cost model, the candidates, and what a compilation for a GPU that is elsewhere says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import sparsec
from sparsec.codegen.kernels.gpu import EMITTERS
from sparsec.codegen.problem import Problem
from sparsec.codegen.target.cuda import TABLE
from sparsec.codegen.tune import Database
from sparsec.codegen.tune.gpu import GpuTuner
from sparsec.codegen.tune.gpu.model import predict, predict_dense
from sparsec.codegen.tune.gpu.space import candidates
from sparsec.compiler.machine import Cuda
from sparsec.ir import SparsecError
from sparsec.ir.sparse_matrix import panel_width
from sparsec.models.mlp import ffn

H200, A100 = TABLE["sm_90a"], TABLE["sm_80"]


def problem(
    out: int = 8192,
    inputs: int = 8192,
    block: tuple[int, int] = (128, 16),
    density: float = 0.1,
    dtype: str = "float16",
) -> Problem:
    return Problem(inputs, out, block, panel_width(block[0], dtype), density, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("block", [(1, 1), (16, 1), (5, 3), (64, 1), (64, 16), (128, 16), (32, 32)])
@pytest.mark.parametrize("rows", [1, 7, 64, 4096])
def test_candidates_serve_and_the_best_is_first(dtype: str, block: tuple[int, int], rows: int) -> None:
    for gpu in TABLE.values():
        p = problem(block=block, dtype=dtype)
        found = candidates(p, gpu, rows)
        assert found, "every problem has a kernel"
        assert not any(EMITTERS[schedule.kernel].obstacle(p, schedule, gpu.arch) for schedule in found)
        times = [predict(p, schedule, gpu, rows) for schedule in found]
        assert times == sorted(times)
        assert min(times) > 0


def test_what_may_be_chosen() -> None:
    def kernels(p: Problem, gpu: str, **options: bool) -> set[str]:
        return {schedule.kernel for schedule in candidates(p, TABLE[gpu], 512, **options)}

    assert kernels(problem(), "sm_90a") == {"simt", "mma", "wgmma"}
    assert kernels(problem(), "sm_90a", portable=True) == {"simt", "mma"}
    assert kernels(problem(), "sm_80") == {"simt", "mma"}
    # Float32 is not rounded to TF32 unless that was asked for.
    assert kernels(problem(dtype="float32"), "sm_90a") == {"simt"}
    assert kernels(problem(dtype="float32"), "sm_90a", tf32=True) == {"simt", "mma"}


def test_times_follow_the_work() -> None:
    def seconds(rows: int, **changes: float) -> float:
        p = problem(**changes)  # type: ignore[arg-type]
        return predict(p, candidates(p, H200, rows)[0], H200, rows)

    assert seconds(1, density=0.1) < seconds(1, density=0.4) < seconds(4096, density=0.4)
    # The weights of one row are bytes to be read: a tenth of them takes a tenth of the time, but for the launch.
    dense = predict_dense(problem(out=28672), H200, 1)
    assert 5 < dense / seconds(1, out=28672, density=0.1) < 10
    # A product that takes no longer than its launch cannot get faster.
    small = problem(out=384, inputs=384, block=(16, 1), dtype="float32")
    assert predict_dense(small, H200, 1) < 1.3 * predict(small, candidates(small, H200, 1)[0], H200, 1)


def test_a_measured_record_goes_before_a_prediction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = Database(tmp_path / "tuning.sqlite")
    tuner = GpuTuner((H200,), "quick", database)
    predicted = tuner.choose(problem(), H200, 1)
    assert not predicted.measured
    monkeypatch.setattr(Database, "find", lambda *_: {"schedule": {"kernel": "simt", "tile_rows": 2}, "seconds": 1e-6})
    kept = tuner.choose(problem(), H200, 1)
    assert (kept.measured, kept.seconds, kept.schedule.tile_rows) == (True, 1e-6, 2)


def test_code_for_every_architecture_and_ptx_for_later_ones(tmp_path: Path) -> None:
    tuner = GpuTuner((A100, H200), "off", Database(tmp_path / "tuning.sqlite"))
    variants = tuner.variants(problem(out=256, inputs=256, block=(16, 1)), [1, 64])
    assert list(dict.fromkeys(variant.arch for variant in variants)) == ["sm_80", "sm_90a", "compute_90"]
    for arch in ("sm_80", "sm_90a", "compute_90"):
        limits = [variant.max_rows for variant in variants if variant.arch == arch]
        assert limits == sorted(set(limits)) and limits[-1] == 2**63 - 1


# ---- The whole way ----


def test_compiling_for_gpus_that_are_elsewhere(tmp_path: Path) -> None:
    """Predicted and said so, machine code for both in the library, and the same library runs on this CPU."""
    config = sparsec.CompileConfig(
        sparsity=0.9, pattern="group:32", target="cuda:sm_80+sm_90", layer_sparsity=(("*", 0.9),), cache=tmp_path
    )
    model = ffn(inputs=4096, hidden=8192)
    compiled = sparsec.compile(model, config)
    report = compiled.report
    assert [decision.choice for decision in report.decisions] == ["sparse", "sparse"]
    for decision in report.decisions:
        assert decision.reason.startswith("predicted, not measured: ")
        assert decision.timings and all(timing.predicted for timing in decision.timings)
    assert report.timings == ()
    assert any("no speed was measured" in note for note in report.notes)
    assert report.verification is not None and report.verification.error < 1e-4
    out = tmp_path / "out"
    compiled.save(out)
    compiled.close()
    symbols = [
        symbol for kernel in json.loads((out / "manifest.json").read_text())["kernels"] for symbol in kernel["symbols"]
    ]
    library = (out / "libsparsec_ops.so").read_bytes()
    assert library.count(b"\x7fELF") > len(report.decisions) * 2, "a cubin is an ELF file"
    assert b".target sm_90" in library, "PTX for later GPUs"
    assert symbols
    session = sparsec.load(out)
    assert isinstance(session, onnxruntime.InferenceSession)
    x = np.random.default_rng(0).standard_normal((3, 4096)).astype(np.float32)
    assert np.isfinite(session.run(None, {session.get_inputs()[0].name: x})[0]).all()


def test_a_small_model_stays_dense(tmp_path: Path) -> None:
    config = sparsec.CompileConfig(sparsity=0.9, target="cuda:sm_90", cache=tmp_path)
    with_small_layers = ffn(inputs=256, hidden=256)
    report = sparsec.compile(with_small_layers, config).report
    assert report.sparse_layers == 0
    assert "predicted, not measured: " in report.decisions[0].reason


def test_no_gpu_to_measure_on() -> None:
    with pytest.raises(SparsecError, match="driver"):
        Cuda(0).open(ffn().SerializeToString())

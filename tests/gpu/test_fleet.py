"""Measuring on other machines: TVM's RPC with a tracker and a server here, on a driver without a GPU."""

from __future__ import annotations

import functools
import pickle
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_cuda import COMPILER, Fake, build, installed, numpy_kernel, offer, variant

import sparsec
from sparsec.codegen.generate.version import code_version
from sparsec.codegen.problem import Problem
from sparsec.codegen.target.cuda import TABLE
from sparsec.codegen.tune import Database
from sparsec.codegen.tune.gpu import Fleet, GpuTuner, fleet, parse_fleet
from sparsec.compiler.cli import main
from sparsec.ir import Activation, Epilogue, SparsecError, UsageError
from sparsec.models.mlp import mlp

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")
PROBLEM = Problem(48, 64, (16, 1), 16, 0.25, Epilogue(bias=True, activation=Activation.RELU))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("driver"))


@pytest.fixture(scope="module")
def served(library: Path) -> Iterator[Fleet]:
    """A tracker, and a server whose GPU is the fake one with a kernel in numpy."""
    from tvm.rpc.server import Server
    from tvm.rpc.tracker import Tracker

    with pytest.MonkeyPatch.context() as patch:
        # Both run in processes of their own, which have to find this folder.
        patch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{Path(sparsec.__file__).parents[1]}")
        tracker = Tracker("127.0.0.1", 19190, 19290, silent=True)
        address = ("127.0.0.1", tracker.port)
        ready = functools.partial(offer, str(library), PROBLEM)
        server = Server(
            "127.0.0.1", 19291, 19390, key="fake", tracker_addr=address, silent=True, server_init_callback=ready
        )
        try:
            found = Fleet(*address, "fake")
            yield found
        finally:
            server.terminate()
            tracker.terminate()


def test_a_fleet_is_read_and_printed() -> None:
    assert parse_fleet("tracker:gpu-farm:9190/h200") == Fleet("gpu-farm", 9190, "h200")
    assert str(Fleet("gpu-farm", 9190, "h200")) == "tracker:gpu-farm:9190/h200"
    for text in ("", "gpu-farm:9190", "tracker:gpu-farm/h200", "tracker:a:0/k", "tracker:a:70000/k", "tracker:a:1/"):
        with pytest.raises(UsageError, match=r"expected tracker:HOST:PORT/KEY"):
            parse_fleet(text)


def test_what_is_there_and_how_fast(served: Fleet) -> None:
    gpus = served.gpus()
    assert list(gpus) == ["sm_90a"]
    gpu = gpus["sm_90a"]
    assert (gpu.device, gpu.remote) == (None, 0)
    with served.meter(gpu, tf32=False) as seconds_of:
        assert 0 < seconds_of(PROBLEM, variant(PROBLEM), 4) < 1
        assert 0 < seconds_of(PROBLEM, variant(PROBLEM), 7) < 1


def test_a_wrong_kernel_is_told(served: Fleet) -> None:
    other = replace(PROBLEM, epilogue=Epilogue())  # the kernel there adds a bias
    with (
        served.meter(served.gpus()["sm_90a"], tf32=False) as seconds_of,
        pytest.raises(SparsecError, match=r"tracker:.*/fake: kernel 'right' is wrong for 4 rows"),
    ):
        seconds_of(other, variant(other), 4)


def test_keys_that_nobody_answers_to(served: Fleet) -> None:
    with pytest.raises(SparsecError, match=r"no machine waits under 'h200' \(there: fake\): run 'sparsec serve"):
        replace(served, key="h200").gpus()


def test_no_tracker() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(SparsecError, match=rf"no tracker answers .*rpc_tracker --host 0.0.0.0 --port {port}"):
        Fleet("127.0.0.1", port, "k").gpus()


# ---- What a server answers, in this process ----


def answer(function: Any, *arguments: Any) -> str:
    return fleet._answered(function, pickle.dumps(arguments if len(arguments) > 1 else arguments[0]))


def test_another_version_is_refused() -> None:
    assert "another version of sparsec or TVM" in answer(fleet._gpus, "0123")
    assert "install the same" in answer(fleet._measured, "0123", PROBLEM, variant(PROBLEM), 4, 0, False)


def test_data_that_is_none() -> None:
    assert "UnpicklingError" in fleet._answered(fleet._gpus, b"no pickle")


def test_measuring_is_what_it_is_here(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with installed(library, monkeypatch) as fake:
        assert isinstance(fake, Fake)
        fake.on_launch(numpy_kernel(PROBLEM))
        found = answer(fleet._measured, code_version(), PROBLEM, variant(PROBLEM), 4, 0, False)
        assert found.startswith('{"result": ')


# ---- The tuner and the command line ----


class Elsewhere(Fleet):
    """Measures nothing: says that the last candidate is the fastest."""

    asked = 0

    @contextmanager
    def meter(self, gpu: Any, tf32: bool) -> Iterator[Any]:
        def seconds(problem: Problem, variant: Any, rows: int) -> float:
            Elsewhere.asked += 1
            return 1.0 / Elsewhere.asked

        yield seconds


def test_searches_of_the_fleet_are_kept(tmp_path: Path) -> None:
    gpu = replace(TABLE["sm_90a"], remote=0)
    tuner = GpuTuner((gpu,), "quick", Database(tmp_path / "t.sqlite"), fleet=Elsewhere("nowhere", 1, "k"))
    first = tuner.choose(PROBLEM, gpu, 4)
    asked = Elsewhere.asked
    assert first.measured
    assert first.seconds == 1.0 / asked
    assert tuner.choose(PROBLEM, gpu, 4) == first
    assert Elsewhere.asked == asked


def test_what_it_does_not_go_with(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(mlp((64, 64, 8)).SerializeToString())
    for words, expected in (
        (["--target", "cpu"], "the target is cpu"),
        (["--target", "cuda:sm_90", "--tune", "off"], "--tune off forbids"),
        (["--target", "cuda:sm_90", "--tune-on", "h200"], "expected tracker:HOST:PORT/KEY"),
    ):
        assert main([str(path), "-o", str(tmp_path / "out"), "--tune-on", "tracker:a:1/k", *words]) == 2
        assert expected in " ".join(capfd.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_gpus_that_are_not_there(served: Fleet, tmp_path: Path) -> None:
    config = sparsec.CompileConfig(target="cuda:sm_80", tune_on=str(served), cache=tmp_path)
    with pytest.raises(UsageError, match=r"the GPUs there are sm_90a, and the target is cuda:sm_80"):
        sparsec.compile(mlp((64, 64, 8)), config)


def test_serving_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(fleet, "find_driver", lambda: None)
    assert main(["serve", "tracker:a:1/k"]) == 1
    assert "no NVIDIA GPU that could measure" in capfd.readouterr().err

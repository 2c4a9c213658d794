"""The benchmark for a GPU machine, without one: what it measures, in which order, and how it takes failures."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fake_cuda import COMPILER, Fake, build, installed, numpy_kernel, variant

from sparsec.codegen.problem import Problem
from sparsec.ir import SparsecError

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402

SMALL = gpu.Point("float16", 96, 64, (32, 1), 0.5, 5)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def fake(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    with installed(library, monkeypatch) as fake:
        yield fake


def write_folder(folder: Path, names: dict[str, list[str]], problem: Problem) -> None:
    """As `prepare` writes it: points with the entries of their kernels."""
    index: dict[str, Any] = {"arch": "sm_90a", "code": "c0de", "checks": {}, "points": {}, "variants": {}}
    for key, entries in names.items():
        index["points"][key] = [(f"schedule {entry}", entry) for entry in entries]
        for entry in entries:
            made = variant(problem, entry)
            (folder / f"{entry}.gz").write_bytes(gzip.compress(made.image))
            index["variants"][entry] = {k: v for k, v in asdict(made).items() if k != "image"}
    (folder / "index.json").write_text(json.dumps(index))


# ---- The grid ----


def test_the_grid_is_whole_and_begins_with_what_matters() -> None:
    grid = gpu.points()
    assert len(grid) == len(set(grid))
    assert sum(point.dtype == "float16" for point in grid) == 6 * 7 * 5 * 6
    assert grid[:12] == gpu.bars()
    assert str(grid[0]) == "float16 8192x28672 block 32x1 zeros 90% rows 1"
    assert str(grid[3]) == "float32 8192x28672 block 32x1 zeros 90% rows 1"
    assert {point.zeros for point in grid[9:12]} == {0.7, 0.8, 0.9} and {point.rows for point in grid[9:12]} == {4096}


def test_points_of_a_weight_are_neighbours() -> None:
    """Making a weight takes longer than timing a point."""
    rest = [(p.dtype, p.out, p.inputs, p.block, p.zeros) for p in gpu.points()[12:]]
    changes = 1 + sum(a != b for a, b in pairwise(rest))
    assert changes == len(set(rest))


def test_problems_are_what_the_exporter_would_pose() -> None:
    point = gpu.Point("tfloat32", 8192, 8192, (128, 16), 0.95, 1)
    assert point.problem == Problem(8192, 8192, (128, 16), 32, 0.05, dtype="float32")
    assert gpu.Point("bfloat16", 8192, 8192, (128, 16), 0.7, 1).problem.panel == 64


@pytest.mark.parametrize("parts", [1, 3, 8, 2000])
def test_parts_are_the_grid(parts: int) -> None:
    grid = gpu.points()
    assert [point for i in range(1, parts + 1) for point in gpu.part_of(grid, f"{i}/{parts}")] == grid


@pytest.mark.parametrize("part", ["0/3", "4/3", "2", "a/b", "1/0", "1/2/3"])
def test_no_such_part(part: str) -> None:
    with pytest.raises(SparsecError, match=f"--part {part}: expected I/N"):
        gpu.part_of(gpu.points(), part)


# ---- Preparing ----


def test_prepare_compiles_a_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real kernels, here one of a kind; a second share of zeros costs nothing, and nothing is compiled twice."""
    pytest.importorskip("tvm")
    monkeypatch.setattr(gpu, "EACH", 1)
    monkeypatch.setattr(gpu, "ProcessPoolExecutor", Inline)
    grid = [SMALL, gpu.Point("float16", 96, 64, (32, 1), 0.9, 5)]
    (tmp_path / "of_older_code.gz").write_bytes(b"")
    gpu.prepare(tmp_path, "sm_90a", grid, checks=())
    index = json.loads((tmp_path / "index.json").read_text())
    assert {path.stem for path in tmp_path.glob("*.gz")} == {v["symbol"] for v in index["variants"].values()}
    assert list(index["points"]) == [str(point) for point in grid]
    assert index["points"][str(grid[0])] == index["points"][str(grid[1])]
    kinds = {schedule.split(",")[0] for schedule, _ in index["points"][str(SMALL)]}
    assert {"simt", "mma"} <= kinds and len(index["variants"]) == len(kinds)
    for described in index["variants"].values():
        loaded = gpu.load_variant(tmp_path, described)
        assert loaded.image.startswith(b"\x7fELF") and loaded.arch == "sm_90a"
        assert all(launch.arguments and launch.entry.encode() in loaded.image for launch in loaded.launches)
    monkeypatch.setattr(gpu, "compile_one", lambda *_: pytest.fail("compiled again"))
    gpu.prepare(tmp_path, "sm_90a", grid, checks=())
    assert json.loads((tmp_path / "index.json").read_text()) == index


def test_a_kernel_that_does_not_compile_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tvm")

    def broken(*_: object) -> None:
        raise SparsecError("ptxas: out of registers")

    monkeypatch.setattr(gpu, "compile_one", broken)
    monkeypatch.setattr(gpu, "ProcessPoolExecutor", Inline)
    gpu.prepare(tmp_path, "sm_90a", [SMALL], checks=())
    index = json.loads((tmp_path / "index.json").read_text())
    assert str(SMALL) in index["points"]
    with pytest.raises(SparsecError, match="out of registers"):
        gpu.load_variant(tmp_path, next(iter(index["variants"].values())))


def test_a_full_folder_leaves_out_the_last_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tvm")
    made = iter(range(1000))
    monkeypatch.setattr(gpu, "compile_one", lambda problem, *_: variant(problem, f"k{next(made)}"))
    monkeypatch.setattr(gpu, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(gpu, "EACH", 1)
    monkeypatch.setattr(gpu, "FOLDER_BYTES", 0)
    gpu.prepare(tmp_path, "sm_90a", [SMALL], checks=())
    assert json.loads((tmp_path / "index.json").read_text())["points"] == {}


class Inline:
    """An executor that runs a job when its result is asked for, in this process."""

    def __init__(self, **_: object) -> None:
        pass

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        class Job:
            def result(self) -> Any:
                return function(*arguments)

        return Job()

    def shutdown(self, cancel_futures: bool) -> None:
        pass


# ---- The working process, on a fake GPU ----


def messages_of(folder: Path, keys: list[str], given_up: dict[str, str]) -> list[tuple[str, Any]]:
    said: list[tuple[str, Any]] = []
    gpu.work(folder, keys, given_up, lambda what, value: said.append((what, value)))
    return said


@needs_compiler
def test_a_point_is_measured(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The right kernel is timed, the wrong ones and all that needs PyTorch are recorded with their sentence."""
    monkeypatch.setattr(gpu, "points", lambda: [SMALL])
    monkeypatch.setitem(sys.modules, "torch", None)
    compute = numpy_kernel(SMALL.problem)
    fake.on_launch(lambda entry, *rest: compute(entry, *rest) if entry == b"right" else None)
    write_folder(tmp_path, {str(SMALL): ["wrong", "right", "hangs"]}, SMALL.problem)
    given_up = {f"{SMALL}, schedule hangs": "no sign of life for 90 s"}
    said = messages_of(tmp_path, [str(SMALL)], given_up)
    assert [what for what, _ in said if what != "try"] == ["ceilings", "point"]
    record = dict(said)["point"]
    assert record["schedule"] == "schedule right" and list(record["candidates_us"]) == ["schedule right"]
    assert record["sides"]["sparse"]["us"] == pytest.approx(2, abs=0.1)
    assert record["sides"]["sparse"]["ratio"] == [1, 1, 1]
    assert "is wrong for 5 rows" in record["errors"]["schedule wrong"]
    assert record["errors"]["schedule hangs"] == "no sign of life for 90 s"
    others = {side: error for side, error in record["errors"].items() if not side.startswith("schedule")}
    assert set(others.values()) == {"PyTorch is not installed: python -m pip install torch"}
    assert {"dense float16", "dense float16, cuBLASLt", "dense float8", "PyTorch BSR", "cuSPARSE CSR", "2:4"} <= set(
        others
    )
    # 96 blocks of 32x1, an index each; 3 block rows; then X and Y.
    assert record["bytes"] == 96 * 32 * 2 + 96 * 4 + 4 * 4 + 3 * 4 + (96 + 64) * 5 * 2
    assert record["operations"] == 2 * 96 * 32 * 5
    ceilings = dict(said)["ceilings"]
    assert ceilings["copy_bytes_per_second"] == pytest.approx(2 * 2**30 / 2e-6, rel=0.01)
    line = gpu.line({**record, **gpu.shares(record, ceilings)})
    assert line.startswith(str(SMALL)) and "of copy" in line and line.endswith("schedule right")


@needs_compiler
def test_checks_say_what_is_right(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, rows = gpu.CHECKS[0]
    key = gpu.check_key(problem, rows)
    write_folder(tmp_path, {}, problem)
    index = json.loads((tmp_path / "index.json").read_text())
    made = variant(problem)
    (tmp_path / "right.gz").write_bytes(gzip.compress(made.image))
    index["variants"]["right"] = {k: v for k, v in asdict(made).items() if k != "image"}
    index["checks"][key] = [("good", "right"), ("bad", "none")]
    index["variants"]["none"] = {"error": "it does not compile"}
    (tmp_path / "index.json").write_text(json.dumps(index))
    fake.on_launch(numpy_kernel(problem))
    record = dict(messages_of(tmp_path, [key], {}))["check"]
    assert record == {"check": key, "right": ["good"], "errors": {"bad": "it does not compile"}}
    assert gpu.check_line(record) == f"check {key}: 1 right; bad: it does not compile"


@needs_compiler
def test_a_kernel_that_takes_cuda_down_is_told_from_a_wrong_one(fake: Fake, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(gpu, "points", lambda: [SMALL])
    write_folder(tmp_path, {str(SMALL): ["bad"]}, SMALL.problem)
    fake.on_launch(lambda *_: fake.fail("cuStreamSynchronize", 700))
    with pytest.raises(gpu.LostError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        messages_of(tmp_path, [str(SMALL)], {})


# ---- The process around it ----


def started(script: Callable[..., None], todo: list[str], given_up: dict[str, str], pipe: Any) -> Any:
    process = multiprocessing.get_context("fork").Process(target=script, args=(todo, given_up, pipe))
    process.start()
    return process


def worker(todo: list[str], given_up: dict[str, str], pipe: Any) -> None:
    """Does points; one has a side that kills, one a side that hangs, one dies by itself, one loses CUDA."""
    pipe.send(("try", gpu.CEILINGS))
    pipe.send(("ceilings", {}))
    for key in todo:
        pipe.send(("try", key))
        for side, fate in (("kills", lambda: os._exit(7)), ("hangs", lambda: time.sleep(60))):
            label = f"{key}, {side}"
            if key == side and label not in given_up:
                pipe.send(("try", label))
                fate()
        if key == "dies":
            os._exit(9)
        if key == "loses" and "loses, side" not in given_up:
            pipe.send(("try", "loses, side"))
            pipe.send(("lost", "CUDA_ERROR_ILLEGAL_ADDRESS"))
            return
        pipe.send(("point", {"point": key, "without": sorted(given_up)}))


def test_crashes_and_hangs_cost_one_side_or_one_point() -> None:
    keys = ["a", "kills", "b", "hangs", "dies", "loses", "c"]
    said = list(gpu.supervise(partial(started, worker), keys, time.monotonic() + 60, silence=2.0))
    assert [value["point"] for what, value in said if what == "point"] == ["a", "kills", "b", "hangs", "loses", "c"]
    assert [tuple(value.values()) for what, value in said if what == "failure"] == [
        ("kills, kills", "the process ended with code 7"),
        ("hangs, hangs", "no sign of life for 2 s"),
        ("dies", "the process ended with code 9"),
        ("loses, side", "CUDA_ERROR_ILLEGAL_ADDRESS"),
    ]
    assert said[-1] == ("left", [])
    assert multiprocessing.active_children() == []


def slow_worker(todo: list[str], given_up: dict[str, str], pipe: Any) -> None:
    pipe.send(("ceilings", {}))
    for key in todo:
        time.sleep(0.4)
        pipe.send(("point", {"point": key}))


def test_nothing_is_begun_that_would_end_late() -> None:
    begun = time.monotonic()
    said = list(gpu.supervise(partial(started, slow_worker), list("abcdefgh"), begun + 1.5))
    done = [value["point"] for what, value in said if what == "point"]
    assert 1 <= len(done) <= 3 and time.monotonic() - begun < 2.5
    assert said[-1] == ("left", list("abcdefgh")[len(done) :])


def failing_worker(todo: list[str], given_up: dict[str, str], pipe: Any) -> None:
    pipe.send(("lost", "this machine has no NVIDIA driver"))


def test_a_process_that_cannot_start_is_not_started_again() -> None:
    with pytest.raises(SparsecError, match="could not start: this machine has no NVIDIA driver"):
        list(gpu.supervise(partial(started, failing_worker), ["a"], time.monotonic() + 60))


def test_results_are_merged(tmp_path: Path) -> None:
    path = tmp_path / "results" / "gpu.json"
    first = {"gpu": "G", "date": "monday", "part": "1/2"}
    gpu.merge(path, first, {"point": "a", "us": 1})
    gpu.merge(path, first, {"point": "b", "us": 2})
    gpu.merge(path, {**first, "part": "2/2"}, {"point": "b", "us": 3})
    gpu.merge(path, {**first, "after": "warm"})
    assert json.loads(path.read_text()) == {
        "gpu": "G",
        "runs": [{**first, "part": "2/2"}, {**first, "after": "warm"}],
        "points": {"a": {"point": "a", "us": 1}, "b": {"point": "b", "us": 3}},
    }
    assert [other.name for other in path.parent.iterdir()] == ["gpu.json"]


# ---- The script ----


def script(*arguments: str, driver: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`benchmarks/gpu.py` where neither TVM nor PyTorch can be imported, with a driver or without."""
    code = (
        "import multiprocessing, runpy, sys\n"
        "for name in ('tvm', 'onnx', 'onnxruntime', 'torch'): sys.modules[name] = None\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    command = [sys.executable, "-c", code, str(ROOT / "benchmarks" / "gpu.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".typing"), "LD_LIBRARY_PATH": str(driver or "")}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_nothing_prepared_is_a_sentence(tmp_path: Path) -> None:
    done = script("run", str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ") and "gpu.py prepare" in done.stderr and "Traceback" not in done.stderr


POINT = gpu.Point("float16", 768, 3072, (128, 128), 0.9, 1)


@pytest.mark.skipif("nvidia-smi:" not in gpu.clocks(), reason="needs a machine without a GPU")
def test_no_driver_is_a_sentence(tmp_path: Path) -> None:
    write_folder(tmp_path, {str(POINT): ["wrong"]}, POINT.problem)
    done = script("run", str(tmp_path))
    assert done.returncode == 1
    assert "no NVIDIA driver" in done.stderr and "Traceback" not in done.stderr


@needs_compiler
def test_the_whole_run_on_a_fake_gpu(library: Path, tmp_path: Path) -> None:
    """Its launches compute nothing, so the kernel is wrong; that is recorded, and so is the lack of PyTorch."""
    write_folder(tmp_path, {str(POINT): ["wrong"]}, POINT.problem)
    results = tmp_path / "results.json"
    done = script("run", str(tmp_path), "--json", str(results), driver=library.parent)
    assert done.returncode == 0, done.stderr
    assert "Fake GPU, CUDA 13.2" in done.stdout and "no right kernel" in done.stdout and "all done" in done.stdout
    written = json.loads(results.read_text())
    (run,), (record,) = written["runs"], written["points"].values()
    assert run["gpu"] == "Fake GPU" and run["left"] == [] and run["before"] and run["after"]
    assert "is wrong" in record["errors"]["schedule wrong"]
    assert "PyTorch" in record["errors"]["dense float16"]

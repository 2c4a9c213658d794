"""The command line with the compiler behind it: a model goes in, and all that can be asked of the result is asked."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest

from sparsec.compiler import cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`sparse.onnx`, 90 % zeros in groups of 16, compiled to `kept`; and `dense.onnx`, pruned to `pruned`."""
    folder = tmp_path_factory.mktemp("cli")
    cache = pytest.MonkeyPatch()
    cache.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    for name, keep in (("sparse", 10), ("dense", 1)):
        mask = np.arange(64 * 1024).reshape(64, 1024).repeat(16, axis=0) % keep == 0
        weight = np.random.default_rng(0).standard_normal((1024, 1024)) * mask
        model = onnx.parser.parse_model(
            '<ir_version: 8, opset_import: ["" : 17]> g (float[N, 1024] x) => (float[N, 1024] y) '
            "{ [fc] h = MatMul (x, w)  y = Mul (h, x) }"
        )
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight.T.astype(np.float32, order="C"), "w"))
        onnx.save(model, folder / f"{name}.onnx")
    common = ["--tune", "off", "--no-survey", "--batch", "1,4", "-q"]
    assert cli.main([str(folder / "sparse.onnx"), "-o", str(folder / "kept"), *common]) == 0
    assert cli.main([str(folder / "dense.onnx"), "-o", str(folder / "pruned"), "--sparsity", "0.9", *common]) == 0
    yield folder
    cache.undo()


@pytest.fixture
def run(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "80")

    def run(words: str):
        code = cli.main(words.split())
        return code, *capsys.readouterr()

    return run


def test_bench(run):
    code, out, err = run("bench kept --against sparse.onnx --pairs 3")
    assert (code, err) == (0, "")
    assert "kept against sparse.onnx" in out
    assert "middle half" in out
    code, out, _ = run("bench kept --against sparse.onnx --pairs 3 --batch 2 --threads 1 --json -")
    document = json.loads(out)
    assert (document["threads"], [timing["batch"] for timing in document["timings"]]) == (1, [2])


def test_verify_what_changed_no_weight(run):
    code, out, err = run("verify kept --against sparse.onnx")
    assert (code, err) == (0, "")
    assert "random, seed 0, batch 1, 4" in out
    assert "Within the tolerance: no output differs by more than 0.0001 of its largest value." in " ".join(out.split())


def test_verify_says_that_pruning_makes_a_difference(run):
    code, out, err = run("verify pruned --against dense.onnx")
    words = " ".join(out.split())
    assert (code, err) == (3, "")
    assert "sparsec pruned 1 layer of this artifact, so a difference from the dense original is expected" in words
    assert "Against the dense model with the same pruned weights it was" in words
    document = json.loads(run("verify pruned --against dense.onnx --tolerance 9 --json -")[1])
    assert (document["pruned"], document["passed"]) == (["fc"], True)
    assert document["kernel_error"] < 1e-4


def test_verify_against_another_model(run):
    code, out, _ = run("verify kept --against dense.onnx")
    assert code == 3
    assert "is this the model that the artifact was made from?" in " ".join(out.split())


def test_verify_on_given_inputs(run, folder):
    np.savez(folder / "x.npz", x=np.ones((3, 1024), np.float32))
    code, out, _ = run("verify kept --against sparse.onnx --inputs x.npz")
    assert code == 0
    assert "inputs: x.npz, batch 3" in out
    np.savez(folder / "z.npz", z=np.ones((3, 1024), np.float32))
    code, _, err = run("verify kept --against sparse.onnx --inputs z.npz")
    assert code == 2
    assert "['z']" in err
    assert "['x']" in err


def test_models_with_other_inputs_are_refused(run, folder):
    model = onnx.load(folder / "sparse.onnx")
    model.graph.input[0].name = model.graph.node[0].input[0] = model.graph.node[1].input[1] = "z"
    onnx.save(model, folder / "other.onnx")
    code, _, err = run("bench kept --against other.onnx")
    assert code == 1
    assert "kept has the inputs x, other.onnx has z" in err


def test_a_damaged_report(run, folder):
    (folder / "kept" / "report.json").rename(folder / "report.json")
    code, _, err = run("bench kept --against sparse.onnx")
    (folder / "report.json").rename(folder / "kept" / "report.json")
    assert code == 1
    assert "the report is missing from the artifact" in err

"""The command line without the compiler: what is parsed, what goes to which stream, which exit code, in which words."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import onnx
import pytest

from sparsec.compiler import cli
from sparsec.compiler.artifact import MANIFEST
from sparsec.compiler.config import CompileConfig, Tune
from sparsec.compiler.report import Healing, Report, SurveyPoint, Verification
from sparsec.ir import Decision, SparsecError, Timing

PACKAGES = Path(__file__).resolve().parents[2] / ".typing"


def timing(batch=1, dense=104.0, sparse=12.6):
    return Timing(batch, batch, dense, sparse, dense / sparse, (0.9 * dense / sparse, 1.1 * dense / sparse))


SPARSE = Decision(
    layer="/encoder/layer.0/attention/self/query/MatMul",
    kind="linear",
    op_type="MatMul",
    shape=(4096, 1024),
    choice="sparse",
    reason="faster at every batch size",
    pattern="group:16",
    zeros_before=0.0,
    zeros_after=0.8,
    timings=(timing(), timing(16, 2250.0, 232.0)),
    pruned=True,
)
DENSE = Decision(
    layer="stem",
    kind="conv",
    op_type="Conv",
    shape=(96, 147),
    choice="dense",
    reason="a convolution; no sparse operator yet",
)
REPORT = Report(
    model="model.onnx",
    target="cpu:x86-64-v3",
    threads=2,
    batch=(1, 16),
    decisions=(SPARSE, DENSE),
    timings=(timing(1, 211.0, 21.3), timing(16, 4620.0, 500.0)),
    verification=Verification(3.3e-7, 2, "random, seed 0"),
    notes=("Accuracy was not measured.",),
    bytes_before=12_500_000,
    bytes_after=3_100_000,
    seconds=7.25,
)
SURVEY = (
    SurveyPoint(0.5, "group:16", 3, (1.05, 0.99)),
    SurveyPoint(0.8, "group:16", 4, (2.4, 1.9)),
    SurveyPoint(0.9, "group:16", 4, (4.1, 3.6)),
)


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run a command line in a folder of its own; its exit code and what it wrote to the two streams."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str, columns: int = 80):
        monkeypatch.setenv("COLUMNS", str(columns))
        code = cli.main(words)
        out, err = capsys.readouterr()
        assert "\x1b" not in out + err, "colours without a terminal"
        return code, out, err

    return run


@pytest.fixture
def driver(monkeypatch):
    """A driver that compiles nothing: `report` is what it finds or raises, `calls` what it was asked for."""
    stub = SimpleNamespace(report=REPORT, calls=[], saved=[], closed=0)

    def compile_model(model, config, progress):
        stub.calls.append((model, config))
        progress.start("tuning kernels", 2)
        progress.advance("first")
        if isinstance(stub.report, BaseException):
            raise stub.report

        def close():
            stub.closed += 1

        return SimpleNamespace(report=stub.report, save=lambda out, force: stub.saved.append((out, force)), close=close)

    module = ModuleType("sparsec.compiler.driver")
    module.compile = compile_model
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return stub


@pytest.fixture
def model(tmp_path):
    """A linear layer of 256x128, 90 % of it zero in groups of 16, and a tiny one."""
    lines = (
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N, 128] x) => (float[N, 10] y) '
        "{ [big] h = MatMul (x, w1)  r = Relu (h)  [last] y = MatMul (r, w2) }"
    )
    proto = onnx.parser.parse_model(lines)
    rng = np.random.default_rng(0)
    mask = np.arange(16 * 128).reshape(16, 128).repeat(16, axis=0) % 10 == 0
    weights = {"w1": (rng.standard_normal((256, 128)) * mask).T, "w2": rng.standard_normal((256, 10))}
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.ascontiguousarray(array, dtype=np.float32), name)
        for name, array in weights.items()
    )
    onnx.save(proto, tmp_path / "model.onnx")
    return "model.onnx"


# The command line


def test_a_model_is_compiled_by_default(run, driver):
    code, out, err = run("model.onnx", "-o", "out")
    assert (code, driver.saved, driver.closed) == (0, [("out", False)], 1)
    assert driver.calls == [(Path("model.onnx"), CompileConfig())]
    assert "1 of 2 layers sparse" in out
    assert err == "warning: Accuracy was not measured.\n"


def test_every_option_reaches_the_configuration(run, driver):
    words = "--sparsity 0.8 --sparsity a=b*=0.5 --pattern block:32X1 --target cpu:znver4 --batch 1,16 --batch 16,128 "
    words += "--dim sequence=64 --tune off --prune-all --seed 3 --threads 4 --inputs x.npz --no-survey --force"
    assert run(*words.split(), "m.onnx", "-o", "out")[0] == 0
    expected = CompileConfig(
        sparsity=0.8,
        layer_sparsity=(("a=b*", 0.5),),
        pattern="group:32",
        target="cpu:znver4",
        batch=(1, 16, 128),
        dims={"sequence": 64},
        tune=Tune.OFF,
        prune_all=True,
        seed=3,
        threads=4,
        inputs=Path("x.npz"),
        survey=False,
    )
    assert driver.calls == [(Path("m.onnx"), expected)]
    assert driver.saved == [("out", True)]


@pytest.mark.parametrize("words", [["./inspect"], ["compile", "inspect"], ["-q", "./inspect"]])
def test_a_model_may_be_named_like_a_command(run, driver, words):
    assert run(*words, "-o", "out")[0] == 0
    assert driver.calls[0][0] == Path("inspect")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("m.onnx", "Missing option '-o'"),
        ("m.onnx -o out --bogus", "No such option: --bogus"),
        ("benhc out", "'benhc' is neither a command nor a file. Did you mean 'sparsec bench'?"),
        ("bench out", "Missing option '--against'. Try 'sparsec bench --help'."),
        ("m.onnx -o out --sparsity 80", "--sparsity 80: expected a share of zeros from 0 to 1, such as 0.8"),
        ("m.onnx -o out --sparsity nan", "--sparsity nan: expected a share"),
        ("m.onnx -o out --sparsity =0.5", "--sparsity =0.5: expected a share"),
        ("m.onnx -o out --sparsity 0.8 --sparsity 0.5", "the whole model has a sparsity already, 0.8"),
        ("m.onnx -o out --pattern blok:3", "--pattern: 'blok:3' is not a pattern: expected block:RxC"),
        ("m.onnx -o out --pattern block:0x4", "both sizes must be at least 1"),
        ("m.onnx -o out --tune fast", "--tune fast: should be 'off', 'quick' or 'thorough'"),
        ("m.onnx -o out --threads -1", "--threads -1: should be greater than or equal to 0"),
        ("m.onnx -o out --batch 1,0", "--batch 0: expected a batch size"),
        ("m.onnx -o out --dim 128", "--dim 128: expected NAME=SIZE"),
        ("m.onnx -o out --json none/x.json", "--json none/x.json: there is no folder 'none'"),
    ],
)
def test_usage(run, driver, words, says):
    code, out, err = run(*words.split())
    assert (code, out, driver.calls) == (2, "", [])
    assert err.startswith("error: ")
    assert says in err
    assert err.count("\n") == 1


def test_no_words_at_all_show_the_help(run):
    code, out, err = run()
    assert (code, err) == (2, "")
    assert "sparsec MODEL -o OUT" in out


def test_help_and_version_succeed(run):
    assert run("--version")[:2] == (0, "sparsec 0.1.0\n")
    assert run("--help")[0] == 0
    assert "--sparsity" in run("compile", "--help")[1]


def test_help_names_every_form_and_nothing_that_a_command_does_not_have(run):
    whole, alone = (" ".join(run(name, "--help", columns=200)[1].split()) for name in ("compile", "sensitivity"))
    forms = ("block:RxC", "group:g", "unstructured", "nm:N:M")
    assert all(form in text for form in forms for text in (whole, alone))
    assert all(form in whole for form in ("structured: no zeros", "FILE.py:FUNCTION or MODULE:FUNCTION"))
    others = ("--heal", "--max-drop", "--speedup", "--sparsity", "structured:")
    assert [word for word in others if word in alone] == []


def test_an_output_of_somebody_else_is_refused_before_any_work(run, driver, tmp_path):
    (tmp_path / "out").write_text("thesis")
    code, out, err = run("m.onnx", "-o", "out")
    assert (code, out, driver.calls) == (1, "", [])
    assert "not made by sparsec" in err


# Errors


@pytest.mark.parametrize(
    ("raised", "code", "says"),
    [
        (SparsecError("m.onnx: the file is empty"), 1, "error: m.onnx: the file is empty\n"),
        (KeyboardInterrupt(), 130, "interrupted: nothing was left half-written\n"),
        (OSError(28, "No space left on device", "/tmp/x"), 1, "error: '/tmp/x': No space left on device\n"),
        (MemoryError(), 1, "error: not enough memory\n"),
        (ModuleNotFoundError("No module named 'tvm'", name="tvm"), 1, "the Python package 'tvm' is not installed"),
        (ZeroDivisionError("by zero"), 1, "error: this is a bug of sparsec (ZeroDivisionError: by zero). Run"),
    ],
)
def test_failures_are_one_paragraph_on_standard_error(run, driver, raised, code, says):
    driver.report = raised
    found, out, err = run("m.onnx", "-o", "out")
    assert (found, out, driver.saved) == (code, "", [])
    assert says in err
    assert err.count("\n") == 1


def test_only_a_bug_has_a_traceback_and_only_if_asked_for(run, driver):
    driver.report = ZeroDivisionError("by zero")
    assert "Traceback" in run("m.onnx", "-o", "out", "-v")[2]
    driver.report = SparsecError("no")
    assert "Traceback" not in run("m.onnx", "-o", "out", "-v")[2]


def test_a_closed_pipe_is_silent(model, tmp_path):
    read, write = os.pipe()
    os.close(read)
    process = run_python(f"sys.exit(cli.main(['inspect', {model!r}]))", tmp_path, stdout=write)
    os.close(write)
    assert process.stderr == ""


def run_python(code: str, folder: Path, **streams):
    streams.setdefault("stdout", subprocess.PIPE)
    command = [sys.executable, "-c", f"import sys\nfrom sparsec.compiler import cli\n{code}"]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGES)}
    return subprocess.run(
        command, cwd=folder, env=environment, text=True, stderr=subprocess.PIPE, check=False, **streams
    )


def test_importing_the_command_line_imports_nothing_heavy(tmp_path):
    heavy = ["numpy", "onnx", "onnx_ir", "onnxruntime", "tvm"]
    assert run_python(f"print([name for name in {heavy} if name in sys.modules])", tmp_path).stdout == "[]\n"


# JSON and quiet


def test_json_on_standard_output_stands_alone(run, driver):
    driver.report = replace(REPORT, verification=Verification(math.inf, 2, "random, seed 0"))
    code, out, err = run("m.onnx", "-o", "out", "--json", "-")
    document = json.loads(out)
    assert code == 0
    assert document["decisions"][0]["timings"][1]["batch"] == 16
    assert document["verification"]["error"] is None  # JSON has no infinity
    assert "warning: " in err


def test_json_in_a_file_leaves_the_text(run, driver, tmp_path):
    code, out, _ = run("m.onnx", "-o", "out", "--json", "report.json")
    assert code == 0
    assert "layers sparse" in out
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(REPORT.to_json())


def test_quiet_leaves_warnings(run, driver):
    assert run("m.onnx", "-o", "out", "-q") == (0, "", "warning: Accuracy was not measured.\n")


# Tables


@pytest.mark.parametrize("columns", [80, 100, 140])
def test_the_result_fits_and_cuts_no_number(run, driver, columns):
    _, out, _ = run("m.onnx", "-o", "out", columns=columns)
    assert max(map(len, out.splitlines())) <= columns
    for word in ("4096x1024", "group:16", "0 % ->", "80 %", "104", "12.6", "8.25x", "2,250", "232", "9.70x"):
        assert word in out
    for word in ("0.211", "0.0213", "9.91x", "4.62", "8.92x to 10.9x", "12.5 MB -> 3.10 MB", "3.3e-07", "7.25 s"):
        assert word in out
    assert "a convolution; no sparse operator yet" in " ".join(out.split())


def test_the_result_says_how_to_load_it(run, driver):
    _, out, _ = run("m.onnx", "-o", "out/here")
    assert "options.register_custom_ops_library('out/here/libsparsec_ops.so')" in out


def test_a_training_that_went_on_from_another_says_so(run, driver):
    own = Healing(400, 132.0, 1078, 0.91, 0.97, True, "")
    for healing, words in (
        (own, "400 steps in 132 s on 1,078 samples"),
        (replace(own, resumed_steps=300, resumed_seconds=99.0), "samples (300 steps in 99.0 s by an earlier run)"),
    ):
        driver.report = replace(REPORT, healing=healing)
        out = " ".join(run("m.onnx", "-o", "out")[1].split())
        assert words in out and ("earlier" in out) == bool(healing.resumed_steps)


def test_the_zeros_of_all_pruned_layers_are_told_with_what_was_asked(run, driver):
    driver.report = replace(REPORT, asked=0.5, zeros=0.565)
    out = " ".join(run("m.onnx", "-o", "out")[1].split())
    assert "zeros 56.5 % of the weights of the layers that may be pruned; 50 % asked" in out
    driver.report = replace(driver.report, asked=None)
    assert "asked" not in run("m.onnx", "-o", "out")[1]


@pytest.mark.parametrize(("removed", "words"), [(0.38, "get smaller; 30 % asked"), (0.31, "get smaller")])
def test_more_left_out_than_was_asked_is_told(run, driver, removed, words):
    smaller = replace(SPARSE, choice="smaller", shape_after=(2048, 1024))
    driver.report = replace(REPORT, asked=0.3, removed=removed, decisions=(smaller, DENSE))
    out = " ".join(run("m.onnx", "-o", "out", columns=200)[1].split())
    assert words in out and ("asked" in out) == ("asked" in words) and "may be pruned" not in out


def test_names_are_data(run, driver):
    name = "[bold]a[/bold]:smile:\x1b[31m" + "层" * 3
    driver.report = replace(REPORT, decisions=(replace(DENSE, layer=name),))
    assert "[bold]a[/bold]:smile:\\x1b[31m" in run("m.onnx", "-o", "out", columns=200)[1]


def test_a_model_without_layers(run, driver):
    driver.report = replace(REPORT, decisions=(), timings=(), verification=None)
    _, out, _ = run("m.onnx", "-o", "out")
    words = " ".join(out.split())
    assert "no layer with a constant weight in its main graph" in words
    assert "the model could not be run here" in words


def test_many_layers_are_grouped_unless_verbose(run, driver):
    slow = replace(DENSE, reason="1.2x slower at batch 16")
    decisions = [
        replace(d, layer=f"layer.{i}/{n}/MatMul")
        for i in range(24)
        for n, d in (("q", SPARSE), ("k", SPARSE), ("fc1", slow))
    ]
    decisions[-1] = replace(decisions[-1], reason="1.4x slower at batch 16")
    driver.report = replace(REPORT, decisions=tuple(decisions))
    _, out, _ = run("m.onnx", "-o", "out")
    assert out.count("layer.*/") == 3
    assert "24 x MatMul 4096x1024 group:16" in out
    assert "1.2x slower at batch 16 (one of them)" in " ".join(out.split())
    _, out, _ = run("m.onnx", "-o", "out", "-v")
    assert "layer.*" not in out
    assert "layer.23/fc1/MatMul" in out


def test_verbose_tells_the_stages(run, driver):
    _, _, err = run("m.onnx", "-o", "out", "-v")
    assert "reading the model" in err
    assert "tuning kernels" in err


# Survey


def survey_of(run, driver, survey, *words):
    driver.report = replace(REPORT, survey=survey, notes=())
    _, out, _ = run(*(words or ("m.onnx", "-o", "out")))
    return out


def test_a_survey_says_which_option_goes_on(run, driver):
    out = survey_of(run, driver, SURVEY, "my model.onnx", "-o", "out", "--batch", "1,16")
    assert "sparsec 'my model.onnx' -o out --batch 1,16 --sparsity 0.8" in out
    assert "From 80 % zeros on the model is 1.90x as fast" in out
    assert "Accuracy was not measured." in out
    assert "1.05x     0.99x" in out


def test_a_survey_in_which_nothing_helps_suggests_nothing(run, driver):
    out = survey_of(run, driver, SURVEY[:1])
    assert "At none of these would pruning make this model faster" in out
    assert "--sparsity" not in out


def test_a_survey_of_small_gains_suggests_the_best(run, driver):
    out = survey_of(run, driver, (*SURVEY[:1], SurveyPoint(0.7, "group:16", 1, (1.1, 1.08))))
    assert "At best the model is 1.08x as fast" in out
    assert "--sparsity 0.7" in out


# The other commands


def test_inspect(run, model):
    code, out, err = run("inspect", model)
    words = " ".join(out.split())
    assert (code, err) == (0, "")
    for says in ("x float32 [N, 128]", "opset ai.onnx 17; IR version 8", "256x128", "90 %", "group:16"):
        assert says in words
    assert "the model's last layer; --sparsity 'last=0.8' prunes it" in words
    assert "2 layers: 1 to be compiled for the zeros they have, 0 after pruning (--sparsity), 1 left dense" in words


def test_inspect_as_json(run, model):
    document = json.loads(run("inspect", model, "--json", "-")[1])
    assert document["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["N", 128]}]
    assert [(layer["name"], layer["outlook"]) for layer in document["layers"]] == [
        ("big", "zeros"),
        ("last", "stays dense"),
    ]
    assert document["parameters"] == 256 * 138


def test_inspect_of_no_model(run):
    code, out, err = run("inspect", "none.onnx")
    assert (code, out) == (1, "")
    assert err == "error: none.onnx: there is no such file. Check the path.\n"


@pytest.mark.parametrize("command", ["bench", "verify"])
def test_the_artifact_must_be_one(run, model, command, tmp_path):
    code, out, err = run(command, ".", "--against", model)
    assert (code, out) == (1, "")
    assert "not a folder that sparsec made" in err
    assert MANIFEST in err


def test_doctor_finds_everything_it_looks_for(run):
    _, out, _ = run("doctor")
    for name in (
        "sparsec",
        "Python",
        "apache-tvm",
        "onnx",
        "ONNX Runtime",
        "processor",
        "cores",
        "C compiler",
        "tuning database",
    ):
        assert f"  {name}" in out


def test_doctor_says_what_is_missing(run, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    code, out, err = run("doctor")
    assert code == 1
    assert "missing" in out
    assert "error: C compiler: the environment variable CC names 'no-such-compiler'" in err


def test_doctor_knows_that_two_runtimes_break_each_other(run, monkeypatch):
    from sparsec.compiler import doctor

    monkeypatch.setattr(doctor, "_version", lambda package: "1.31.1")
    code, _, err = run("doctor")
    assert code == 1
    assert "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files" in err
    assert json.loads(run("doctor", "--json", "-")[1])["ok"] is False

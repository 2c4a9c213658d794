"""Whatever a file holds, the user reads one paragraph: the file, the place, what to do. Never a traceback."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.compiler.exporter import export
from sparsec.compiler.frontend import load, read
from sparsec.ir import SparsecError


def small(body: str = "h = MatMul(x, W) y = Relu(h)", opset: int = 17, ir: int = 8) -> onnx.ModelProto:
    text = f'<ir_version: {ir}, opset_import: ["": {opset}]> g (float[2,64] x) => (float[a,b] y) {{ {body} }}'
    model = onnx.parser.parse_model(text)
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "W"))
    return model


def with_external_data(folder: Path, **changes: str) -> Path:
    """A model in `folder` whose weight lies in w.bin, with entries of its external data changed."""
    model = small()
    tensor = model.graph.initializer[0]
    (folder / "w.bin").write_bytes(tensor.raw_data)
    entries = {"location": "w.bin", "offset": "0", "length": str(len(tensor.raw_data))} | changes
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in entries.items():
        if value:
            tensor.external_data.add(key=key, value=value)
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def words(source: str | Path | bytes | onnx.ModelProto) -> str:
    """What the user reads; one paragraph that begins with the file."""
    with pytest.raises(SparsecError) as caught:
        read(source)
    message = str(caught.value)
    assert "\n" not in message
    assert not isinstance(source, (str, Path)) or message.startswith(str(source).replace("\0", "\\x00"))
    assert message.endswith((".", ").")), message
    return message


def test_paths(tmp_path: Path) -> None:
    assert "there is no such file. Check the path." in words(tmp_path / "missing.onnx")
    assert "this is a folder, not an ONNX file; it holds no .onnx file" in words(tmp_path)
    (tmp_path / "a.onnx").touch()
    assert "it holds a.onnx" in words(str(tmp_path))
    assert "the file is empty" in words(tmp_path / "a.onnx")
    assert "cannot be read" in words("a\0b")
    assert "cannot be read" in words("a" * 5000)


def archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", b"weights")
    return buffer.getvalue()


OTHER_FORMATS = {
    "zip": (archive(), "a PyTorch file (.pt, .pth) must be exported by torch.onnx.export"),
    "pickle": (pickle.dumps({"weights": [1.0] * 50}, protocol=2), "this is a Python pickle, not ONNX"),
    "text": (b"graph(x):\n  return x\n", "this is a text file, not ONNX"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n", "Run 'git lfs pull'"),
    "web page": (b"<!DOCTYPE html><html>Not found</html>", "this is a web page, not ONNX; the download went wrong"),
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(40), "this file is compressed. Unpack it first."),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(40), "this is an HDF5 file"),
    "safetensors": (b"\x40\0\0\0\0\0\0\0" + b'{"w":{}}' + b" " * 60, "this is a safetensors file"),
    "tflite": (b"\x1c\0\0\0TFL3" + bytes(40), "this is a TensorFlow Lite file"),
    "ort": (b"\x1c\0\0\0ORTM" + bytes(40), "this is an ONNX Runtime (.ort) file"),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(40), "this is a GGUF file"),
    "noise": (b"\xff\xfe\xfd" * 50, "this is not an ONNX model, or one that was cut off or damaged"),
    "zeros": (bytes(100), "this is not an ONNX model"),
}


@pytest.mark.parametrize("kind", OTHER_FORMATS)
def test_files_of_other_formats(kind: str, tmp_path: Path) -> None:
    data, expected = OTHER_FORMATS[kind]
    (tmp_path / "m.onnx").write_bytes(data)
    assert expected in words(tmp_path / "m.onnx")
    assert expected in words(data)


def test_a_file_that_was_cut_off(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(small().SerializeToString()[:-1000])
    assert "cut off or damaged: its 15," in words(tmp_path / "m.onnx")


def test_versions() -> None:
    assert "IR version 99 is newer than onnxruntime" in words(small(ir=99))
    assert "which is at most" in words(small(ir=99))
    assert "IR version 2 is unknown: expected 3 or newer" in words(small(ir=2))
    assert "opset 99 of domain ai.onnx is newer than onnxruntime" in words(small(opset=99))
    model = small()
    del model.opset_import[:]
    assert "names no opset for the domain ai.onnx" in words(model)
    model = small()
    model.opset_import.add(domain="ai.onnx.ml", version=99)
    assert "opset 99 of domain ai.onnx.ml is newer" in words(model)
    model = small()
    model.opset_import.add(domain="nobody.uses.this", version=99)
    read(model)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"location": "missing.bin"}, "'missing.bin' is missing from"),
        ({"location": "../w.bin"}, "'../w.bin' leads out of the model's folder"),
        ({"location": "/etc/hostname"}, "'/etc/hostname' leads out of the model's folder"),
        ({"location": "link.bin"}, "'link.bin' leads out of the model's folder"),
        ({"location": "loop.bin"}, "'loop.bin' cannot be read"),
        ({"location": ""}, "'' names no file"),
        ({"offset": "16"}, "bytes 16 to 16,400 are expected, the file has only 16,384"),
        ({"offset": "-4"}, "External data offset must be non-negative, got -4 for tensor 'W'"),
        ({"length": "100"}, "100 bytes are named, but shape [64,64] of FLOAT needs 16,384"),
        ({"offset": "many"}, "the model is not valid ONNX"),
    ],
)
def test_external_data(changes: dict[str, str], expected: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "w.bin").write_bytes(bytes(16384))
    (folder / "link.bin").symlink_to(tmp_path / "w.bin")
    (folder / "loop.bin").symlink_to(folder / "loop.bin")
    assert expected in words(with_external_data(folder, **changes))


def test_external_data_through_harmless_links(tmp_path: Path) -> None:
    """A cache of blobs that model and data are links into, and a hard link: ONNX Runtime reads both."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    model = with_external_data(blobs)
    (snapshot / "m.onnx").symlink_to(model.rename(blobs / "1234"))
    (snapshot / "w.bin").symlink_to((blobs / "w.bin").rename(blobs / "5678"))
    assert read(snapshot / "m.onnx").layers[0].weight.any()
    os.link(blobs / "5678", tmp_path / "again.bin")
    assert read(snapshot / "m.onnx").layers[0].weight.any()


def test_external_data_needs_a_path(tmp_path: Path) -> None:
    data = with_external_data(tmp_path).read_bytes()
    assert "a model without a path has no folder to look in. Give the path" in words(data)
    assert "a model without a path" in words(onnx.ModelProto.FromString(data))


def test_graphs_that_cannot_run() -> None:
    cycle = words(small("a = Add(x, c) b = Neg(a) c = Relu(b) y = Neg(c)"))
    assert "the graph has a cycle" in cycle
    assert all(f"output '{name}'" in cycle for name in "abc")
    assert "the Add node of output 'y' reads 'nobody', which nothing provides" in words(small("y = Add(x, nobody)"))
    assert "nothing in graph 'g' provides its output 'y'" in words(small("h = MatMul(x, W)"))
    assert "Output 'y' is redeclared" in words(small("y = Neg(x) y = Relu(x)"))


def test_a_cycle_through_a_subgraph() -> None:
    body = """
        f = Cast<to = 9>(y)
        y = If(f) < then_branch = t () => (float[m,n] p) { p = Neg(x) },
                    else_branch = e () => (float[m,n] q) { q = Neg(y) } >"""
    assert "the graph has a cycle" in words(small(body))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers(value: float) -> None:
    model = small('["encoder"] y = MatMul(x, W)')
    weight = onnx.numpy_helper.to_array(model.graph.initializer[0]).copy()
    weight[3, 5] = weight[7, 7] = value
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "W"))
    message = words(model)
    assert f"layer 'encoder': its weight, initialiser 'W', holds {value} at [3, 5] (2 such in all)" in message


def test_a_tensor_whose_bytes_do_not_fill_it() -> None:
    model = small()
    model.graph.initializer[0].raw_data = b"1234"
    assert "tensor 'W' of shape [64, 64] cannot be read" in words(model)


def test_an_attribute_of_the_wrong_type() -> None:
    assert "attribute 'alpha' is int, expected float" in words(small("y = Gemm<alpha = 1>(x, W)"))


def test_what_would_be_lost_is_refused() -> None:
    model = small()
    sparse = model.graph.sparse_initializer.add()
    sparse.values.name = "S"
    assert "the sparse initialiser 'S' cannot be carried through" in words(model)
    model = small()
    model.training_info.add()
    assert "training information" in words(model)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_damage_is_a_sentence_or_a_model(data: st.DataObject) -> None:
    """Truncations and changed bytes: a model that can be written out again, or a SparsecError, nothing else."""
    whole = DAMAGED[data.draw(st.sampled_from(sorted(DAMAGED)))]
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)) | st.just(len(whole)))])
    for _ in range(data.draw(st.integers(0, 4))):
        if damaged:
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    survive(bytes(damaged))


def survive(source: bytes) -> bool:
    """Whether `source` is a model; anything but a SparsecError is raised."""
    try:
        program = read(source)
    except SparsecError as error:
        message = str(error)
    else:
        onnx_ir.to_proto(export(program, {})).SerializeToString()
        return True
    assert "\n" not in message
    return False


def tiny(body: str, more: str = "", inputs: str = "float[2,2] x") -> bytes:
    text = f'<ir_version: 8, opset_import: ["": 17, "l": 1]> g ({inputs}) => (float[a,b] y) {{ {body} }} {more}'
    model = onnx.parser.parse_model(text)
    for name in ("W", "b"):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((2, 2), np.float32), name))
    return bytes(model.SerializeToString())


DAMAGED = {
    "layers": tiny("h = Gemm<alpha = 0.5, transB = 1>(x, W, b) c = MatMul(h, W) r = Relu(c) y = Add(r, h)"),
    "constants": tiny(
        "t = Transpose<perm = [1, 0]>(W) s = Constant<value_ints = [2, 2]>() u = Reshape(t, s)"
        " m = Mul(u, b) y = MatMul(x, m)"
    ),
    "subgraph": tiny(
        "h = MatMul(W, x) y = If(f) < then_branch = t () => (float[m,n] p) { p = Add(h, x) },"
        " else_branch = e () => (float[m,n] q) { q = Neg(h) } >",
        inputs="float[2,2] x, bool f",
    ),
    "function": tiny(
        "h = l.twice(x) y = MatMul(h, W)", '<domain: "l", opset_import: ["": 17]> twice (v) => (w) { w = Add(v, v) }'
    ),
    "convolution": tiny(
        "s = Constant<value_ints = [1, 1, 2, 2]>() q = Reshape(x, s) w = Reshape(W, s)"
        " c = ConvTranspose<group = 1, strides = [1, 1]>(q, w) d = Conv<group = 1>(c, w)"
        " z = Constant<value_ints = [2, 2]>() e = Reshape(W, z) y = MatMul(e, x)"
    ),
}


def test_loading_prints_nothing(tmp_path: Path) -> None:
    """onnx_ir logs what is wrong with a model; the user reads it once, in the error."""
    path = tmp_path / "m.onnx"
    path.write_bytes(small("y = Add(x, nobody)").SerializeToString())
    code = (
        "import sys; from sparsec.compiler.frontend import load; from sparsec.ir import SparsecError\n"
        "try: load(sys.argv[1])\n"
        "except SparsecError: print('refused')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, check=True, env=ENVIRONMENT
    )
    assert (done.stdout, done.stderr) == ("refused\n", "")


ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def test_loading_alone_does_not_read_weights(tmp_path: Path) -> None:
    """`load` checks ranges, not values: NaN is found where a layer's weight is read."""
    model, path = load(with_external_data(tmp_path))
    tensor = model.graph.initializers["W"].const_value
    assert isinstance(tensor, onnx_ir.ExternalTensor)
    assert tensor.raw is None
    assert path == tmp_path / "m.onnx"

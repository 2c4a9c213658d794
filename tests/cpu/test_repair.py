"""Layers fitted once more to what the pruned model gives them; and data that no layer can be fitted to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

import sparsec
from sparsec.compiler.calibration import Trial, Weights, gather, repair
from sparsec.compiler.calibration.samples import Samples
from sparsec.compiler.config import Tune
from sparsec.compiler.exporter import bias_place
from sparsec.compiler.frontend import read
from sparsec.compiler.machine import Cpu
from sparsec.ir import SparsecError
from sparsec.ir.values import Int8

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from sparsec.ir import Program

    Floats = NDArray[np.float32]

CPU = Cpu(1)


def parse(head: str, body: str, **tensors: NDArray[Any]) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g ({head}) {{ {body} }}')
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(array.astype(np.float32), name) for name, array in tensors.items()
    )
    return model


def perceptron(rng: np.random.Generator) -> onnx.ModelProto:
    """Three layers, the second without a place for a bias."""
    return parse(
        "float[n,24] x) => (float[n,8] y",
        """["a"] h = Gemm<transB = 1>(x, A, a)  r = Relu(h)
        ["b"] k = MatMul(r, B)  s = Relu(k)  ["c"] y = Gemm(s, C, c)""",
        A=rng.standard_normal((48, 24)) / 24**0.5,
        a=rng.standard_normal(48) * 0.1,
        B=rng.standard_normal((48, 48)) / 24**0.5,
        C=rng.standard_normal((48, 8)) / 24**0.5,
        c=rng.standard_normal(8),
    )


def convolutional(rng: np.random.Generator) -> onnx.ModelProto:
    """A convolution, one in groups, a depthwise one, none with a bias of its own, and a product."""
    return parse(
        "float[n,3,8,8] x) => (float[n,6] y",
        """["a"] h = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x, A)  r = Relu(h)
        ["b"] k = Conv<kernel_shape = [3, 3], group = 2, strides = [2, 2]>(r, B)  s = Relu(k)
        ["c"] l = Conv<kernel_shape = [2, 2], group = 16>(s, C)  t = Relu(l)
        f = Flatten(t)  ["d"] y = Gemm(f, D, d)""",
        A=rng.standard_normal((16, 3, 3, 3)) / 27**0.5,
        B=rng.standard_normal((16, 8, 3, 3)) / 36**0.5,
        C=rng.standard_normal((16, 1, 2, 2)) / 2,
        D=rng.standard_normal((64, 6)) / 8,
        d=rng.standard_normal(6),
    )


@dataclass(frozen=True)
class Network:
    """A model, pruned by magnitude, with data to fit it to and data to judge it by."""

    program: Program
    pruned: dict[str, Weights]
    seen: Samples
    unseen: Samples
    folder: Path

    @classmethod
    def of(cls, model: onnx.ModelProto, shape: tuple[int, ...], folder: Path, sparsity: float = 0.6) -> Network:
        program = read(model)
        rng = np.random.default_rng(1)
        mixing = rng.standard_normal((shape[-1], shape[-1])) * np.linspace(0.1, 1, shape[-1])
        runs = [{"x": (rng.standard_normal((32, *shape)) @ mixing).astype(np.float32)} for _ in range(12)]
        pruned = {layer.name: Weights(by_magnitude(layer.weight, sparsity)) for layer in program.layers}
        return cls(program, pruned, Samples("data", runs[:8]), Samples("data", runs[8:]), folder)

    def repair(self, **options: Any) -> dict[str, Weights]:
        return repair(self.program, self.pruned, self.seen, CPU, self.folder, 1, **options)

    def outputs(self, weights: dict[str, Weights], samples: Samples) -> NDArray[np.float64]:
        trial = Trial(self.program, self.program.layers, CPU, self.folder, watched=False)
        fed = trial.feeds(weights)
        return np.concatenate([trial.run(feeds, fed)["y"] for feeds in samples.runs]).astype(np.float64)

    def error(self, weights: dict[str, Weights], samples: Samples | None = None) -> float:
        """Relative squared error of the outputs, on unseen data."""
        samples = samples or self.unseen
        expected = self.outputs({}, samples)
        return float(np.square(self.outputs(weights, samples) - expected).sum() / np.square(expected).sum())


def by_magnitude(weight: Floats, sparsity: float) -> Floats:
    return np.where(np.abs(weight) > np.quantile(np.abs(weight), sparsity), weight, np.float32(0))


@pytest.fixture(params=["perceptron", "convolutional"])
def network(request: pytest.FixtureRequest, tmp_path: Path) -> Network:
    rng = np.random.default_rng(0)
    if request.param == "perceptron":
        return Network.of(perceptron(rng), (24,), tmp_path)
    return Network.of(convolutional(rng), (3, 8, 8), tmp_path)


def test_the_outputs_come_closer_on_unseen_data(network: Network) -> None:
    assert network.error(network.repair()) < 0.5 * network.error(network.pruned)


def test_zeros_stay_zeros(network: Network) -> None:
    fitted = network.repair()
    assert list(fitted) == list(network.pruned)
    for layer in network.program.layers:
        before, after = network.pruned[layer.name].matrix, fitted[layer.name].matrix
        assert after.dtype == np.float32 and after.shape == before.shape
        assert not after[before == 0].any()
        assert (after != before).any()
        # The pruned weights that were given are as they were.
        assert np.array_equal(before, by_magnitude(layer.weight, 0.6))


def test_biases_where_there_is_a_place(network: Network) -> None:
    fitted = network.repair()
    for layer in network.program.layers:
        bias = fitted[layer.name].bias
        if bias_place(layer) is None:
            assert bias is None
        else:
            assert bias is not None and (bias.shape, bias.dtype) == ((layer.out_features,), np.float32)


def test_the_mean_of_the_outputs_is_the_dense_models(network: Network) -> None:
    """On the data that was fitted to; the last layer has a bias."""
    expected = network.outputs({}, network.seen).mean(0)
    before = np.abs(network.outputs(network.pruned, network.seen).mean(0) - expected).max()
    after = np.abs(network.outputs(network.repair(), network.seen).mean(0) - expected).max()
    assert before > 1e-2
    assert after < 1e-4


def test_little_memory_uses_fewer_runs(network: Network) -> None:
    """A byte is room for none; one run is used, which still is better than nothing."""
    one_run, all_runs = network.repair(most_bytes=1), network.repair()
    for name, before in network.pruned.items():
        assert not one_run[name].matrix[before.matrix == 0].any()
    assert network.error(all_runs) < network.error(one_run) < network.error(network.pruned)


def test_the_same_bytes_each_time(network: Network) -> None:
    first, second = network.repair(), network.repair()
    for name, weights in first.items():
        assert weights.matrix.tobytes() == second[name].matrix.tobytes()
        for bias, other in ((weights.bias, second[name].bias),):
            assert (bias is None and other is None) or (bias is not None and other is not None)
            assert bias is None or other is None or bias.tobytes() == other.tobytes()


def test_each_layer_is_told_once_in_order(network: Network) -> None:
    told: list[str] = []
    network.repair(done=told.append)
    assert told == list(network.pruned)


def test_layers_that_are_not_pruned_stay(tmp_path: Path) -> None:
    network = Network.of(perceptron(np.random.default_rng(0)), (24,), tmp_path)
    del network.pruned["a"], network.pruned["c"]
    fitted = network.repair()
    assert list(fitted) == ["b"]
    assert network.error(fitted) < network.error(network.pruned)


def test_what_is_not_pruned_at_all_stays_the_model(tmp_path: Path) -> None:
    """Weights without a zero are fitted to themselves."""
    network = Network.of(perceptron(np.random.default_rng(0)), (24,), tmp_path, sparsity=0)
    assert network.error(network.repair()) < 1e-6


def test_a_layer_of_zeros_has_the_mean_as_its_bias(tmp_path: Path) -> None:
    network = Network.of(perceptron(np.random.default_rng(0)), (24,), tmp_path)
    network.pruned["c"] = Weights(np.zeros_like(network.pruned["c"].matrix))
    fitted = network.repair()["c"]
    assert not fitted.matrix.any() and fitted.bias is not None
    expected = network.outputs({}, network.seen).mean(0)
    assert np.abs(fitted.bias - expected).max() < 1e-4 * np.abs(expected).max()


def test_inputs_that_are_always_zero(tmp_path: Path) -> None:
    """Units that never fire, in the dense model or only in the pruned one."""
    model = perceptron(np.random.default_rng(0))
    (bias,) = (tensor for tensor in model.graph.initializer if tensor.name == "a")
    array = onnx.numpy_helper.to_array(bias).copy()
    array[:5] = -1000
    bias.CopyFrom(onnx.numpy_helper.from_array(array, "a"))
    network = Network.of(model, (24,), tmp_path)
    network.pruned["b"].matrix[7] = 0
    fitted = network.repair()
    assert all(np.isfinite(one.matrix).all() for one in fitted.values())
    assert network.error(fitted) < 0.5 * network.error(network.pruned)


def test_a_single_sample(tmp_path: Path) -> None:
    network = Network.of(perceptron(np.random.default_rng(0)), (24,), tmp_path)
    one = Samples("data", [{"x": network.seen.runs[0]["x"][:1]}])
    fitted = repair(network.program, network.pruned, one, CPU, tmp_path, 1)
    assert all(np.isfinite(weights.matrix).all() for weights in fitted.values())
    assert network.error(fitted, one) < 1e-3


# ---- Data that nothing can be fitted to ----

OVERFLOW = {
    "product": parse(
        "float[n,8] x) => (float[n,4] y",
        '["first"] h = MatMul(x, A)  e = Exp(h)  ["second"] y = MatMul(e, B)',
        A=np.eye(8),
        B=np.ones((8, 4)),
    ),
    "convolution": parse(
        "float[n,2,4,4] x) => (float[n,3,3,3] y",
        '["first"] h = Conv<kernel_shape = [1, 1]>(x, A)  e = Exp(h)  ["second"] y = Conv<kernel_shape = [2, 2]>(e, B)',
        A=np.eye(2)[:, :, None, None],
        B=np.ones((3, 2, 2, 2)),
    ),
    "not a number": parse(
        "float[n,8] x) => (float[n,4] y",
        '["first"] h = MatMul(x, A)  e = Log(h)  ["second"] y = MatMul(e, B)',
        A=-np.eye(8),
        B=np.ones((8, 4)),
    ),
}


@pytest.mark.parametrize("name", OVERFLOW)
def test_activations_that_are_no_numbers_name_the_layer(name: str, tmp_path: Path) -> None:
    program = read(OVERFLOW[name])
    size = (2, 4, 4) if name == "convolution" else (8,)
    samples = Samples("data.npz", [{"x": np.full((1, *size), value, np.float32)} for value in (0.5, 100)])
    expected = "calibration data 'data.npz': the input of layer 'second' has NaN or infinite values; check the data"
    with pytest.raises(SparsecError, match=expected):
        gather(program, program.layers, samples, CPU, tmp_path, 1)
    # Of the layer before nothing is wrong.
    found = gather(program, program.layers[:1], samples, CPU, tmp_path, 1)
    assert found.samples == 2


def test_pruning_that_makes_a_model_overflow_names_the_layer(tmp_path: Path) -> None:
    """In one row a large input cancels another; without the other, the exponential is infinite."""
    model = parse(
        "float[n,8] x) => (float[n,4] y",
        '["first"] h = MatMul(x, A)  e = Exp(h)  ["second"] y = MatMul(e, B)',
        A=np.vstack([np.ones((1, 4)), np.zeros((6, 4)), -np.ones((1, 4))]),
        B=np.ones((4, 4)),
    )
    program = read(model)
    first, second = program.layers
    pruned = {first.name: Weights(np.maximum(first.weight, 0)), second.name: Weights(second.weight)}
    x = np.zeros((4000, 8), np.float32)
    x[:, 0] = np.random.default_rng(0).uniform(-20, 20, len(x))
    x[-1, [0, -1]] = 300
    with pytest.raises(SparsecError, match="the input of layer 'second' has NaN or infinite values"):
        repair(program, pruned, Samples("data.npz", [{"x": x}]), CPU, tmp_path, 1)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (np.zeros((4, 3, 8, 7)), r"input 'x' is \[4, 3, 8, 7\], the model expects \['n', 3, 8, 8\]"),
        (np.zeros((4, 8, 8, 3)), r"input 'x' is \[4, 8, 8, 3\]"),
        (np.zeros((3, 8, 8)), r"input 'x' is \[3, 8, 8\]"),
        (np.full((4, 3, 8, 8), np.inf), "input 'x' has NaN or infinite values"),
        (np.zeros((0, 3, 8, 8)), "is empty"),
    ],
)
def test_bad_data_for_convolutions(x: NDArray[Any], words: str, tmp_path: Path) -> None:
    model = convolutional(np.random.default_rng(0))
    config = sparsec.CompileConfig(
        layer_sparsity=(("*", 0.5),),
        pattern="unstructured",
        prune_all=True,
        calib=[{"x": x.astype(np.float32)}],
        tune=Tune.OFF,
        threads=1,
        cache=tmp_path,
    )
    with pytest.raises(SparsecError, match=words):
        sparsec.compile(model, config)


@pytest.mark.parametrize("heal", [None, "3"])
def test_a_dead_channel_before_a_depthwise_convolution(heal: str | None, tmp_path: Path) -> None:
    """Nothing can be fitted to it, which says nothing of the other channels."""
    if heal is not None:
        pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    model = convolutional(rng)
    kill(model, 3)
    config = sparsec.CompileConfig(
        layer_sparsity=(("c", 0.5),),
        pattern="unstructured",
        prune_all=True,
        permute=False,
        calib=[{"x": rng.standard_normal((8, 3, 8, 8)).astype(np.float32)} for _ in range(4)],
        heal=heal,
        tune=Tune.OFF,
        threads=1,
        cache=tmp_path,
    )
    compiled = sparsec.compile(model, config)
    compiled.save(tmp_path / "out")
    found = {
        one.name: onnx.numpy_helper.to_array(one) for one in onnx.load(tmp_path / "out/model.onnx").graph.initializer
    }
    zeros = (found["C"] == 0).sum(axis=(1, 2, 3))
    assert [*np.delete(zeros, 3)] == [2] * 15 and zeros[3] >= 2


def test_an_integer_layer_that_pruning_leaves_without_inputs(tmp_path: Path) -> None:
    network = Network.of(perceptron(np.random.default_rng(0)), (24,), tmp_path)
    network.pruned["b"] = Weights(np.zeros_like(network.pruned["b"].matrix))
    fitted = network.repair(kinds={"c": Int8()})
    assert np.isfinite(fitted["c"].matrix).all() and network.error(fitted) < 1.5


def test_a_layer_that_no_sample_reaches_is_named(tmp_path: Path) -> None:
    model = convolutional(np.random.default_rng(0))
    kill(model, slice(None))
    samples = Samples("data.npz", [{"x": np.ones((2, 3, 8, 8), np.float32)}])
    program = read(model)
    words = "calibration data 'data.npz': only zeros ever flowed into layer 'c', .* with --sparsity 'c=0'"
    with pytest.raises(SparsecError, match=words):
        gather(program, program.layers, samples, CPU, tmp_path, 1)


def kill(model: onnx.ModelProto, channels: int | slice) -> None:
    """Zeros in these outputs of layer b."""
    (tensor,) = (one for one in model.graph.initializer if one.name == "B")
    array = onnx.numpy_helper.to_array(tensor).copy()
    array[channels] = 0
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, "B"))

"""Channels left out: the smaller model computes what the masked one does, and what cannot go says why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir
import pytest
from graphs import Net, build, exactly, feeds_of, run, with_integers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_permute import FREE, LIGHT, SMALL, light

from sparsec.compiler.frontend import find_layers, read
from sparsec.compiler.frontend.constants import Constants
from sparsec.compiler.frontend.weights import from_matrix, weight_index
from sparsec.ir import Program, SparsecError
from sparsec.passes.channels import find_channels
from sparsec.passes.remove import layer_indices, mask_recurrence, mask_weights, removable, remove

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sparsec.passes.channels import Channels, Dimension

    Array = NDArray[Any]

ASSETS = Path(__file__).resolve().parents[2].parent / "shared" / "assets" / "models"
needs_assets = pytest.mark.skipif(not ASSETS.is_dir(), reason="the models of ../shared/assets are not on this machine")


def random_kept(dimensions: tuple[Dimension, ...], seed: int) -> dict[Dimension, Array]:
    """Some channels of every dimension, at least one."""
    rng = np.random.default_rng(seed)
    return {
        d: np.sort(rng.permutation(d.size)[: 1 + rng.integers(d.size)]) if d.size else np.arange(0) for d in dimensions
    }


def masked(program: Program, channels: Channels, kept: dict[Dimension, Array]) -> onnx_ir.Model:
    """The program's model with zeros in the weights that read what goes; of weights of any type."""
    model = mask_recurrence(program, channels, kept)
    program = Program(model, find_layers(model))
    model = model.clone()
    copies = dict(zip(program.model.graph, model.graph, strict=True))
    indices = layer_indices(program, channels, kept)
    for number, layer in enumerate(program.layers):
        if layer.name not in indices:
            continue
        index = weight_index(layer)
        array = Constants(program.model).array(layer.nodes[0].inputs[index])
        assert array is not None
        stays = np.zeros(layer.weight.shape, np.float32)
        stays[:, indices[layer.name][1]] = 1
        mask = from_matrix(layer.nodes[0], index, stays, array.shape, np.dtype(np.float32)) != 0
        value = onnx_ir.Value(name=f"masked{number}", const_value=onnx_ir.Tensor(np.where(mask, array, 0), name=""))
        model.graph.register_initializer(value)
        old = copies[layer.nodes[0]].inputs[index]
        copies[layer.nodes[0]].replace_input_with(index, value)
        if old is not None and not old.uses() and not old.is_graph_input():
            model.graph.initializers.pop(old.name or "", None)
    return model


def assert_same(
    program: Program, kept: dict[Dimension, Array], seed: int = 0, compute: Any = run, strict: bool = True, **sizes: int
) -> None:
    """Masked and smaller compute the same; the layers are the old ones cut down; the old model is untouched."""
    channels = find_channels(program)
    kept = {d: kept[d] for d in channels.dimensions.values() if d in kept}
    before = onnx_ir.to_proto(program.model).SerializeToString()
    model = remove(program, channels, kept)
    assert onnx_ir.to_proto(program.model).SerializeToString() == before
    if strict:
        onnx.shape_inference.infer_shapes(onnx_ir.to_proto(model), check_type=True, strict_mode=True, data_prop=True)
    feeds = feeds_of(program.model, seed, sizes)
    found, expected = compute(model, feeds), compute(masked(program, channels, kept), feeds)
    for one, other in zip(expected, found, strict=True):
        assert one.dtype == other.dtype
        close = 1e-9 if compute is exactly else 1e-5
        np.testing.assert_allclose(other, one, rtol=close, atol=close * float(np.abs(one).max(initial=0)))
    layers = {layer.name: layer for layer in find_layers(model)}
    indices = layer_indices(program, channels, kept)
    for layer in program.layers:
        rows, columns = indices.get(layer.name, (np.arange(layer.out_features), np.arange(layer.in_features)))
        np.testing.assert_array_equal(layers[layer.name].weight, layer.weight[rows][:, columns])
    masks = mask_weights(program, channels, kept)
    for name, weight in masks.items():
        assert not np.delete(weight, indices[name][1], axis=1).any()


def text(program: Program) -> list[str]:
    """Each dimension from which channels can go as "size: layers that make it / layers that read it"."""
    return [
        f"{d.size}: {' '.join(p.name for p in d.rows)} / {' '.join(p.name for p in d.columns)}"
        for d in removable(find_channels(program)).dimensions
    ]


@pytest.mark.parametrize("name", FREE)
def test_what_stays_computes_the_same(name: str) -> None:
    program = read(FREE[name][0])
    for seed in range(3):
        assert_same(program, random_kept(removable(find_channels(program)).dimensions, seed), seed, H=3, W=5)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(Net.operations()), st.integers(0, 30)), min_size=2, max_size=14),
    st.integers(0, 2**16),
)
def test_random_graphs_compute_the_same_without_some_channels(steps: list[tuple[str, int]], seed: int) -> None:
    net = Net(seed)
    net.grow("conv1", seed)
    for operation, pick in steps:
        net.grow(operation, pick)
    program = read(net.model())
    assert_same(program, random_kept(removable(find_channels(program)).dimensions, seed), seed, exactly)


@pytest.mark.parametrize("name", SMALL)
def test_builders(name: str) -> None:
    program = read(SMALL[name][0])
    found = removable(find_channels(program)).dimensions
    assert found
    assert_same(program, random_kept(found, 1), sequence=7)


@needs_assets
@pytest.mark.parametrize(
    ("file", "dimensions", "declined"),
    [
        ("magika_standard_v3_3", 1, 3),
        ("mnist_cnn_opset8", 2, 1),
        ("resnet20_cifar10", 14, 1),
        ("resnet20_cifar10_int8_qdq", 0, 20),
        ("squeezenet_dc_sparse", 25, 1),
        ("ultraface_version-RFB-320", 25, 8),
    ],
)
def test_real_models(file: str, dimensions: int, declined: int) -> None:
    program = read(ASSETS / f"{file}.onnx")
    found = removable(find_channels(program))
    assert (len(found.dimensions), len(found.declined)) == (dimensions, declined)
    assert_same(program, random_kept(found.dimensions, 2))


MLP = {"A": (6, 8), "B": (8, 3)}
HELD = {
    "softmax": (build("a = MatMul(x, A) s = Softmax<axis=-1>(a) y = MatMul(s, B)", **MLP), "Softmax 's' works across"),
    "mean": (
        build("a = MatMul(x, A) m = ReduceMean<axes=[-1]>(a) b = Sub(a, m) y = MatMul(b, B)", **MLP),
        "ReduceMean 'm' works across",
    ),
    "product of activations": (
        build(
            "a = MatMul(x, A) c = MatMul(x, C) t = Transpose(c) s = MatMul(a, t) y = MatMul(s, x)",
            A=(6, 8), C=(6, 8),
        ),
        "MatMul 's' works across",
    ),
    "its number": (
        build(
            "a = MatMul(x, A) s = Shape(a) n = Gather(s, one) f = Cast<to=1>(n) d = Div(a, f) y = MatMul(d, B)", **MLP
        ),
        "Shape 's' works across",
    ),
    "output": (build("y = MatMul(x, A)", A=(6, 8)), "those of the model's output 'y'"),
    "residual on the input": (
        build("a = MatMul(x, A) b = Add(a, x) y = MatMul(b, B)", A=(6, 6), B=(6, 3)), "those of the model's input 'x'"
    ),
    "unknown operator": (
        build("a = MatMul(x, A) c = other.Thing(a) y = MatMul(c, B)", **MLP), "what Thing 'c' does with them is not"
    ),
    "queries, keys and values of one product": (
        build(
            """a = MatMul(x, A) r = Reshape(a, taken) t = Transpose<perm=[1,0,2]>(r) q, k, v = Split(t, ones)
            p = Mul(q, k) s = Softmax<axis=-1>(p) c = Mul(s, v) h = Squeeze(c, zero) y = MatMul(h, B)""",
            A=(6, 24), B=(8, 3),
        ),
        "Split 'q' works across them",
    ),
    "first state of units": (
        build(
            """h0 = Gather<axis=2>(H, order) a, h = GRU<hidden_size=8>(x, W, R, , , h0) s = Squeeze(a, one)
            y = MatMul(s, B)""",
            x="4, 2, 6", y="S, N, C", W=(1, 24, 6), R=(1, 24, 8), H=(1, 2, 8), B=(8, 3),
        ),
        "Gather 'h0' works across them",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HELD)
def test_what_cannot_go_says_why(name: str) -> None:
    model, words = HELD[name]
    with_integers(model, zero=[0], one=[1], ones=[1, 1, 1], taken=[-1, 3, 8], order=[*range(8)])
    program = read(model)
    assert text(program) == []
    assert words in removable(find_channels(program)).declined[program.layers[0].name]


def test_the_number_of_a_batch_may_be_read() -> None:
    """PyTorch's exporter asks Shape for the batch; the channels have nothing to do with it."""
    body = """a = Conv(x, A) s = Shape(a) n = Gather(s, zero) t = Concat<axis=0>(n, rest)
        r = Reshape(a, t) y = MatMul(r, B)"""
    model = with_integers(build(body, x="N, 3, 2, 2", y="N, C", A=(8, 3, 1, 1), B=(32, 5)), zero=[0], rest=[32])
    program = read(model)
    assert text(program) == ["8: a / y"]
    assert_same(program, random_kept(removable(find_channels(program)).dimensions, 0))


STATES = {
    "filled": "h0 = ConstantOfShape<value=float[1] {0.5}>(joined)",
    "filled, all of it known": "h0 = ConstantOfShape(known)",
    "stretched": "h0 = Expand(H, joined)",
    "stretched in one axis": "h0 = Expand(H, short)",
    "stretched and cut": "e = Expand(H, three) h0 = Slice(e, zero, one, zero)",
    "filled by a number that is computed": "h0 = ConstantOfShape(computed)",
}
STATE = """sh = Shape(x) n0 = Gather(sh, first) n = Unsqueeze(n0, zero) joined = Concat<axis=0>(one, n, units)
    short = Concat<axis=0>(n, one) three = Concat<axis=0>(two, n, units)
    more = Add(units, zero) computed = Concat<axis=0>(one, n, more)"""


@pytest.mark.parametrize("name", STATES)
def test_first_states_that_are_made_on_the_way(name: str) -> None:
    """As PyTorch's exporter writes them: the number of units stands in a shape."""
    body = f"""{STATE} {STATES[name]} a, h, c = LSTM<hidden_size=8>(x, W, R, , , h0, h0) s = Squeeze(a, one)
        y = MatMul(s, B)"""
    one = 8 if name == "stretched in one axis" else 1
    model = build(body, x="4, 2, 6", y="S, N, C", W=(1, 32, 6), R=(1, 32, 8), H=(1, 1, one), B=(8, 3))
    with_integers(model, zero=[0], one=[1], two=[2], units=[8], known=[1, 2, 8])
    model.graph.initializer.append(onnx.helper.make_tensor("first", onnx.TensorProto.INT64, [], [1]))
    program = read(model)
    assert text(program) == ([] if "computed" in name else ["8: a a a a / y"])
    for seed in range(3):
        assert_same(program, random_kept(removable(find_channels(program)).dimensions, seed), seed)


def test_what_is_made_on_the_way_is_no_weight() -> None:
    """Nothing could be zero there instead of the channels that are left out."""
    program = read(with_integers(build("a = MatMul(x, A) w = ConstantOfShape(s) y = MatMul(a, w)", A=(6, 8)), s=[8, 3]))
    assert text(program) == []


def test_channels_that_cannot_stay() -> None:
    program = read(build("a = MatMul(x, A) r = Relu(a) y = MatMul(r, B)", **MLP))
    channels = find_channels(program)
    (dimension,) = removable(channels).dimensions
    for stay in ([], [3, 1], [0, 0], [7, 8], [-1, 2]):
        with pytest.raises(SparsecError, match="the channels of a, y that stay must be one or more of 8"):
            remove(program, channels, {dimension: np.array(stay, dtype=np.int64)})


def test_what_does_not_shrink_is_shared() -> None:
    program = read(SMALL["mlp"][0])
    channels = find_channels(program)
    first = removable(channels).dimensions[0]
    model = remove(program, channels, {first: np.arange(4)})
    before, after = program.model.graph.initializers, model.graph.initializers
    shared = {name for name in before if before[name].const_value is after[name].const_value}
    assert shared == {"fc2.bias", "fc3.weight", "fc3.bias"}


@pytest.mark.skipif(not LIGHT.is_dir(), reason="this onnx comes without its light models")
@pytest.mark.parametrize("file", ["densenet121", "inception_v2", "resnet50", "shufflenet"])
def test_known_networks(file: str) -> None:
    program = read(light(file))
    found = removable(find_channels(program))
    assert bool(found.dimensions) == (file != "shufflenet")
    assert_same(program, random_kept(found.dimensions, 1), strict=False)  # opsets whose inference is not complete

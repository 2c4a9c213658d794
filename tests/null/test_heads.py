"""Heads of attention whose number exporters leave open: it is found, they go whole, and shapes stay right."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import build, with_integers
from test_remove import assert_same, random_kept, text

from sparsec.compiler.frontend import read
from sparsec.passes.channels import find_channels
from sparsec.passes.channels.partial import joined_numbers, known_numbers
from sparsec.passes.channels.shapes import infer_shapes
from sparsec.passes.remove import removable, remove

# Three heads of four; the shapes are `split` and `join`, the mask [N, 1, S, S] comes of `mask`.
ATTENTION = """q = MatMul(x, Q) k = MatMul(x, K) v = MatMul(x, V)
    qs = Reshape(q, split) ks = Reshape(k, split) vs = Reshape(v, split)
    qt = Transpose<perm=[0,2,1,3]>(qs) kt = Transpose<perm=[0,2,3,1]>(ks) vt = Transpose<perm=[0,2,1,3]>(vs)
    p = MatMul(qt, kt) m = Add(p, mask) s = Softmax<axis=-1>(m) c = MatMul(s, vt) ct = Transpose<perm=[0,2,1,3]>(c)
    cs = Reshape(ct, join) y = MatMul(cs, O)"""
SIZES = (
    """sh = Shape(x) n0 = Gather(sh, zeroth) t0 = Gather(sh, first) n = Unsqueeze(n0, zero) t = Unsqueeze(t0, zero)"""
)
# As torch.Tensor.expand is written where sizes may be -1: these become 1, and Expand takes the larger.
MASK = """asked = Concat<axis=0>(n, minus, t, t) flat = Reshape(asked, minus) length = Shape(flat)
    ones = ConstantOfShape<value=int64[1] {1}>(length) minuses = Mul(ones, minus) open = Equal(flat, minuses)
    sizes = Where(open, ones, flat) last = Slice(x, zero, one, two) turned = Transpose<perm=[0,2,1]>(last)
    one4 = Unsqueeze(turned, one) mask = Expand(one4, sizes)"""
# As scaled_dot_product_attention is written: by the size of a head, which is the last of a shape.
SCALED = ATTENTION.replace(
    "m = Add(p, mask)",
    "hs = Shape(qt) hd = Slice(hs, minus, many) hf = Cast<to=1>(hd) pd = Div(p, hf) m = Add(pd, mask)",
)
FORMS = {
    "open, both ways": f"""{SIZES} {MASK} split = Concat<axis=0>(n, t, minus, four) join = Concat<axis=0>(n, t, minus)
        {ATTENTION}""",
    "numbers, both ways": f"""{SIZES} {MASK} split = Concat<axis=0>(n, t, three, four)
        join = Concat<axis=0>(n, t, twelve) {ATTENTION}""",
    "numbers in one piece": f"""{SIZES} {MASK} split = Concat<axis=0>(n, t, heads) join = Concat<axis=0>(n, t, twelve)
        {ATTENTION}""",
    "Shape of a part": f"""n = Shape<start=0, end=1>(x) t = Shape<start=1, end=2>(x) {MASK}
        split = Concat<axis=0>(n, t, minus, four) join = Concat<axis=0>(n, t, minus) {ATTENTION}""",
    "scaled by the size of a head": f"""{SIZES} {MASK} split = Concat<axis=0>(n, t, three, four)
        join = Concat<axis=0>(n, t, twelve) {SCALED}""",
}
NUMBERS = {
    "zero": [0],
    "one": [1],
    "two": [2],
    "three": [3],
    "four": [4],
    "twelve": [12],
    "minus": [-1],
    "many": [10**12],
}


def attention(form: str) -> onnx.ModelProto:
    return attention_of(FORMS[form])


def attention_of(body: str) -> onnx.ModelProto:
    weights = {"Q": (6, 12), "K": (6, 12), "V": (6, 12), "O": (12, 5)}
    model = with_integers(build(body, x="N, S, 6", y="N, S, 5", **weights), **NUMBERS, heads=[3, 4])
    for name, number in (("zeroth", 0), ("first", 1)):
        model.graph.initializer.append(onnx.helper.make_tensor(name, onnx.TensorProto.INT64, [], [number]))
    return model


@pytest.mark.parametrize("form", FORMS)
def test_heads_go_whole(form: str) -> None:
    program = read(attention(form))
    assert text(program) == ["3: q k v / y"]
    found = removable(find_channels(program)).dimensions
    for seed in range(4):
        assert_same(program, random_kept(found, seed), seed, N=2, S=3 + seed)


@pytest.mark.parametrize("taken", ["Slice(hs, one, two)", "Slice(hs, zero, many, zero, two)", "Slice(hs, n, many)"])
def test_heads_whose_number_may_be_read_stay(taken: str) -> None:
    form = FORMS["scaled by the size of a head"].replace("Slice(hs, minus, many)", taken).replace("(hd)", "(he)")
    model = attention_of(form.replace("hf =", "he = ReduceMin<keepdims=0>(hd) hf ="))
    assert text(read(model)) == []


def test_shapes_that_say_it_already_stay() -> None:
    """With -1 for the heads nothing of the graph changes but the weights."""
    program = read(attention("open, both ways"))
    channels = find_channels(program)
    (dimension,) = removable(channels).dimensions
    smaller = remove(program, channels, {dimension: np.array([0, 2])})
    nodes = [
        [(node.op_type, [v and v.name for v in node.inputs]) for node in m.graph] for m in (program.model, smaller)
    ]
    assert nodes[0] == nodes[1]


def test_what_is_open_is_found() -> None:
    shapes = infer_shapes(read(attention("open, both ways")).model)
    assert shapes["qs"] == ["N", "S", 3, 4]
    assert [shapes["mask"][1], shapes["s"][1], shapes["ct"][2:], shapes["cs"][-1]] == [1, 3, [3, 4], 12]  # type: ignore[index]


@pytest.mark.parametrize("opset", [13, 17])
def test_what_is_asked_for_is_found(opset: int) -> None:
    """[N, C, H, W] to [N, C, -1], N and C taken of the Shape, as the patches of a ViT are: before opset 14 too."""
    body = """a = Conv(x, A) s = Shape(a) b = Slice(s, zero, two, zero) c = Concat<axis=0>(b, minus) r = Reshape(a, c)
        t = Transpose<perm=[0,2,1]>(r) m = MatMul(t, B) u = Relu(m) y = MatMul(u, C)"""
    model = build(body, x="N, 3, 4, 4", y="N, T, C", opset=opset, A=(8, 3, 2, 2), B=(8, 12), C=(12, 5))
    program = read(with_integers(model, **NUMBERS))
    shapes = infer_shapes(program.model)
    assert (shapes["r"], shapes["t"], shapes["u"]) == (["N", 8, 9], ["N", 9, 8], ["N", 9, 12])
    assert text(program) == ["12: m / y"]
    assert_same(program, random_kept(removable(find_channels(program)).dimensions, 0))


def test_what_cannot_be_known_is_not_said() -> None:
    """Of two open sizes neither follows, nor where what stands before them may differ."""
    body = "a = MatMul(x, A) s = Shape(z) r = Reshape(a, s) y = Relu(r)"
    model = build(body, x="N, S, 6", y="P, Q", A=(6, 12))
    model.graph.input.append(onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, ["P", "Q"]))
    assert infer_shapes(read(model).model)["r"] == ["P", "Q"]
    assert text(read(model)) == []


NODES = {
    "joined": ("j = Concat<axis=0>(n, minus, four)", [None, -1, 4]),
    "a vector of unknown length": ("i = Identity(z) j = Concat<axis=0>(n, i)", None),
    "where": ("c = Equal(n, four) j = Where(c, one, one)", [1]),
    "where it is not known": ("c = Equal(n, four) j = Where(c, one, two)", [None]),
    "products": ("d = Concat<axis=0>(n, four) j = Mul(d, two)", [None, 8]),
    "lengths differ": ("d = Concat<axis=0>(n, four) e = Concat<axis=0>(n, n, n) j = Mul(d, e)", None),
    "filled by a length that no shape has": ("j = ConstantOfShape<value=int64[1] {1}>(many)", None),
    "filled by an unknown length": ("j = ConstantOfShape(n)", None),
    "an operator without a rule": ("d = Concat<axis=0>(n, four) j = Abs(d)", None),
}


@pytest.mark.parametrize("name", NODES)
def test_vectors_that_are_partly_known(name: str) -> None:
    body, expected = NODES[name]
    model = with_integers(build(f"n = Shape<start=0, end=1>(x) {body} y = Reshape(x, j)", y="M"), **NUMBERS)
    model.graph.input.append(onnx.helper.make_tensor_value_info("z", onnx.TensorProto.INT64, ["L"]))
    shape = next(node for node in read(model).model.graph if node.op_type == "Reshape").inputs[1]
    assert known_numbers(shape) == expected
    assert joined_numbers(shape) == (expected if name == "joined" else None)

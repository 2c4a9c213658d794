"""What weights and activations are stored as: text, tables, codes and how far these are from the numbers."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sparsec.ir import Grid, SparsecError, UsageError
from sparsec.ir.values import SYNTAX, VALUES, Codebook, Floats, Int8, Values, parse_values

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

PROPERTY = settings(max_examples=150, deadline=None, derandomize=True, database=None)
TINY = float(np.finfo(np.float32).tiny)
EPSILON = float(np.finfo(np.float32).eps)
# Scales and entries are rounded to float32 once, weights once more.
SLACK = 1 + 4 * EPSILON

KINDS: st.SearchStrategy[Values] = st.one_of(
    st.builds(Floats, st.sampled_from(("float32", "float16", "bfloat16"))),
    st.builds(Int8, st.just(0) | st.integers(1, 40)),
    st.builds(Codebook, st.sampled_from((16, 256))),
)
SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 40))
# Numbers that float16 holds, and of any size.
MODERATE = st.floats(-6e4, 6e4, width=32) | st.floats(-1, 1, width=32)
ANY = st.floats(-(2.0**100), 2.0**100, width=32)


def weights(numbers: st.SearchStrategy[float] = MODERATE) -> st.SearchStrategy[Array]:
    """[out, in] float32, mostly with zeros."""
    return SHAPES.flatmap(lambda shape: arrays(np.float32, shape, elements=st.just(0.0) | numbers))


SEEDED = st.builds(
    lambda shape, density, seed, size: random_weight(shape, density, seed) * np.float32(size),
    SHAPES,
    st.sampled_from((0.1, 0.5, 1.0)),
    st.integers(0, 2**16),
    st.sampled_from((1e-30, 1e-3, 1.0, 100.0)),
)


def random_weight(shape: tuple[int, int], density: float, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * (rng.random(shape) < density)).astype(np.float32)


# ---- Text ----


@PROPERTY
@given(KINDS)
def test_text_round_trip(kind: Values) -> None:
    assert parse_values(str(kind)) == kind
    assert parse_values(f" {kind!s} ".upper()) == kind
    assert str(parse_values(str(kind))) == str(kind)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("fp32", Floats("float32")),
        ("float32", Floats("float32")),
        ("bf16", Floats("bfloat16")),
        ("bfloat16", Floats("bfloat16")),
        ("fp16", Floats("float16")),
        ("int8", Int8()),
        ("int8:32", Int8(32)),
        ("codebook16", Codebook(16)),
        ("codebook256", Codebook(256)),
    ],
)
def test_text(text: str, kind: Values) -> None:
    assert parse_values(text) == kind
    assert hash(parse_values(text)) == hash(kind)


@pytest.mark.parametrize(
    "text", ["", "int4", "int8:", "int8:-4", "int8:x", "int88", "codebook", "codebookx", "fp8", "uint8"]
)
def test_text_of_nothing(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_values(text)
    assert str(caught.value) == f"'{text}' is no kind of values: expected {SYNTAX}"


def test_impossible_kinds() -> None:
    with pytest.raises(UsageError, match=r"^int8:0: a group needs at least one input$"):
        parse_values("int8:0")
    with pytest.raises(UsageError, match=r"^int8:-3: a group needs at least one input$"):
        Int8(-3)
    for size in (0, 1, 15, 17, 32, 512):
        with pytest.raises(UsageError, match=f"^codebook{size}: a codebook has 16 or 256 entries$"):
            parse_values(f"codebook{size}")


@PROPERTY
@given(st.text(max_size=12) | st.from_regex(r"(int8|codebook|fp|bf)[:\d]{0,6}", fullmatch=True))
def test_any_text_is_a_kind_or_a_sentence(text: str) -> None:
    try:
        kind = parse_values(text)
    except UsageError as error:
        message = str(error)
    else:
        assert parse_values(str(kind)) == kind
        return
    assert message.startswith(f"'{text}' is no kind of values") or "a group needs" in message or "16 or 256" in message


def test_every_kind_is_listed_and_frozen() -> None:
    assert {type(parse_values(text)) for text in ("fp32", "int8", "codebook16")} == set(VALUES)
    for text in ("fp16", "int8:4", "codebook256"):
        field = type(parse_values(text)).__dataclass_fields__  # type: ignore[attr-defined]
        with pytest.raises(FrozenInstanceError):
            setattr(parse_values(text), next(iter(field)), 3)


# ---- What all kinds keep to ----


@PROPERTY
@given(KINDS, weights())
def test_grid_is_exact_and_zeros_stay(kind: Values, weight: Array) -> None:
    table = kind.fit(weight)
    assert table.dtype == np.float32
    assert table.size == kind.table_size(weight.shape)
    codes = kind.encode(weight, table)
    assert codes.dtype == kind.dtype
    assert codes.shape == weight.shape
    rounded = kind.decode(codes, table)
    assert rounded.dtype == np.float32
    assert np.array_equal(rounded, kind.round(weight, table))
    assert np.isfinite(rounded).all()
    # Zeros, and signs.
    assert (codes[weight == 0] == 0).all()
    assert (rounded[weight == 0] == 0).all()
    assert not np.signbit(rounded[weight == 0] + 0.0).any()
    # What lies on the grid stays there.
    assert np.array_equal(kind.round(rounded, table), rounded)
    assert np.array_equal(kind.decode(kind.encode(rounded, table), table), rounded)


@PROPERTY
@given(KINDS, SHAPES, st.integers(0, 2**16))
def test_code_zero_is_zero(kind: Values, shape: tuple[int, int], seed: int) -> None:
    """Whatever the table."""
    rng = np.random.default_rng(seed)
    table = kind.fit(random_weight(shape, 0.5, seed))
    if isinstance(kind, Int8):
        table = np.exp2(rng.uniform(-30, 30, table.shape)).astype(np.float32)
    zeros = np.zeros(shape, dtype=kind.dtype)
    assert not kind.decode(zeros, table).any()
    assert not kind.encode(np.zeros(shape, dtype=np.float32), table).any()
    assert not kind.encode(-np.zeros(shape, dtype=np.float32), table).astype(np.float32).any()


@PROPERTY
@given(KINDS)
def test_bits_hold_the_codes(kind: Values) -> None:
    assert kind.bits <= 8 * kind.dtype.itemsize
    weight = random_weight((8, 40), 0.9, 0)
    codes = kind.encode(weight, kind.fit(weight))
    if kind.bits < 8:
        assert codes.max() < 1 << kind.bits


# ---- Floats ----


@PROPERTY
@given(weights(ANY))
def test_bfloat16_is_the_upper_half(weight: Array) -> None:
    """To the nearest, ties to even, by the bits."""
    kind = Floats("bfloat16")
    bits = weight.view(np.uint32)
    upper = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32)
    assert np.array_equal(kind.round(weight, kind.fit(weight)), upper.view(np.float32))


@PROPERTY
@given(weights())
def test_floats(weight: Array) -> None:
    assert np.array_equal(Floats().round(weight, Floats().fit(weight)), weight)
    half = Floats("float16")
    assert np.array_equal(half.round(weight, half.fit(weight)), weight.astype(np.float16).astype(np.float32))
    assert [Floats(name).bits for name in ("float32", "float16", "bfloat16")] == [32, 16, 16]


# ---- int8 ----


def spread(kind: Int8, table: Array, inputs: int) -> Array:
    """The scale of every weight, by the definition."""
    return table[:, np.arange(inputs) // (kind.group or max(inputs, 1))]


@PROPERTY
@given(st.builds(Int8, st.just(0) | st.integers(1, 50)), weights(ANY))
@example(Int8(), np.array([[TINY]], dtype=np.float32))
@example(Int8(), np.array([[127 * TINY, -1e-45], [1e-45, 0]], dtype=np.float32))
@example(Int8(3), np.array([[1e-38, 0, 0, 2, 0, 1e-42, 0]], dtype=np.float32))
def test_int8_is_within_half_a_step(kind: Int8, weight: Array) -> None:
    table = kind.fit(weight)
    groups = -(-weight.shape[1] // kind.group) if kind.group else 1
    assert table.shape == (len(weight), groups)
    assert (table >= TINY).all(), "no scale is zero or subnormal"
    scales = spread(kind, table, weight.shape[1])
    rounded, codes = kind.round(weight, table), kind.encode(weight, table)
    assert codes.min() >= -127
    assert (np.abs(rounded.astype(np.float64) - weight) <= scales.astype(np.float64) / 2 * (1 + 256 * EPSILON)).all()
    for g in range(groups):
        part = slice(g * kind.group, (g + 1) * kind.group) if kind.group else slice(None)
        largest = np.abs(weight[:, part]).max(axis=1)
        whole = largest / 127 >= TINY
        # The largest of a group is 127, and not clipped.
        assert (np.abs(codes[:, part].astype(int)).max(axis=1)[whole] == 127).all()
        assert (table[~whole, g] == 1).all()


def test_groups_do_not_meet() -> None:
    """A large weight costs its own group precision, and no other."""
    weight = np.full((2, 40), 0.01, dtype=np.float32)
    weight[0, 3] = 1000
    one, many = Int8().round(weight, Int8().fit(weight)), Int8(8).round(weight, Int8(8).fit(weight))
    assert (one[0] == 0).sum() == 39
    assert (many[0] == 0).sum() == 7
    np.testing.assert_allclose(many[0, 8:], 0.01, rtol=1e-6)
    np.testing.assert_allclose(one[1], 0.01, rtol=1e-6)


def test_group_of_more_inputs_than_there_are() -> None:
    weight = random_weight((3, 10), 0.7, 0)
    for group in (10, 11, 10**15):
        kind = Int8(group)
        table = kind.fit(weight)
        assert table.shape == (3, 1)
        assert np.array_equal(kind.round(weight, table), Int8().round(weight, Int8().fit(weight)))


def test_int8_rounds_to_even_and_saturates() -> None:
    """With the scales that a model came with, whose codes may be -128."""
    weight = np.array([[0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.4, 300, -127.5, -128, -128.5, -1e6]], dtype=np.float32)
    codes = Int8().encode(weight, np.ones((1, 1), dtype=np.float32))
    assert codes.tolist() == [[0, 2, 2, 0, -2, 126, 127, 127, -128, -128, -128, -128]]
    assert Int8().round(weight, np.full((1, 1), 2, dtype=np.float32))[0, -1] == -256


def test_every_code_of_int8_is_exact() -> None:
    codes = np.arange(-128, 128, dtype=np.int8)[None].repeat(200, axis=0)
    table = np.exp2(np.random.default_rng(0).uniform(-110, 110, (200, 1))).astype(np.float32)
    assert np.array_equal(Int8().encode(Int8().decode(codes, table), table), codes)


# ---- Codebooks ----


@PROPERTY
@given(st.sampled_from((16, 256)), st.data())
def test_codebook_is_exact_for_few_values(size: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(ANY, min_size=1, max_size=size - 1))
    weight = data.draw(weights(st.sampled_from(values)))
    kind = Codebook(size)
    table = kind.fit(weight)
    assert np.array_equal(kind.round(weight, table), weight)
    assert set(np.unique(table)) <= {0.0, *np.unique(weight)}


@pytest.mark.parametrize("size", [16, 256])
def test_exactly_as_many_values_as_entries(size: int) -> None:
    kind = Codebook(size)
    values = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    exact, over = np.tile(values[:-1], (3, 5)), np.tile(values, (3, 5))
    assert np.array_equal(kind.round(exact, kind.fit(exact)), exact)
    assert not np.array_equal(kind.round(over, kind.fit(over)), over)
    assert len(np.unique(kind.fit(over))) == size


@pytest.mark.parametrize("size", [16, 256])
def test_codebook_of_nothing(size: int) -> None:
    kind = Codebook(size)
    zeros = np.zeros((3, 4), dtype=np.float32)
    assert np.array_equal(kind.fit(zeros), np.zeros(size))
    assert not kind.round(zeros, kind.fit(zeros)).any()
    empty = np.zeros((0, 4), dtype=np.float32)
    assert kind.round(empty, kind.fit(empty)).shape == (0, 4)


@pytest.mark.parametrize("size", [16, 256])
def test_codebook_of_equal_weights(size: int) -> None:
    kind = Codebook(size)
    weight = np.full((3, 4), -0.3, dtype=np.float32)
    weight[1] = 0
    assert kind.fit(weight).tolist() == [0] + [float(np.float32(-0.3))] * (size - 1)
    assert np.array_equal(kind.round(weight, kind.fit(weight)), weight)


@PROPERTY
@given(st.sampled_from((16, 256)), SEEDED, st.integers(0, 2**16))
def test_codebook_is_in_order_and_deterministic(size: int, weight: Array, seed: int) -> None:
    """The table depends on which weights there are, not on where."""
    kind = Codebook(size)
    table = kind.fit(weight)
    assert np.array_equal(table, kind.fit(weight.copy()))
    assert table[0] == 0
    assert (np.diff(table[1:]) >= 0).all()
    kept = weight[weight != 0]
    if kept.size:
        assert kept.min() <= table[1] and table[-1] <= kept.max()
    mixed = np.random.default_rng(seed).permutation(weight.ravel()).reshape(weight.shape)
    np.testing.assert_allclose(kind.fit(mixed), table, rtol=1e-6)


@PROPERTY
@given(st.sampled_from((16, 256)), SEEDED, st.integers(0, 2**16))
def test_encode_finds_the_nearest_entry(size: int, weight: Array, seed: int) -> None:
    """Of any table, in any order; only zeros become zero."""
    table = np.random.default_rng(seed).standard_normal(size).astype(np.float32) * (np.abs(weight).max() or 1)
    table[0], table[5] = 0, table[4]
    kind = Codebook(size)
    codes = kind.encode(weight, table)
    assert np.array_equal(codes == 0, weight == 0)
    away = np.abs(weight.astype(np.float64)[..., None] - table[1:].astype(np.float64)).min(axis=-1)
    found = np.abs(weight.astype(np.float64) - kind.decode(codes, table).astype(np.float64))
    assert (found[weight != 0] <= away[weight != 0]).all()


def loss(kind: Codebook, weight: Array, table: Array, importance: Array | float = 1.0) -> float:
    return float((importance * np.square(kind.round(weight, table).astype(np.float64) - weight)).sum())


def uniform(kind: Codebook, weight: Array) -> Array:
    """Equal steps from the least to the largest weight that is kept."""
    kept = weight[weight != 0]
    table = np.zeros(kind.size, dtype=np.float32)
    if kept.size:
        table[1:] = np.linspace(kept.min(), kept.max(), kind.size - 1)
    return table


DISTRIBUTIONS = ("standard_normal", "random", "laplace", "standard_cauchy")


@PROPERTY
@given(
    st.sampled_from((16, 256)),
    st.sampled_from(DISTRIBUTIONS),
    st.sampled_from((1, 30, 50, 100, 300, 2000)),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_codebook_is_never_worse_than_equal_steps(
    size: int, distribution: str, count: int, important: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    weight = getattr(rng, distribution)(size=(2, count)).astype(np.float32)
    importance = np.exp(rng.standard_normal(count)) if important else None
    kind, each = Codebook(size), 1.0 if importance is None else importance
    fitted = loss(kind, weight, kind.fit(weight, importance), each)
    assert fitted <= loss(kind, weight, uniform(kind, weight), each) * (1 + 1e-5) + 1e-12


def test_codebook_is_never_worse_than_equal_steps_for_few_weights() -> None:
    """Some three a centre, where Lloyd's algorithm may well stop at a poor place."""
    kind = Codebook(16)
    for seed in range(400):
        weight = np.random.default_rng(seed).standard_normal((1, 40)).astype(np.float32)
        fitted, steps = (loss(kind, weight, table) for table in (kind.fit(weight), uniform(kind, weight)))
        assert fitted <= steps * (1 + 1e-5), f"seed {seed}: {fitted / steps:.3f} of the error of equal steps"


def test_codebook_is_near_the_best_of_16_bits() -> None:
    """Panter and Dite: the best 15 levels for a normal density have an error of about 2.72 / 15^2 = 0.0121."""
    weight = np.random.default_rng(0).standard_normal((100, 1000)).astype(np.float32)
    kind = Codebook(16)
    assert loss(kind, weight, kind.fit(weight)) / weight.size < 0.0125
    assert loss(Codebook(256), weight, Codebook(256).fit(weight)) / weight.size < 6e-5


def test_importance_matters() -> None:
    """Entries go where errors count."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((500, 2)).astype(np.float32) * np.array([1, 100], dtype=np.float32)
    kind = Codebook(16)
    left, right = np.array([1.0, 1e-6]), np.array([1e-6, 1.0])
    plain = kind.fit(weight)
    assert loss(kind, weight, kind.fit(weight, left), left) < 0.05 * loss(kind, weight, plain, left)
    assert loss(kind, weight, kind.fit(weight, right), right) < 1.02 * loss(kind, weight, plain, right)
    small = [np.count_nonzero(np.abs(kind.fit(weight, importance)[1:]) < 4) for importance in (left, right)]
    assert small[0] > 10 > 4 > small[1]
    assert np.array_equal(kind.fit(weight, np.full(2, 7.0)), kind.fit(weight))


@PROPERTY
@given(st.sampled_from((16, 256)), SEEDED, st.sampled_from((4, 8, 16)), st.integers(0, 2**16))
def test_importances_of_any_size(size: int, weight: Array, decades: int, seed: int) -> None:
    """Dead inputs beside live ones: entries stay in order and among the weights."""
    rng = np.random.default_rng(seed)
    importance = 10.0 ** rng.uniform(-decades, 3, weight.shape[1])
    importance[rng.random(weight.shape[1]) < 0.1] = 0
    table = Codebook(size).fit(weight, importance)
    assert np.isfinite(table).all()
    assert (np.diff(table[1:]) >= 0).all()
    kept = weight[weight != 0]
    if kept.size:
        assert kept.min() <= table[1] and table[-1] <= kept.max()


# ---- Grids of activations ----

ENDS = st.floats(-1e30, 1e30) | st.floats(-10, 10) | st.sampled_from((0.0, -0.0, 1e-45, -1e-45, 1e-38, 3e38, -3e38))


@PROPERTY
@given(ENDS, ENDS)
@example(0.0, 0.0)
@example(5.0, 5.0)
@example(-5.0, -5.0)
@example(-3.4e38, 3.4e38)
@example(-1e-45, 1e-45)
def test_spanning_covers_the_range_and_zero(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    grid = Grid.spanning(low, high)
    assert grid.scale == np.float32(grid.scale) >= TINY
    assert 0 <= grid.zero_point <= 255
    assert isinstance(grid.zero_point, int) and isinstance(grid.scale, float)
    low, high = min(low, 0.0), max(high, 0.0)
    # Zero is a code.
    assert grid.round(np.zeros(1)) == 0
    # The ends are within half a step, but for what 255 float32 steps are off.
    slack = grid.scale * (0.5 + 255 * 2 * EPSILON)
    ends = [(code - grid.zero_point) * grid.scale for code in (0, 255)]
    assert ends[0] <= low + slack and high - slack <= ends[1]
    # The finest that does.
    assert grid.scale <= max((high - low) / 255 * (1 + EPSILON), TINY)


def test_spanning() -> None:
    assert Grid.spanning(0, 255) == Grid.spanning(10, 255) == Grid(1.0, 0)
    assert Grid.spanning(-255, 0) == Grid.spanning(-255, -3) == Grid(1.0, 255)
    assert Grid.spanning(-128, 127) == Grid(1.0, 128)
    assert Grid.spanning(0, 0) == Grid(TINY, 0)


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, np.inf), (-np.inf, 0.0), (-np.inf, np.inf), (np.nan, 1.0), (0.0, np.nan)]
)
def test_spanning_needs_numbers(low: float, high: float) -> None:
    with pytest.raises((SparsecError, ValueError)):
        Grid.spanning(low, high)


@pytest.mark.parametrize(
    ("scale", "words"),
    [(0.0, "0"), (-1.0, "-1"), (np.inf, "inf"), (np.nan, "nan"), (1e-40, "1e-40"), (1e39, r"1e\+39")],
)
def test_impossible_scales(scale: float, words: str) -> None:
    with pytest.raises(SparsecError, match=f"^scale {words}: expected a positive finite number$"):
        Grid(scale, 0)


@pytest.mark.parametrize("zero_point", [-1, 256, 300, -(2**40)])
def test_impossible_zero_points(zero_point: int) -> None:
    with pytest.raises(SparsecError, match=f"^zero point {zero_point}: expected 0 to 255$"):
        Grid(1.0, zero_point)


GRIDS = st.builds(Grid, st.floats(2.0**-20, 2.0**20, width=32), st.integers(0, 255))


@PROPERTY
@given(GRIDS, arrays(np.float32, st.integers(1, 50), elements=st.floats(-1e9, 1e9, width=32)))
def test_round(grid: Grid, values: Array) -> None:
    rounded = grid.round(values)
    assert rounded.dtype == np.float32
    low, high = (np.float32(code - grid.zero_point) * np.float32(grid.scale) for code in (0, 255))
    assert ((low <= rounded) & (rounded <= high)).all()
    near = np.abs(rounded.astype(np.float64) - np.clip(values, low, high))
    assert (near <= grid.scale * (0.5 + 255 * 2 * EPSILON)).all()
    assert np.array_equal(grid.round(rounded), rounded)


def test_round_goes_to_even_and_saturates() -> None:
    values = np.array([0.5, 1.5, 2.5, -0.5, -2.5, 300, -300, np.inf, -np.inf], dtype=np.float32)
    assert Grid(1.0, 100).round(values).tolist() == [0, 2, 2, 0, -2, 155, -100, 155, -100]
    assert Grid(1.0, 3).round(values).tolist() == [0, 2, 2, 0, -2, 252, -3, 252, -3]
    assert Grid(0.5, 0).round(np.arange(600, dtype=np.float64)).max() == 127.5


@PROPERTY
@given(GRIDS)
def test_every_code_is_a_fixed_point(grid: Grid) -> None:
    values = (np.arange(256) - grid.zero_point).astype(np.float32) * np.float32(grid.scale)
    assert np.array_equal(grid.round(values), values)


def test_grids_are_keys() -> None:
    assert len({Grid(1.0, 3), Grid(1.0, 3), Grid(1.0, 4)}) == 2
    with pytest.raises(FrozenInstanceError):
        Grid(1.0, 3).scale = 2.0  # type: ignore[misc]

"""Patterns and packed weights: legal masks, the best ones, and packing that loses nothing."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparsec.ir import BlockPattern, UsageError
from sparsec.ir.sparse_matrix import DOT_INPUTS, MAX_PANEL, SparseMatrix, code_unit, panel_width
from sparsec.ir.values import Codebook, Floats, Int8, Values, parse_values
from sparsec.ir.values.floats import DTYPES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

PROPERTY = settings(max_examples=200, deadline=None, derandomize=True, database=None)
SHAPES = st.tuples(st.integers(1, 70), st.integers(1, 70))
PATTERNS = st.builds(BlockPattern, st.integers(1, 40), st.integers(1, 40))
DENSITIES = st.floats(0, 1)
SEEDS = st.integers(0, 2**32 - 1)


def random_weight(pattern: BlockPattern, shape: tuple[int, int], density: float, seed: int) -> Array:
    """Normal weights in blocks that are kept with probability `density`."""
    rng = np.random.default_rng(seed)
    mask = pattern.expand(rng.random(pattern.grid(shape)) < density, shape)
    return (rng.standard_normal(shape) * mask).astype(np.float32)


# ---- Packing ----


@PROPERTY
@given(PATTERNS, SHAPES, DENSITIES, SEEDS)
@example(BlockPattern(4, 4), (8, 8), 0.0, 0)
@example(BlockPattern(40, 40), (1, 1), 1.0, 0)
@example(BlockPattern(5, 3), (11, 10), 1.0, 0)
@example(BlockPattern(33, 7), (67, 8), 0.5, 0)
def test_packing_is_exact(pattern: BlockPattern, shape: tuple[int, int], density: float, seed: int) -> None:
    weight = random_weight(pattern, shape, density, seed)
    matrix = pattern.pack(weight)
    assert np.array_equal(matrix.to_dense(), weight)
    assert matrix.to_dense().dtype == np.float32


@PROPERTY
@given(PATTERNS, SHAPES, DENSITIES, SEEDS)
@example(BlockPattern(5, 3), (11, 10), 0.7, 1)
def test_arrays_are_as_documented(pattern: BlockPattern, shape: tuple[int, int], density: float, seed: int) -> None:
    """What a kernel relies on when it reads without a check."""
    weight = random_weight(pattern, shape, density, seed)
    m = pattern.pack(weight)
    cols = m.block[1]
    block_rows, block_cols = pattern.grid(shape)
    assert (m.values.dtype, m.indices.dtype, m.indptr.dtype) == (np.float32, np.int32, np.int32)
    assert m.values.shape == (m.blocks * m.panels * m.panel * cols,)
    assert m.indptr.shape == (block_rows + 1,)
    assert m.indptr[0] == 0
    assert m.indptr[-1] == m.blocks
    assert (np.diff(m.indptr) >= 0).all()
    assert (np.diff(m.indptr) <= block_cols).all()
    assert (m.indices >= 0).all()
    assert (m.indices + cols <= shape[1]).all()
    for begin, end in zip(m.indptr[:-1], m.indptr[1:], strict=True):
        assert (np.diff(m.indices[begin:end]) > 0).all()
    assert m.nbytes == 4 * (m.values.size + m.indices.size + m.indptr.size)
    # Exactly the blocks with a weight other than zero.
    assert m.blocks == np.count_nonzero(pattern.reduce((weight != 0).astype(np.float64)))


@PROPERTY
@given(PATTERNS, SHAPES, DENSITIES, SEEDS)
@example(BlockPattern(37, 2), (80, 9), 1.0, 2)
def test_product_in_the_order_of_the_kernels(
    pattern: BlockPattern, shape: tuple[int, int], density: float, seed: int
) -> None:
    """The layout by its definition: [block row][panel][block][C inputs][panel outputs]."""
    weight = random_weight(pattern, shape, density, seed)
    m = pattern.pack(weight)
    rows, cols = m.block
    x = np.random.default_rng(seed).standard_normal(shape[1])
    y = np.zeros((len(m.indptr) - 1, m.panels * m.panel))
    at = 0
    for i, (begin, end) in enumerate(zip(m.indptr[:-1], m.indptr[1:], strict=True)):
        for p in range(m.panels):
            for t in range(begin, end):
                block = m.values[at : at + cols * m.panel].reshape(cols, m.panel)
                y[i, p * m.panel : (p + 1) * m.panel] += x[m.indices[t] : m.indices[t] + cols] @ block
                at += cols * m.panel
    assert at == m.values.size
    assert (y[:, rows:] == 0).all(), "outputs that R does not fill are zeros"
    np.testing.assert_allclose(y[:, :rows].ravel()[: shape[0]], weight.astype(np.float64) @ x, atol=1e-10)


@PROPERTY
@given(PATTERNS, st.integers(1, 70), st.integers(1, 5), SEEDS)
def test_full_density(pattern: BlockPattern, out: int, block_cols: int, seed: int) -> None:
    """A weight without zeros is stored whole, also where the last block row is cut off."""
    m = pattern.pack(random_weight(pattern, (out, block_cols * pattern.cols), 1.0, seed))
    assert m.blocks == np.prod(pattern.grid(m.shape))
    assert m.density == 1


def test_density_counts_stored_blocks() -> None:
    weight = np.zeros((8, 8), dtype=np.float32)
    weight[0, 0] = weight[5, 6] = 1
    assert BlockPattern(4, 4).pack(weight).density == 0.5
    assert BlockPattern(1, 1).pack(weight).density == 2 / 64


@pytest.mark.parametrize("rows", range(1, 130))
def test_panel_width(rows: int) -> None:
    """Whole vectors from 4 outputs on, at most what registers hold, and less padding than another panel would be."""
    width = panel_width(rows)
    panels = -(-rows // width)
    assert width == rows if rows < 4 else width % 4 == 0
    assert width <= MAX_PANEL
    assert panels * width - rows < max(width, 1)


def test_frozen() -> None:
    matrix = BlockPattern(1, 1).pack(np.ones((2, 2), dtype=np.float32))
    with pytest.raises(FrozenInstanceError):
        matrix.shape = (1, 1)  # type: ignore[misc]


# ---- Masks ----


@PROPERTY
@given(PATTERNS, SHAPES, DENSITIES, SEEDS)
@example(BlockPattern(4, 4), (5, 5), 0.5, 0)
def test_project_is_legal_and_reaches_the_density(
    pattern: BlockPattern, shape: tuple[int, int], density: float, seed: int
) -> None:
    """Whole blocks, and as near to the density as they come: within half a block, and a block at the edge."""
    scores = np.random.default_rng(seed).random(shape)
    mask = pattern.project(scores, density)
    assert mask.shape == shape
    assert mask.dtype == np.bool_
    kept = pattern.reduce(mask.astype(np.float64))
    sizes = pattern.reduce(np.ones(shape))
    assert ((kept == 0) | (kept == sizes)).all(), "a block is kept or dropped whole"
    half = 0.5 * min(pattern.rows * pattern.cols, mask.size) if density else 0
    assert mask.sum() <= density * mask.size + half
    # The next best block would not have fitted.
    means = np.where(kept == 0, pattern.reduce(scores) / sizes, -np.inf)
    if (kept == 0).any():
        assert mask.sum() + sizes.ravel()[np.argmax(means)] > density * mask.size + half


@PROPERTY
@given(PATTERNS, SHAPES, DENSITIES, SEEDS)
def test_project_keeps_the_best(pattern: BlockPattern, shape: tuple[int, int], density: float, seed: int) -> None:
    """No dropped block has a higher mean score than a kept one."""
    scores = np.random.default_rng(seed).random(shape)
    kept = pattern.reduce(pattern.project(scores, density).astype(np.float64)) > 0
    means = pattern.reduce(scores) / pattern.reduce(np.ones(shape))
    if kept.any() and not kept.all():
        assert means[kept].min() >= means[~kept].max()


@PROPERTY
@given(PATTERNS, SHAPES, st.tuples(DENSITIES, DENSITIES), SEEDS)
def test_project_nests(
    pattern: BlockPattern, shape: tuple[int, int], densities: tuple[float, float], seed: int
) -> None:
    """A sparser mask is part of a denser one; all is kept at 1."""
    scores = np.random.default_rng(seed).random(shape)
    sparse, dense = (pattern.project(scores, density) for density in sorted(densities))
    assert (sparse <= dense).all()
    assert pattern.project(scores, 1.0).all()


@PROPERTY
@given(PATTERNS, SHAPES, DENSITIES)
def test_project_is_deterministic(pattern: BlockPattern, shape: tuple[int, int], density: float) -> None:
    """Equal scores: the first blocks are kept, the same every time."""
    scores = np.ones(shape)
    mask = pattern.project(scores, density)
    assert np.array_equal(mask, pattern.project(scores.copy(), density))
    kept = pattern.reduce(mask.astype(np.float64)).ravel() > 0
    assert (np.diff(kept.astype(int)) <= 0).all()


@PROPERTY
@given(PATTERNS, SHAPES, DENSITIES, SEEDS)
def test_projected_weight_packs(pattern: BlockPattern, shape: tuple[int, int], density: float, seed: int) -> None:
    """From scores to a packed weight: what is stored is what was kept."""
    weight = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    mask = pattern.project(weight.astype(np.float64) ** 2, density)
    matrix = pattern.pack(weight * mask)
    assert np.array_equal(matrix.to_dense(), weight * mask)
    assert np.count_nonzero(matrix.values) == mask.sum()


# ---- Text ----


@PROPERTY
@given(PATTERNS)
def test_text_round_trip(pattern: BlockPattern) -> None:
    assert BlockPattern.parse(str(pattern)) == pattern


def test_text() -> None:
    assert BlockPattern.parse("group:16") == BlockPattern.parse("block:16x1") == BlockPattern(16, 1)
    assert BlockPattern.parse("nm:2:4") is None
    with pytest.raises(UsageError, match="block:0x4"):
        BlockPattern.parse("block:0x4")


def test_density_counts_a_block_that_was_moved_back_once() -> None:
    weight = np.ones((10, 10), dtype=np.float32)
    assert BlockPattern(4, 4).pack(weight).density == 1.0
    assert BlockPattern(3, 7).pack(weight).density == 1.0


def test_nothing_is_kept_at_density_zero() -> None:
    assert not BlockPattern(4, 4).project(np.ones((9, 9)), 0.0).any()


# ---- 16 bits ----


@PROPERTY
@given(
    PATTERNS | st.builds(BlockPattern, st.sampled_from([64, 128, 192]), st.integers(1, 20)), SHAPES, DENSITIES, SEEDS
)
@example(BlockPattern(64, 16), (128, 40), 0.5, 0)
@example(BlockPattern(128, 3), (300, 40), 0.5, 0)
def test_packing_in_16_bits_only_rounds(
    pattern: BlockPattern, shape: tuple[int, int], density: float, seed: int
) -> None:
    weight = random_weight(pattern, shape, density, seed)
    for dtype in ("float16", "bfloat16"):
        matrix = pattern.pack(weight, dtype)
        assert matrix.dtype == dtype
        assert matrix.values.itemsize == 2
        assert np.array_equal(matrix.to_dense(), weight.astype(DTYPES[dtype]).astype(np.float32))


def test_swizzle_is_that_of_128_bytes() -> None:
    """A byte of an atom of 8 inputs x 64 outputs stands where its address has bits 4-6 XOR bits 7-9 (PTX ISA)."""
    weight = np.arange(64 * 24, dtype=np.float32).reshape(24, 64).T.copy() + 1
    matrix = BlockPattern(64, 8).pack(weight, "float16")
    assert matrix.swizzled
    stored = matrix.values
    for byte in range(0, 2 * stored.size, 2):
        swizzled = byte ^ ((byte >> 7 & 7) << 4)
        assert stored[swizzled // 2] == np.float16(weight[byte // 2 % 64, byte // 128])


# ---- Other kinds of values ----

KINDS: st.SearchStrategy[Values] = st.one_of(
    st.builds(Floats, st.sampled_from(("float32", "float16", "bfloat16"))),
    st.builds(Int8, st.just(0) | st.integers(1, 80)),
    st.builds(Codebook, st.sampled_from((16, 256))),
)


def stored_codes(m: SparseMatrix) -> Array:
    """The codes in the order of the stream, one an element, by the documentation."""
    if m.kind.bits != 4:
        return m.values
    unit = code_unit(m.panel)
    count = m.blocks * m.panels * m.panel * m.block[1]
    codes = np.zeros(2 * m.values.size, dtype=np.uint8)
    for i in range(count):
        first, j = i // unit * unit, i % unit
        byte = m.values[first // 2 + j % (unit // 2)]
        codes[i] = byte >> 4 if j >= unit // 2 else byte & 15
    assert not codes[count:].any()
    return codes[:count]


@PROPERTY
@given(KINDS, PATTERNS, SHAPES, DENSITIES, SEEDS)
@example(Codebook(16), BlockPattern(3, 1), (3, 3), 1.0, 0)
@example(Codebook(16), BlockPattern(1, 1), (5, 7), 0.5, 0)
@example(Codebook(16), BlockPattern(20, 3), (67, 11), 0.7, 0)
@example(Codebook(16), BlockPattern(40, 40), (1, 1), 1.0, 0)
@example(Int8(7), BlockPattern(33, 7), (67, 8), 0.5, 0)
@example(Codebook(256), BlockPattern(4, 4), (8, 8), 0.0, 0)
def test_packing_rounds_as_its_kind_does(
    kind: Values, pattern: BlockPattern, shape: tuple[int, int], density: float, seed: int
) -> None:
    weight = random_weight(pattern, shape, density, seed)
    matrix = pattern.pack(weight, "float32", kind)
    table = kind.fit(weight)
    assert matrix.kind == kind
    assert np.array_equal(matrix.table, table)
    assert np.array_equal(matrix.to_dense(), kind.round(weight, table))
    assert matrix.to_dense().dtype == np.float32
    assert matrix.values.dtype == kind.dtype
    # Packed again, as is.
    again = pattern.pack(matrix.to_dense(), "float32", kind, matrix.table)
    assert np.array_equal(again.to_dense(), matrix.to_dense())


@PROPERTY
@given(KINDS, PATTERNS, SHAPES, DENSITIES, SEEDS)
@example(Codebook(16), BlockPattern(3, 3), (9, 9), 1.0, 0)
@example(Int8(), BlockPattern(5, 3), (11, 10), 0.7, 1)
def test_sizes_are_those_of_codes(
    kind: Values, pattern: BlockPattern, shape: tuple[int, int], density: float, seed: int
) -> None:
    m = pattern.pack(random_weight(pattern, shape, density, seed), "float32", kind)
    stored = m.blocks * m.panels * m.panel * m.block[1]
    size = (stored + 1) // 2 if kind.bits == 4 else stored * kind.bits // 8
    assert m.values.nbytes == size
    assert m.table.size == kind.table_size(shape)
    assert m.nbytes == size + 4 * (m.table.size + m.indices.size + m.indptr.size)
    # Exactly the blocks with a weight that is not stored as zero.
    codes = kind.encode(random_weight(pattern, shape, density, seed), m.table)
    assert m.blocks == np.count_nonzero(pattern.reduce((codes != 0).astype(np.float64)))


@settings(PROPERTY, max_examples=60)
@given(KINDS, PATTERNS, SHAPES, DENSITIES, SEEDS)
@example(Codebook(16), BlockPattern(3, 3), (10, 10), 1.0, 0)
@example(Codebook(16), BlockPattern(12, 2), (30, 9), 1.0, 0)
@example(Codebook(16), BlockPattern(32, 1), (40, 9), 0.6, 0)
def test_codes_in_the_order_of_the_kernels(
    kind: Values, pattern: BlockPattern, shape: tuple[int, int], density: float, seed: int
) -> None:
    """The layout by its definition, two codes in a byte where they have 4 bits."""
    weight = random_weight(pattern, shape, density, seed)
    m = pattern.pack(weight, "float32", kind)
    codes, expected = stored_codes(m), kind.encode(weight, m.table)
    (rows, cols), at = m.block, 0
    found = np.zeros((len(m.indptr) - 1, m.panels * m.panel, shape[1]), dtype=np.float64)
    for i, (begin, end) in enumerate(zip(m.indptr[:-1], m.indptr[1:], strict=True)):
        for p in range(m.panels):
            for t in range(begin, end):
                block = codes[at : at + cols * m.panel].reshape(cols, m.panel)
                found[i, p * m.panel : (p + 1) * m.panel, m.indices[t] : m.indices[t] + cols] += block.T
                at += cols * m.panel
    assert at == codes.size
    assert not found[:, rows:].any(), "outputs that R does not fill are zeros"
    assert np.array_equal(found[:, :rows].reshape(-1, shape[1])[: shape[0]], expected.astype(np.float64))


FOUR = st.integers(1, 12).map(lambda n: DOT_INPUTS * n)


@PROPERTY
@given(
    st.builds(BlockPattern, st.integers(1, 70), FOUR),
    st.tuples(st.integers(1, 90), FOUR),
    DENSITIES,
    SEEDS,
)
@example(BlockPattern(32, 4), (45, 8), 1.0, 0)
@example(BlockPattern(3, 12), (7, 20), 0.6, 0)
@example(BlockPattern(64, 40), (10, 8), 1.0, 0)
def test_four_inputs_together(pattern: BlockPattern, shape: tuple[int, int], density: float, seed: int) -> None:
    """[C / 4][panel outputs][4], with the same weight as ever."""
    weight = random_weight(pattern, shape, density, seed)
    alone, m = (pattern.pack(weight, "float32", Int8(), together=together) for together in (1, DOT_INPUTS))
    assert np.array_equal(m.to_dense(), alone.to_dense())
    assert (m.together, m.nbytes, m.density) == (DOT_INPUTS, alone.nbytes, alone.density)
    assert np.array_equal(m.indices, alone.indices) and np.array_equal(m.indptr, alone.indptr)
    # Blocks that are moved back begin at a multiple of four, too.
    assert not (m.indices % DOT_INPUTS).any()
    fours = alone.values.reshape(-1, DOT_INPUTS, m.panel)
    assert np.array_equal(m.values.reshape(-1, m.panel, DOT_INPUTS), fours.transpose(0, 2, 1))


@PROPERTY
@given(PATTERNS, SHAPES, DENSITIES, SEEDS, st.sampled_from((Int8(), Int8(5))))
def test_sums(pattern: BlockPattern, shape: tuple[int, int], density: float, seed: int, kind: Int8) -> None:
    """Of each output's codes, in int32 though codes have 8 bits."""
    weight = random_weight(pattern, shape, density, seed)
    m = pattern.pack(weight, "float32", kind)
    assert m.sums.dtype == np.int32
    assert m.sums.shape == (shape[0],)
    assert np.array_equal(m.sums, kind.encode(weight, m.table).astype(np.int64).sum(axis=1))
    if shape[1] % DOT_INPUTS == 0 and pattern.cols % DOT_INPUTS == 0:
        assert np.array_equal(pattern.pack(weight, "float32", kind, together=DOT_INPUTS).sums, m.sums)


def test_sums_of_the_largest_codes() -> None:
    weight = np.full((3, 65_792), -128, dtype=np.float32)
    m = BlockPattern(4, 64).pack(weight, "float32", Int8(), np.ones((3, 1), np.float32), DOT_INPUTS)
    assert (m.sums == -128 * 65_792).all()
    assert np.array_equal(m.to_dense(), weight)


@pytest.mark.parametrize("text", ["fp32", "bf16", "codebook16", "codebook256"])
def test_only_integers_have_sums(text: str) -> None:
    m = BlockPattern(2, 2).pack(np.ones((4, 4), dtype=np.float32), "float32", parse_values(text))
    with pytest.raises(ValueError, match=f"^values of {text} have no sums of codes$"):
        _ = m.sums


@pytest.mark.parametrize(("cols", "inputs"), [(6, 12), (4, 10), (1, 8), (8, 6)])
def test_inputs_that_do_not_stand_together(cols: int, inputs: int) -> None:
    weight, cut = np.ones((4, inputs), dtype=np.float32), min(cols, inputs)
    with pytest.raises(ValueError, match=f"^blocks of {cut} of {inputs} inputs do not stand 4 together$"):
        BlockPattern(4, cols).pack(weight, "float32", Int8(), together=DOT_INPUTS)


@pytest.mark.parametrize(
    ("kind", "share"), [("fp32", 0.105), ("bf16", 0.055), ("int8", 0.03), ("int8:64", 0.045), ("codebook16", 0.016)]
)
def test_bytes_of_a_tenth_of_the_weights(kind: str, share: float) -> None:
    """90 % zeros in block:32x4: with int8 at most 4 % of the dense float32."""
    pattern, shape = BlockPattern(32, 4), (1024, 4096)
    rng = np.random.default_rng(0)
    mask = pattern.project(rng.random(shape), 0.1)
    weight = rng.standard_normal(shape).astype(np.float32) * mask
    for together in (1, DOT_INPUTS) if kind == "int8" else (1,):
        m = pattern.pack(weight, "float32", parse_values(kind), together=together)
        assert m.nbytes == sum(array.nbytes for array in (m.values, m.table, m.indices, m.indptr))
        assert m.nbytes <= share * 4 * weight.size


@settings(PROPERTY, max_examples=50)
@given(
    st.builds(BlockPattern, st.sampled_from([64, 128, 40]), st.integers(1, 20)),
    SHAPES,
    DENSITIES,
    SEEDS,
    KINDS,
)
def test_kinds_beside_activations_of_16_bits(
    pattern: BlockPattern, shape: tuple[int, int], density: float, seed: int, kind: Values
) -> None:
    weight = random_weight(pattern, shape, density, seed)
    m = pattern.pack(weight, "bfloat16", kind)
    assert np.array_equal(m.to_dense(), kind.round(weight, m.table))


@pytest.mark.parametrize("panel", [1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32])
def test_code_unit(panel: int) -> None:
    """Whole panels consist of whole units, but for those below a vector: these lie wherever the last one ended."""
    unit = code_unit(panel)
    assert unit in (2, 4, 8, 16)
    assert panel % unit == 0 or panel < 4

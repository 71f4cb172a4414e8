"""Thresholds are exact whatever the scores are, and a few passes find them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from jaxprune.arrays.topk import count_search, float_order, thresholds
from jaxprune.arrays.topk.count_search import Bracket, Count

SHAPES = [(3, 5), (256, 300), (), (7,), (0, 4), (300, 2, 100)]  # the sample has two
SIZE = sum(map(math.prod, SHAPES))
STRIDE = 67
SUBNORMAL = np.float32(2**-149)


# By normal numbers, their places and a generator.
SCORES = {
    "normal": lambda x, i, rng: x,
    "sorted": lambda x, i, rng: np.sort(x),
    "falling": lambda x, i, rng: np.sort(x)[::-1],
    "constant": lambda x, i, rng: np.full(SIZE, 2.5),
    "two values": lambda x, i, rng: np.where(rng.random(SIZE) < 0.6, 1.0, 2.0),
    "ties at the median": lambda x, i, rng: np.where(rng.random(SIZE) < 0.5, 0.0, x),
    "periodic": lambda x, i, rng: np.where(i % STRIDE == 0, 1e6, x),
    "shifted period": lambda x, i, rng: np.where((i - 15) % STRIDE == 0, -1e6, x),
    "column": lambda x, i, rng: (i % STRIDE) * 1.0,
    "wide": lambda x, i, rng: x * np.float32(10) ** rng.integers(-38, 38, SIZE),
    "subnormal": lambda x, i, rng: SUBNORMAL * rng.integers(-9, 9, SIZE),
    "zeros of both signs": lambda x, i, rng: np.where(
        rng.random(SIZE) < 0.5, -0.0, 0.0
    ),
    "infinite": lambda x, i, rng: rng.choice([np.inf, -np.inf, 0.0, 1.0], SIZE),
    "NaN": lambda x, i, rng: np.where(rng.random(SIZE) < 0.7, np.nan, x),
    "NaN of both signs": lambda x, i, rng: np.where(
        rng.random(SIZE) < 0.5, -np.float32(np.nan), np.float32(np.nan)
    ),
    "neighbours": lambda x, i, rng: np.float32(1) + i % 1000 * np.float32(2**-23),
}
KINDS = list(SCORES)


def scores_of(kind: str) -> np.ndarray:
    """SIZE float32 in one row, out to mislead a search."""
    rng = np.random.default_rng(len(kind))
    normal = rng.normal(size=SIZE).astype(np.float32)
    return SCORES[kind](normal, np.arange(SIZE), rng).astype(np.float32)


def leaves_of(row: np.ndarray, dtype) -> list[jax.Array]:
    ends = np.cumsum([math.prod(shape) for shape in SHAPES])[:-1]
    parts = zip(np.split(row.astype(dtype), ends), SHAPES, strict=True)
    return [jnp.asarray(part.reshape(shape)) for part, shape in parts]


def places(row: np.ndarray) -> np.ndarray:
    """Each score's place, NaN last, of equal ones the first, by NumPy's stable sort."""
    row = np.asarray(row, np.float64)
    order = np.lexsort((-np.where(np.isnan(row), 0, row), np.isnan(row)))
    found = np.empty(row.size, int)
    found[order] = np.arange(row.size)
    return found


def highest(row: np.ndarray, kept: int) -> np.ndarray:
    return places(row) < kept


def row_of(leaves) -> np.ndarray:
    arrays = [np.asarray(leaf) for leaf in leaves]
    return np.concatenate([a.astype(np.float64).ravel() for a in arrays])


mask_of = jax.jit(thresholds.above_cut)


def masks_of(leaves, cuts):
    return [mask_of(*pair) for pair in zip(leaves, cuts, strict=True)]


# These differ in where the scores lie, not in which there are.
PLACED = {"sorted", "falling", "periodic", "shifted period", "column"}


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (kind, dtype)
        for dtype in (jnp.float32, jnp.bfloat16, jnp.float16)
        for kind in KINDS
        if dtype is jnp.float32 or kind not in PLACED
    ],
)
def test_exactly_the_highest_of_any_scores_are_kept(kind, dtype):
    with np.errstate(over="ignore"):
        leaves = leaves_of(scores_of(kind), dtype)
    rank = places(row_of(leaves))
    for kept in (0, 1, SIZE // 3, SIZE // 2, SIZE - 1, SIZE):
        masks = masks_of(leaves, thresholds.cut_together(leaves, kept))
        np.testing.assert_array_equal(row_of(masks), rank < kept)


@pytest.fixture(scope="module")
def compiled():
    together = lambda x: masks_of(x, thresholds.cut_together(x, SIZE // 3))  # noqa: E731
    each = lambda x: masks_of(  # noqa: E731
        x, thresholds.cut_each(x, [leaf.size // 3 for leaf in x])
    )
    return jax.jit(together), jax.jit(each)


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_under_jit_too(kind, compiled):
    leaves = leaves_of(scores_of(kind), jnp.float32)
    together, each = compiled
    expected = highest(row_of(leaves), SIZE // 3)
    np.testing.assert_array_equal(row_of(together(leaves)), expected)
    own = [highest(row_of([leaf]), leaf.size // 3) for leaf in leaves]
    np.testing.assert_array_equal(row_of(each(leaves)), np.concatenate(own))
    eager = thresholds.cut_each(leaves, [leaf.size // 3 for leaf in leaves])
    np.testing.assert_array_equal(row_of(masks_of(leaves, eager)), np.concatenate(own))


@pytest.mark.full
@pytest.mark.parametrize(
    "kind",
    [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.full)],
)
def test_on_eight_devices_it_is_the_same(kind):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    where = NamedSharding(mesh, P("x", "y"))

    def make(scores):
        return jp.masks.make(scores, 0.6, allocation="global")

    jitted = jax.jit(make)
    for scores in ("two values", "normal", "wide"):
        row = scores_of(scores)[: 256 * 300].reshape(256, 300)
        tree = {"a": row, "b": row[:8]}
        both = np.append(row, row[:8])
        expected = highest(both, both.size - round(0.6 * both.size))
        spread = jax.device_put(tree, where)
        for masks in (make(spread), jitted(spread)):
            np.testing.assert_array_equal(row_of(masks.values()), expected)


@pytest.mark.full
def test_scores_that_are_constants_of_a_jitted_function_are_cut_when_it_is_traced():
    scores, ones = jnp.asarray(np.arange(6, dtype=np.float32)), np.ones(6, np.float32)
    for allocation in ("layer", "global"):
        prune = lambda p, a=allocation: jp.prune(p, {"w": scores}, 0.5, allocation=a)  # noqa: E731
        assert "while" not in str(jax.make_jaxpr(prune)({"w": ones}))
        pruned = jax.jit(prune)({"w": ones})
        assert pruned["w"].tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.full
def test_in_float64_neighbours_are_told_apart():
    with jax.enable_x64(True):
        row = 1.0 + np.arange(99)[::-1] * 2.0**-52
        leaves = [jnp.asarray(row)]
        assert leaves[0].dtype == np.float64
        for run in (lambda f, *x: f(*x), lambda f, *x: jax.jit(f)(*x)):
            masks = run(lambda x: masks_of(x, thresholds.cut_together(x, 40)), leaves)
            np.testing.assert_array_equal(row_of(masks), highest(row, 40))


@pytest.mark.full
def test_the_search_needs_less_than_a_tenth_of_the_scores_memory():
    leaves = [jax.ShapeDtypeStruct((512, 1000), jnp.float32)] * 4
    for cut in (
        lambda x: thresholds.cut_together(x, 999_999),
        lambda x: thresholds.cut_each(x, [99_999] * 4),
    ):
        memory = jax.jit(cut).lower(leaves).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 4 * 512 * 1000 * 4 / 10


@given(
    points=st.lists(
        st.one_of(
            st.integers(0, 2**32 - 3),
            st.integers(2**31, 2**31 + 99),
            st.integers(0, 31).map(lambda n: 2**n),
        ),
        min_size=1,
        max_size=60,
    ),
    share=st.floats(0, 1),
)
@settings(max_examples=60)
def test_eleven_passes_find_any_of_the_32_bit_positions(points, share):
    kept, top = max(round(share * len(points)), 1), 2**32 - 2
    target = Count.of([kept])
    ends = np.uint32([[0], [top], [len(points)], [0]])
    bracket, passes = Bracket(*map(jnp.asarray, ends)), 0
    while bracket.unsettled(target, joint=True)[0]:
        places = count_search.candidates(bracket)
        assert (np.diff(np.asarray(places[0]).astype(np.int64)) >= 0).all()
        counts = [[sum(p >= int(place) for p in points) for place in places[0]]]
        bracket = count_search.narrowed(
            bracket, places, jnp.asarray(counts, np.uint32), target, joint=True
        )
        passes += 1
    low, high = int(bracket.low[0]), int(bracket.high[0])
    count = lambda position: sum(p >= position for p in points)  # noqa: E731
    assert count(low) == int(bracket.at[0]) >= kept
    assert count(high + 1) == int(bracket.above[0]) < kept
    assert low == high or count(low) == kept
    assert passes <= 11


@given(
    st.lists(
        st.one_of(st.just(2**32 - 1), st.integers(0, 3), st.integers(0, 2**32 - 1)),
        min_size=1,
        max_size=9,
    ),
    st.integers(0, 2**36),
    st.integers(0, 2**32 - 1),
)
def test_counts_are_python_integers(counts, other, small):
    of_nine = np.array(counts + [0] * (9 - len(counts)), np.uint32)  # of one shape
    total = count_search.totals(jnp.asarray(of_nine), joint=True)
    value = lambda count: (int(count.high[0]) << 32) + int(count.low[0])  # noqa: E731
    assert value(total) == sum(counts)
    given_ = Count.of([other])
    assert value(given_) == other
    assert bool(total.at_least(given_)[0]) == (sum(counts) >= other)
    assert int(given_.at_most(jnp.uint32([small]))[0]) == min(other, small)
    high, low = (total, given_) if sum(counts) >= other else (given_, total)
    assert value(high.minus(low)) == abs(sum(counts) - other)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=10)
def test_ranks_have_the_order_of_the_floats(dtype, seed):
    width = jnp.finfo(dtype).bits
    pattern = np.random.default_rng(seed).integers(0, 2**width, 400, np.uint64)
    values = pattern.astype(f"uint{width}").view(dtype)
    values[:4] = [0.0, -0.0, np.inf, -np.inf]
    own = np.asarray(float_order.of(jnp.asarray(values), np.dtype(f"int{width}")))
    with np.errstate(invalid="ignore"):  # a NaN may be a signalling one
        exact = values.astype(np.float64)
    nan = np.isnan(exact)
    assert (own[nan] == np.iinfo(own.dtype).min).all()
    assert (own[~nan] > np.iinfo(own.dtype).min).all()
    own, exact = own[~nan], exact[~nan]
    for compare in (np.greater, np.equal):
        np.testing.assert_array_equal(
            compare(own[:, None], own), compare(exact[:, None], exact)
        )

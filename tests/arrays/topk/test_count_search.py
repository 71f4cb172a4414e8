"""Thresholds are exact whatever the scores are; what is guessed costs passes only."""

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
from jaxprune.arrays.topk import count_search, float_order, sampling, thresholds
from jaxprune.arrays.topk.count_search import Bracket, Count, Order

SHAPES = [(3, 5), (256, 300), (), (7,), (0, 4), (300, 2, 100)]  # the sample has two
SIZE = sum(map(math.prod, SHAPES))
STRIDE = sampling._STRIDE
SUBNORMAL = np.float32(2**-149)


def scores_of(kind: str) -> np.ndarray:
    """SIZE float32 in one row, out to mislead a strided sample."""
    rng = np.random.default_rng(len(kind))
    normal = rng.normal(size=SIZE).astype(np.float32)
    place = np.arange(SIZE)
    return {
        "normal": lambda: normal,
        "sorted": lambda: np.sort(normal),
        "falling": lambda: np.sort(normal)[::-1],
        "constant": lambda: np.full(SIZE, 2.5),
        "two values": lambda: np.where(rng.random(SIZE) < 0.6, 1.0, 2.0),
        "ties at the median": lambda: np.where(rng.random(SIZE) < 0.5, 0.0, normal),
        "periodic": lambda: np.where(place % STRIDE == 0, 1e6, normal),
        "shifted period": lambda: np.where((place - 15) % STRIDE == 0, -1e6, normal),
        "column": lambda: (place % STRIDE) * 1.0,
        "wide": lambda: normal * np.float32(10) ** rng.integers(-38, 38, SIZE),
        "subnormal": lambda: SUBNORMAL * rng.integers(-9, 9, SIZE),
        "zeros of both signs": lambda: np.where(rng.random(SIZE) < 0.5, -0.0, 0.0),
        "infinite": lambda: rng.choice([np.inf, -np.inf, 0.0, 1.0], SIZE),
        "NaN": lambda: np.where(rng.random(SIZE) < 0.7, np.nan, normal),
        "NaN of both signs": lambda: np.where(
            rng.random(SIZE) < 0.5, -np.float32(np.nan), np.float32(np.nan)
        ),
        "neighbours": lambda: np.float32(1) + place % 1000 * np.float32(2**-23),
    }[kind]().astype(np.float32)


KINDS = [
    "normal",
    "sorted",
    "falling",
    "constant",
    "two values",
    "ties at the median",
    "periodic",
    "shifted period",
    "column",
    "wide",
    "subnormal",
    "zeros of both signs",
    "infinite",
    "NaN",
    "NaN of both signs",
    "neighbours",
]


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


SOME = [
    pytest.param(kind, marks=() if number % 2 else pytest.mark.full)
    for number, kind in enumerate(KINDS)
]
# What differs in where the scores lie, not in which there are.
PLACED = {"sorted", "falling", "periodic", "shifted period", "column"}


@pytest.mark.full
@pytest.mark.parametrize("kind", SOME)
def test_of_any_scores_exactly_the_highest_are_kept(kind):
    assert_the_highest_are_kept(kind, jnp.float32)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in PLACED])
def test_of_narrow_scores_too(kind, dtype):
    assert_the_highest_are_kept(kind, dtype)


def assert_the_highest_are_kept(kind, dtype):
    with np.errstate(over="ignore"):
        leaves = leaves_of(scores_of(kind), dtype)
    found = places(row_of(leaves))
    for kept in (0, 1, SIZE // 3, SIZE // 2, SIZE - 1, SIZE):
        masks = masks_of(leaves, thresholds.cut_together(leaves, kept))
        np.testing.assert_array_equal(row_of(masks), found < kept)


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
@given(ends=st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)))
@settings(max_examples=15)
def test_a_wrong_guess_changes_nothing(ends):
    row = scores_of("normal")
    leaves = leaves_of(row, jnp.float32)
    with pytest.MonkeyPatch.context() as patch:
        guess = jnp.asarray(np.array(ends, np.uint32)[:, None])
        patch.setattr(sampling, "guess", lambda *_, **__: guess)
        masks = masks_of(leaves, thresholds.cut_together(leaves, SIZE // 3))
    np.testing.assert_array_equal(row_of(masks), highest(row, SIZE // 3))


@pytest.mark.parametrize("joint", [pytest.param(True, marks=pytest.mark.full), False])
def test_the_gap_under_what_is_not_pruned_is_no_part_of_a_guess(joint):
    """What is pruned ranks at minus infinity, and an event prunes a little more."""
    pruned, live, more = 70_000, 80_000, 1_000
    rest = np.random.default_rng(0).uniform(1, 2, live).astype(np.float32)
    scores = jnp.asarray(np.append(np.full(pruned, -np.inf, np.float32), rest))
    line, kept = float_order.Line.of(np.float32), count_search.Count.of([live - more])
    low, high = sampling.guess([scores], kept, line, joint=joint)
    ranks = np.asarray(line.rank(jnp.asarray(np.stack([low, high]))))
    low, high = ranks.view(np.float32).ravel()
    assert 1 <= low <= np.sort(rest)[more] <= high <= 2


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


def searched(points, kept, top=2**32 - 2):
    """A search over points in the row of positions, and how many passes it took."""
    points = np.asarray(points, np.uint64)
    passes = []

    def counts(candidates, wanted):
        if wanted[0]:
            passes.append(np.asarray(candidates[0]))
        above = points[None] >= np.asarray(candidates[0], np.uint64)[:, None]
        return [jnp.asarray(above.sum(1), np.uint32)[None]]

    ends = (np.uint32([0]), np.uint32([top]), np.uint32([points.size]), np.uint32([0]))
    order = Order(counts, joint=True, smooth=np.uint32(1 << 23))
    start, target = Bracket(*map(jnp.asarray, ends)), Count.of([kept])
    return count_search.search(order, target, start, traced=False), passes


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
def test_the_bracket_is_right_after_a_few_passes(points, share):
    kept = max(round(share * len(points)), 1)
    found, passes = searched(points, kept)
    low, high = int(found.low[0]), int(found.high[0])
    count = lambda position: sum(p >= position for p in points)  # noqa: E731
    assert count(low) == int(found.at[0]) >= kept
    assert count(high + 1) == int(found.above[0]) < kept
    assert low == high or count(low) == kept
    assert len(passes) <= 22  # each two passes leave an eighth, of 2^32
    for candidates in passes:
        assert (np.diff(candidates.astype(np.int64)) >= 0).all()


@pytest.mark.parametrize("crowd", [1000, 1_000_000])
def test_interpolation_that_is_led_astray_gives_way(crowd):
    others = 2**31 + 1000 + np.arange(99)  # a line through the crowd ends far above
    found, passes = searched([*np.full(crowd, 2**31), *others], 50)
    assert int(found.at[0]) == 50
    assert len(passes) <= 20  # by interpolation alone it would be thousands


def test_where_scores_fall_evenly_four_passes_are_enough():
    points = np.random.default_rng(0).integers(2**31, 2**31 + 2**23, 100_000)
    found, passes = searched(points, 37_000)
    assert int(found.at[0]) == 37_000
    even = 9 / np.log2(
        count_search.CANDIDATES + 1
    )  # of an even grid, down to 2^23 places
    assert len(passes) <= even + 4


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
    np.testing.assert_allclose(float(given_.real()[0]), other, rtol=1e-6)


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

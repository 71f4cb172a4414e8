"""The kept set is the oracle's: exact counts, ties by (leaf, flat index)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxprune as jp
from tests.support import oracles
from tests.support.trajectories import array

SHAPES = [(), (0,), (1,), (7,), (3, 5), (0, 4), (2, 3, 4)]  # few, for few compilations
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
KINDS = [
    *((shape, jnp.float32) for shape in SHAPES),
    *((shape, jnp.bfloat16) for shape in [(), (3, 5)]),
    *((shape, jnp.float16) for shape in [(0,), (3, 5)]),
]
SPARSITIES = [0.0, 1e-9, 0.3, 0.5, 0.6, 0.9, 0.999, 1 - 2**-53]
VALUES = [0.0, -0.0, 1.0, -1.0, 2.0, 0.5, 1e-4, 3e4, np.inf, -np.inf]

leaf = st.builds(
    lambda kind, seed, values: make_leaf(*kind, seed, values),
    st.sampled_from(KINDS),
    st.integers(0, 2**16),
    st.sampled_from(["normal", "ties", "constant", "wide"]),
)


def make_leaf(shape, dtype, seed, kind):
    rng = np.random.default_rng(seed)
    if kind == "ties":
        values = rng.choice(VALUES, size=shape)
    elif kind == "constant":
        values = np.full(shape, rng.choice(VALUES))
    elif kind == "wide":
        values = rng.normal(size=shape) * 10.0 ** rng.integers(-4, 5, shape)
    else:
        values = rng.normal(size=shape)
    values = np.clip(values, -6e4, 6e4) if kind == "wide" else values
    return jnp.asarray(np.asarray(values, np.float32).astype(dtype))


def trees(leaves):
    return {f"{i:02d}": {"kernel": x} for i, x in enumerate(leaves)}


def flat(masks):
    return [np.asarray(m) for m in jax.tree.leaves(masks)]


def assert_same(masks, expected):
    actual = flat(masks)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == bool
        np.testing.assert_array_equal(a, e)


@pytest.mark.full
@pytest.mark.parametrize("allocation", ["layer", "global"])
@given(
    leaves=st.lists(leaf, min_size=1, max_size=3), sparsity=st.sampled_from(SPARSITIES)
)
def test_any_leaves_keep_what_the_oracle_keeps(allocation, leaves, sparsity):
    keep = oracles.keep_layer if allocation == "layer" else oracles.keep_global
    expected = keep([array(x) for x in leaves], sparsity)
    masks = jp.masks.make(trees(leaves), sparsity, allocation=allocation)
    assert_same(masks, expected)


FIXED = trees([make_leaf((3, 5), d, 1, "ties") for d in DTYPES])


@pytest.mark.parametrize("allocation", ["layer", "global"])
@given(sparsity=st.floats(0, 1, exclude_max=True, allow_subnormal=False))
def test_count_removed_is_the_nearest_integer(allocation, sparsity):
    masks = jp.masks.make(FIXED, sparsity, allocation=allocation)
    kept = [int(m.sum()) for m in flat(masks)]
    if allocation == "layer":
        assert kept == [15 - oracles.removed_count(sparsity, 15)] * 3
    else:
        assert sum(kept) == 45 - oracles.removed_count(sparsity, 45)


@pytest.mark.parametrize(
    ("allocation", "sparsity"),
    [
        ("layer", 0.4),
        ("global", 0.4),
        pytest.param("layer", 0.97, marks=pytest.mark.full),
        pytest.param("global", 0.0, marks=pytest.mark.full),
    ],
)
def test_under_jit_it_is_the_same(allocation, sparsity):
    rng = np.random.default_rng(3)
    scores = trees([make_leaf((3, 5), d, rng.integers(99), "ties") for d in DTYPES])
    eager = jp.masks.make(scores, sparsity, allocation=allocation)
    jitted = jax.jit(lambda s: jp.masks.make(s, sparsity, allocation=allocation))(
        scores
    )
    assert_same(jitted, flat(eager))


@pytest.mark.parametrize("allocation", ["layer", "global"])
def test_ties_are_broken_by_position(allocation):
    scores = {"a": np.ones((2, 3), np.float32), "b": np.ones((3, 2), np.float32)}
    masks = jp.masks.make(scores, 0.5, allocation=allocation)
    expected = {"layer": [[1, 1, 1, 0, 0, 0]] * 2, "global": [[1] * 6, [0] * 6]}[
        allocation
    ]
    np.testing.assert_array_equal([m.ravel() for m in flat(masks)], expected)


@pytest.mark.parametrize(
    "dtype",
    [DTYPES[0], *(pytest.param(d, marks=pytest.mark.full) for d in DTYPES[1:])],
)
def test_nan_ranks_lowest_under_jit(dtype):
    scores = np.array([np.nan, -np.inf, 1.0, np.nan, -5.0, np.inf], dtype)
    negative = np.array([-np.nan, 1.0, np.copysign(np.nan, -1), -np.inf, 2, 3], dtype)
    expected = {
        "1": [1, 1, 1, 0, 1, 1],
        "2": [0, 1, 1, 0, 1, 1],
        "3": [0, 0, 1, 0, 1, 1],
        "5": [0, 0, 0, 0, 0, 1],
        "negative": [0, 1, 0, 1, 1, 1],
    }
    shares = {"negative": 2 / 6} | {k: int(k) / 6 for k in "1235"}
    leaves = dict.fromkeys("1235", scores) | {"negative": negative}
    masks = jax.jit(lambda s: jp.masks.make(s, shares))(leaves)
    for name, kept in expected.items():
        np.testing.assert_array_equal(masks[name], np.array(kept, bool), name)


@pytest.mark.parametrize("allocation", ["layer", "global"])
def test_nan_is_refused_by_name_where_something_can_be_raised(allocation):
    bad = np.array([1.0, np.nan], np.float32)
    scores = {"fine": np.ones((2, 2), np.float32), "h": [{"bad": bad}]}
    with pytest.raises(ValueError, match="h/0/bad"):
        jp.masks.make(scores, 0.5, allocation=allocation)


def test_all_bad_leaves_are_named_at_once():
    bad = np.array([1.0, np.nan], np.float32)
    scores = {name: bad for name in ("first", "second")}
    with pytest.raises(ValueError, match=r"(?s)first.*second"):
        jp.masks.make(scores, 0.5)


def test_masked_nodes_stay_where_they_are():
    scores = {"a": np.arange(4, dtype=np.float32), "b": optax.MaskedNode()}
    for allocation in ("layer", "global"):
        masks = jp.masks.make(scores, 0.5, allocation=allocation)
        assert isinstance(masks["b"], optax.MaskedNode)


def primitives(jaxpr):
    """(name, largest result's size) of every equation, inner ones too."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name, max((v.aval.size for v in eqn.outvars), default=0)
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from primitives(inner)


@pytest.mark.parametrize("allocation", ["layer", "global"])
def test_selection_neither_sorts_a_leaf_nor_joins_leaves(allocation):
    scores = dict.fromkeys("abc", np.ones((40, 50), np.float32))
    traced = jax.make_jaxpr(lambda s: jp.masks.make(s, 0.6, allocation=allocation))(
        scores
    )
    found = list(primitives(traced.jaxpr))
    assert any(size >= 2000 for _, size in found)  # the walk reaches the arrays
    large = {name for name, size in found if size >= 2000}
    assert not large & {"sort", "top_k", "concatenate", "approx_top_k"}


def test_works_under_vmap():
    rng = np.random.default_rng(5)
    stacked = rng.normal(size=(3, 4, 5)).astype(np.float32)
    make = lambda s: jp.masks.make({"a": s}, 0.6)["a"]  # noqa: E731
    masks = jax.jit(jax.vmap(make))(stacked)
    for mask, values in zip(np.asarray(masks), stacked, strict=True):
        np.testing.assert_array_equal(mask, oracles.keep_top(values, 12))

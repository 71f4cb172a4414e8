"""Patterns: n of each m inputs, whole tiles, whole channels; exact and by position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxprune as jp
from tests.support import oracles
from tests.support.trajectories import array, same_bits


def mask_of(scores, pattern, sparsity=None, **options):
    masks = jp.masks.make(
        {"k": jnp.asarray(scores)}, sparsity, pattern=pattern, **options
    )
    return np.asarray(masks["k"])


def scores_of(shape, seed, ties=True):
    values = np.random.default_rng(seed).normal(size=shape)
    return (np.round(values, 0) if ties else values).astype(np.float32)


@given(
    case=st.sampled_from(
        [
            *(((n, m), jnp.float32) for n, m in [(1, 2), (2, 4), (5, 12)]),
            ((2, 3), jnp.bfloat16),
            ((3, 4), jnp.float16),
        ]
    ),
    seed=st.integers(0, 1000),
)
def test_nm_keeps_the_best_of_each_group_of_inputs(case, seed):
    nm, dtype = case
    scores = jnp.asarray(scores_of((12, 5), seed), dtype)
    expected = oracles.keep_nm(array(scores), *nm)
    np.testing.assert_array_equal(mask_of(scores, jp.patterns.NM(*nm)), expected)


def test_nm_keeps_the_first_of_ties_along_the_input():
    mask = mask_of(np.ones((8, 3), np.float32), jp.patterns.NM(2, 4))
    expected = np.tile(np.array([True, True, False, False] * 2)[:, None], 3)
    np.testing.assert_array_equal(mask, expected)


def test_nm_ranks_nan_lowest_and_orders_infinities():
    column = np.array([np.nan, -np.inf, np.inf, np.nan], np.float32)[:, None]
    pattern = jp.patterns.NM(2, 4)
    mask = jax.jit(lambda s: jp.masks.make({"k": s}, pattern=pattern)["k"])(column)
    np.testing.assert_array_equal(np.asarray(mask)[:, 0], [False, True, True, False])


def test_nm_follows_the_input_axis_of_stacked_matrices():
    scores = scores_of((3, 8, 5), 1)
    mask = mask_of(scores, jp.patterns.NM(2, 4))
    for got, matrix in zip(mask, scores, strict=True):
        np.testing.assert_array_equal(got, oracles.keep_nm(matrix, 2, 4))


def test_nm_follows_axes_that_are_given():
    scores = scores_of((5, 8), 1)  # as torch stores it: (out, in)
    axes = jp.Axes(inputs=(-1,), outputs=(-2,))
    mask = mask_of(scores, jp.patterns.NM(2, 4), axes=axes)
    np.testing.assert_array_equal(mask, oracles.keep_nm(scores.T, 2, 4).T)


def test_nm_fixes_the_sparsity():
    pattern = jp.patterns.NM(1, 4)
    scores = scores_of((8, 4), 2)
    stated = mask_of(scores, pattern, 0.75)
    np.testing.assert_array_equal(stated, mask_of(scores, pattern))
    assert stated.sum() == 8


@pytest.mark.parametrize("sparsity", [0.5, 0.6, 0.0])
def test_nm_refuses_a_sparsity_that_disagrees(sparsity):
    scores = {"k": jnp.ones((8, 4))}
    with pytest.raises(ValueError, match=r"0\.75"):
        jp.masks.make(scores, sparsity, pattern=jp.patterns.NM(1, 4))
    with pytest.raises(ValueError, match=r"0\.75"):
        jp.prune(scores, scores, sparsity, pattern=jp.patterns.NM(1, 4))


def test_nm_refuses_an_input_that_it_does_not_divide_naming_all():
    scores = {"a": jnp.ones((6, 4)), "b": jnp.ones((8, 4)), "c": jnp.ones((10, 4))}
    with pytest.raises(ValueError, match=r"NM\(2, 4\)") as raised:
        jp.masks.make(scores, pattern=jp.patterns.NM(2, 4))
    assert all(part in str(raised.value) for part in ("'a'", "6", "'c'", "10"))
    assert "'b'" not in str(raised.value)


@pytest.mark.parametrize("nm", [(0, 4), (4, 4), (5, 4), (-1, 4), (0, 0)])
def test_nm_refuses_impossible_groups(nm):
    with pytest.raises(ValueError, match=r"n.*m"):
        jp.patterns.NM(*nm)


@given(
    block=st.sampled_from([(1, 1), (2, 3), (8, 6), (1, 6)]),
    sparsity=st.sampled_from([0.0, 0.25, 0.5, 0.8, 0.99]),
    seed=st.integers(0, 1000),
)
def test_block_removes_the_lowest_tiles(block, sparsity, seed):
    scores = scores_of((8, 6), seed, ties=False)
    mask = mask_of(scores, jp.patterns.Block(*block), sparsity)
    expected = oracles.keep_blocks(scores, *block, sparsity)
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("shape", [(7, 5), (1, 1), (9, 4), (2, 7, 5)])
@pytest.mark.parametrize(
    "block", [(2, 3), pytest.param((4, 4), marks=pytest.mark.full), (16, 16)]
)
def test_block_of_odd_sizes_has_whole_tiles_and_ragged_edges(shape, block):
    scores = scores_of(shape, 3, ties=False)
    mask = mask_of(scores, jp.patterns.Block(*block), 0.5)
    assert mask.shape == shape
    rows, columns = block
    tiles = [
        matrix[r : r + rows, c : c + columns]
        for matrix in mask.reshape(-1, *shape[-2:])
        for r in range(0, shape[-2], rows)
        for c in range(0, shape[-1], columns)
    ]
    assert all(tile.all() or not tile.any() for tile in tiles)
    removed = sum(not tile.any() for tile in tiles)
    assert removed == oracles.removed_count(0.5, len(tiles))


def test_block_of_a_ragged_edge_is_judged_by_its_own_weights_alone():
    scores = np.ones((5, 4), np.float32)
    scores[4] = 2.0  # the edge tiles hold the best weights, though only one row of them
    mask = mask_of(scores, jp.patterns.Block(2, 2), 4 / 6)
    np.testing.assert_array_equal(mask.any(1), [False, False, False, False, True])


def test_block_follows_the_order_of_its_sides():
    scores = np.ones((4, 6), np.float32)
    scores[2:, 3:] = 0.0
    mask = mask_of(scores, jp.patterns.Block(rows=2, columns=3), 0.25)
    np.testing.assert_array_equal(mask, scores > 0)


def test_block_ties_keep_the_first_tiles():
    mask = mask_of(np.ones((4, 4), np.float32), jp.patterns.Block(2, 2), 0.5)
    np.testing.assert_array_equal(mask.any(1), [True, True, False, False])


@pytest.mark.parametrize("sides", [(0, 2), (2, -1)])
def test_block_refuses_empty_tiles(sides):
    with pytest.raises(ValueError, match="1"):
        jp.patterns.Block(*sides)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
def test_channel_removes_whole_outputs(sparsity):
    scores = scores_of((5, 9), 4, ties=False)
    mask = mask_of(scores, jp.patterns.Channel(), sparsity)
    np.testing.assert_array_equal(mask, oracles.keep_channels(scores, sparsity))


def test_channel_keeps_the_first_of_ties():
    mask = mask_of(np.ones((3, 4), np.float32), jp.patterns.Channel(), 0.5)
    np.testing.assert_array_equal(mask[0], [True, True, False, False])
    assert (mask == mask[:1]).all()


def test_global_channels_are_ranked_together_by_their_mean():
    scores = {"a": jnp.full((2, 4), 1.0), "b": jnp.full((8, 4), 0.5)}
    pattern = jp.patterns.Channel()
    masks = jp.masks.make(scores, 0.5, pattern=pattern, allocation="global")
    assert np.asarray(masks["a"]).all()
    assert not np.asarray(masks["b"]).any()


ALL = [
    jp.patterns.Unstructured(),
    jp.patterns.PerOutput(),
    jp.patterns.NM(2, 4),
    jp.patterns.Block(3, 2),
    jp.patterns.Channel(),
]


# The other two under jit: test_masks, and the channels' sums in the full suite.
JITTED = [
    pytest.param(pattern, marks=[pytest.mark.full] * (i in (0, 4)))
    for i, pattern in enumerate(ALL)
]


@pytest.mark.parametrize("pattern", JITTED, ids=str)
def test_under_jit_each_pattern_is_the_same(pattern):
    params = {"k": jnp.asarray(scores_of((8, 5), 6))}  # with ties
    prune = lambda p, s: jp.prune(p, s, 0.5, pattern=pattern)  # noqa: E731
    assert same_bits(jax.jit(prune)(params, params), prune(params, params))


@pytest.mark.parametrize("pattern", ALL, ids=str)
def test_masks_of_each_pattern_can_be_packed(pattern):
    masks = jp.masks.make(
        {"k": jnp.asarray(scores_of((8, 5), 6))}, 0.5, pattern=pattern
    )
    assert same_bits(jp.masks.unpack(jp.masks.pack(masks)), masks)


@pytest.mark.parametrize("pattern", ALL[1:], ids=str)
def test_a_vector_has_no_pattern_and_is_refused_by_name(pattern):
    with pytest.raises(ValueError, match="gain"):
        jp.masks.make({"gain": jnp.ones((8,))}, 0.5, pattern=pattern)


@pytest.mark.parametrize("pattern", ALL[1:], ids=str)
def test_an_empty_matrix_keeps_its_shape(pattern):
    assert mask_of(np.zeros((0, 4), np.float32), pattern, 0.5).shape == (0, 4)


@given(
    sparsity=st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.77, 0.95]),
    seed=st.integers(0, 1000),
    ties=st.booleans(),
)
def test_per_output_each_output_ranks_its_own_inputs(sparsity, seed, ties):
    scores = scores_of((12, 5), seed, ties)
    mask = mask_of(scores, jp.patterns.PerOutput(), sparsity)
    removed = oracles.removed_count(sparsity, scores.size)
    assert (~mask).sum() == removed
    for i, column in enumerate(scores.T):  # the first outputs take the remainder
        own = removed // 5 + (i < removed % 5)
        np.testing.assert_array_equal(mask[:, i], oracles.keep_top(column, own))


def test_per_output_follows_axes_and_stacks():
    pattern, scores = jp.patterns.PerOutput(), scores_of((3, 8, 5), 1)
    mask = mask_of(scores, pattern, 0.25)
    assert (mask.sum(1) == 6).all()
    torch = jp.Axes(inputs=(-1,), outputs=(-2,))
    turned = mask_of(scores.swapaxes(1, 2), pattern, 0.25, axes=torch)
    np.testing.assert_array_equal(turned.swapaxes(1, 2), mask)


def test_per_output_takes_the_same_share_of_leaves_of_any_size_in_one_ranking():
    scores = {"a": jnp.ones((4, 6)), "b": jnp.asarray(scores_of((16, 3), 2))}
    masks = jp.masks.make(
        scores, 0.5, pattern=jp.patterns.PerOutput(), allocation="global"
    )
    assert (np.asarray(masks["a"]).sum(0) == 2).all()
    assert (np.asarray(masks["b"]).sum(0) == 8).all()


def test_per_output_ranks_nan_lowest():
    column = np.array([np.nan, -np.inf, 0.0, -0.0], np.float32)[:, None]
    pattern = jp.patterns.PerOutput()
    mask = jax.jit(lambda s: jp.masks.make({"k": s}, 0.5, pattern=pattern)["k"])(column)
    np.testing.assert_array_equal(np.asarray(mask)[:, 0], [False, False, True, True])


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("unstructured", jp.patterns.Unstructured()),
        ("per-layer", jp.patterns.Unstructured()),
        ("per-output", jp.patterns.PerOutput()),
        ("channel", jp.patterns.Channel()),
        ("2:4", jp.patterns.NM(2, 4)),
        ("1:16", jp.patterns.NM(1, 16)),
        ("4x2", jp.patterns.Block(4, 2)),
    ],
)
def test_a_pattern_may_be_given_by_its_name(name, pattern):
    assert jp.patterns.named(name) == pattern == jp.patterns.named(pattern)
    scores = {"w": jax.random.normal(jax.random.key(0), (16, 8))}
    sparsity = pattern.sparsity or 0.5
    masks = jp.masks.make(scores, sparsity, pattern=name)
    expected = jp.masks.make(scores, sparsity, pattern=pattern)
    np.testing.assert_array_equal(np.asarray(masks["w"]), np.asarray(expected["w"]))
    pruned = jp.prune(scores, scores, sparsity, pattern=name)
    np.testing.assert_array_equal(np.asarray(pruned["w"]) != 0, expected["w"])


@pytest.mark.parametrize("bad", ["2/4", "blocks", "2:4:8", "", "-1:4"])
def test_an_unknown_pattern_names_the_choices(bad):
    with pytest.raises(ValueError, match="unstructured, per-layer, per-output, chan"):
        jp.masks.make({"w": jnp.ones((4, 4))}, 0.5, pattern=bad)


@pytest.mark.parametrize("bad", [jp.patterns.NM, None, 4])
def test_what_is_no_pattern_is_refused_with_the_choices(bad):
    with pytest.raises(TypeError, match=r"such as jp\.patterns\.NM\(2, 4\)"):
        jp.prune({"w": jnp.ones((4, 4))}, {"w": jnp.ones((4, 4))}, 0.5, pattern=bad)


@pytest.mark.parametrize(("n", "m"), [(33, 65), (2049, 2050), (2090, 2100)])
def test_nm_counts_groups_that_float16_cannot(n, m):
    scores = np.random.default_rng(0).normal(size=(2 * m, 1)).astype(np.float32)
    mask = jp.masks.make({"k": jnp.asarray(scores)}, pattern=jp.patterns.NM(n, m))["k"]
    np.testing.assert_array_equal(mask, oracles.keep_nm(scores, n, m))

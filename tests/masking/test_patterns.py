"""Patterns: n of each m inputs, whole tiles, whole channels; exact and by position."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxprune as jp
from tests.support import oracles
from tests.support.compilations import compiled
from tests.support.trajectories import array, same_bits

SHAPE = (12, 6)  # where the shape does not matter: compiled once a pattern
ONES = np.ones(SHAPE, np.float32)


def mask_of(scores, pattern, sparsity=None, **options):
    masks = jp.masks.make(
        {"k": jnp.asarray(scores)}, sparsity, pattern=pattern, **options
    )
    return np.asarray(masks["k"])


def scores_of(shape, seed, ties=True):
    values = np.random.default_rng(seed).normal(size=shape)
    return (np.round(values, 0) if ties else values).astype(np.float32)


@functools.partial(jax.jit, static_argnums=2)
def pruned_under_jit(params, scores, pattern):
    return jp.prune({"k": params}, {"k": scores}, 0.5, pattern=pattern)["k"]


@given(
    case=st.sampled_from(
        [
            ((2, 4), jnp.float32),
            ((5, 12), jnp.float32),
            ((1, 2), jnp.bfloat16),
            ((2, 3), jnp.float16),
        ]
    ),
    seed=st.integers(0, 1000),
)
def test_nm_keeps_the_best_of_each_group_of_inputs(case, seed):
    nm, dtype = case
    scores = jnp.asarray(scores_of(SHAPE, seed).astype(dtype))
    expected = oracles.keep_nm(array(scores), *nm)
    np.testing.assert_array_equal(mask_of(scores, jp.patterns.NM(*nm)), expected)


def test_nm_keeps_the_first_of_ties_along_the_input():
    mask = mask_of(ONES, jp.patterns.NM(2, 4))
    expected = np.tile(np.array([True, True, False, False] * 3)[:, None], 6)
    np.testing.assert_array_equal(mask, expected)


def test_nm_ranks_nan_lowest_and_orders_infinities():
    column = np.tile(np.array([np.nan, -np.inf, np.inf, np.nan], np.float32), 3)
    pruned = pruned_under_jit(ONES, ONES * column[:, None], jp.patterns.NM(2, 4))
    np.testing.assert_array_equal(pruned[:, 0], [0, 1, 1, 0] * 3)


def test_nm_follows_the_input_axis_of_stacked_matrices():
    scores = scores_of((3, *SHAPE), 1)
    mask = mask_of(scores, jp.patterns.NM(2, 4))
    for got, matrix in zip(mask, scores, strict=True):
        np.testing.assert_array_equal(got, oracles.keep_nm(matrix, 2, 4))


def test_nm_follows_axes_that_are_given():
    scores = scores_of(SHAPE[::-1], 1)  # as torch stores it: (out, in)
    axes = jp.Axes(inputs=(-1,), outputs=(-2,))
    mask = mask_of(scores, jp.patterns.NM(2, 4), axes=axes)
    np.testing.assert_array_equal(mask, oracles.keep_nm(scores.T, 2, 4).T)


def test_nm_fixes_the_sparsity():
    pattern = jp.patterns.NM(1, 4)
    scores = scores_of(SHAPE, 2)
    stated = mask_of(scores, pattern, 0.75)
    np.testing.assert_array_equal(stated, mask_of(scores, pattern))
    assert stated.sum() == 18


@pytest.mark.parametrize("sparsity", [0.5, 0.6, 0.0])
def test_nm_refuses_a_sparsity_that_disagrees(sparsity):
    scores = {"k": jnp.asarray(ONES)}
    with pytest.raises(ValueError, match=r"0\.75"):
        jp.masks.make(scores, sparsity, pattern=jp.patterns.NM(1, 4))
    with pytest.raises(ValueError, match=r"0\.75"):
        jp.prune(scores, scores, sparsity, pattern=jp.patterns.NM(1, 4))


def test_nm_refuses_an_input_that_it_does_not_divide_naming_all():
    sizes = {"a": 6, "b": 8, "c": 10}
    scores = {name: np.ones((size, 4), np.float32) for name, size in sizes.items()}
    with pytest.raises(ValueError, match=r"NM\(2, 4\)") as raised:
        jp.masks.make(scores, pattern=jp.patterns.NM(2, 4))
    assert all(part in str(raised.value) for part in ("'a'", "6", "'c'", "10"))
    assert "'b'" not in str(raised.value)


@pytest.mark.parametrize("nm", [(0, 4), (4, 4), (5, 4), (-1, 4), (0, 0)])
def test_nm_refuses_impossible_groups(nm):
    with pytest.raises(ValueError, match=r"n.*m"):
        jp.patterns.NM(*nm)


@given(
    block=st.sampled_from([(1, 1), (2, 3), SHAPE]),
    sparsity=st.sampled_from([0.0, 0.25, 0.5, 0.8, 0.99]),
    seed=st.integers(0, 1000),
)
def test_block_removes_the_lowest_tiles(block, sparsity, seed):
    scores = scores_of(SHAPE, seed, ties=False)
    mask = mask_of(scores, jp.patterns.Block(*block), sparsity)
    expected = oracles.keep_blocks(scores, *block, sparsity)
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((7, 5), (2, 3)),
        ((7, 5), (16, 16)),
        ((9, 4), (4, 4)),
        ((2, 7, 5), (2, 3)),
        ((1, 1), (4, 4)),
    ],
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
    scores = np.ones((7, 5), np.float32)
    scores[6] = 2.0  # the edge tiles hold the best weights, though only one row of them
    mask = mask_of(scores, jp.patterns.Block(2, 3), 6 / 8)
    np.testing.assert_array_equal(mask.any(1), [False] * 6 + [True])


def test_block_follows_the_order_of_its_sides():
    scores = ONES.copy()
    scores[10:, 3:] = 0.0
    mask = mask_of(scores, jp.patterns.Block(rows=2, columns=3), 1 / 12)
    np.testing.assert_array_equal(mask, scores > 0)


def test_block_ties_keep_the_first_tiles():
    mask = mask_of(ONES, jp.patterns.Block(2, 3), 0.5)
    np.testing.assert_array_equal(mask.any(1), [True] * 6 + [False] * 6)


@pytest.mark.parametrize("sides", [(0, 2), (2, -1)])
def test_block_refuses_empty_tiles(sides):
    with pytest.raises(ValueError, match="1"):
        jp.patterns.Block(*sides)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
def test_channel_removes_whole_outputs(sparsity):
    scores = scores_of(SHAPE, 4, ties=False)
    mask = mask_of(scores, jp.patterns.Channel(), sparsity)
    np.testing.assert_array_equal(mask, oracles.keep_channels(scores, sparsity))


def test_channel_keeps_the_first_of_ties():
    mask = mask_of(ONES, jp.patterns.Channel(), 0.5)
    np.testing.assert_array_equal(mask[0], [True] * 3 + [False] * 3)
    assert (mask == mask[:1]).all()


def test_global_channels_are_ranked_together_by_their_mean():
    scores = {"a": jnp.asarray(ONES[:2]), "b": jnp.asarray(ONES / 2)}
    pattern = jp.patterns.Channel()
    with pytest.warns(UserWarning, match="leaves nothing of 'b'"):
        masks = jp.masks.make(scores, 0.5, pattern=pattern, allocation="global")
    assert np.asarray(masks["a"]).all()
    assert not np.asarray(masks["b"]).any()


ALL = [
    jp.patterns.Unstructured(),
    jp.patterns.PerOutput(),
    jp.patterns.NM(2, 4),
    jp.patterns.Block(2, 3),
    jp.patterns.Channel(),
]


# Weights one by one under jit: test_masks.
@pytest.mark.parametrize(
    ("pattern", "shape"),
    [
        pytest.param(jp.patterns.PerOutput(), SHAPE, marks=pytest.mark.full),
        (jp.patterns.NM(2, 4), SHAPE),
        (jp.patterns.Block(2, 3), (7, 5)),
        pytest.param(jp.patterns.Channel(), SHAPE, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_under_jit_each_pattern_is_the_same(pattern, shape):
    params = jnp.asarray(scores_of(shape, 6))  # with ties
    eagerly = jp.prune({"k": params}, {"k": params}, 0.5, pattern=pattern)["k"]
    assert same_bits(pruned_under_jit(params, params, pattern), eagerly)


@pytest.mark.parametrize("pattern", ALL, ids=str)
def test_masks_of_each_pattern_can_be_packed(pattern):
    scores = {"k": jnp.asarray(scores_of(SHAPE, 6))}
    masks = jp.masks.make(scores, 0.5, pattern=pattern)
    assert same_bits(jp.masks.unpack(jp.masks.pack(masks)), masks)


@pytest.mark.parametrize("pattern", ALL[1:], ids=str)
def test_a_vector_has_no_pattern_and_is_refused_by_name(pattern):
    with pytest.raises(ValueError, match="gain"):
        jp.masks.make({"gain": np.ones(8, np.float32)}, 0.5, pattern=pattern)


@pytest.mark.parametrize("pattern", ALL[1:], ids=str)
def test_an_empty_matrix_keeps_its_shape(pattern):
    assert mask_of(np.zeros((0, 4), np.float32), pattern, 0.5).shape == (0, 4)


@given(
    sparsity=st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.77, 0.95]),
    seed=st.integers(0, 1000),
    ties=st.booleans(),
)
def test_per_output_each_output_ranks_its_own_inputs(sparsity, seed, ties):
    scores = scores_of(SHAPE, seed, ties)
    mask = mask_of(scores, jp.patterns.PerOutput(), sparsity)
    removed = oracles.removed_count(sparsity, scores.size)
    assert (~mask).sum() == removed
    for i, column in enumerate(scores.T):  # the first outputs take the remainder
        own = removed // 6 + (i < removed % 6)
        np.testing.assert_array_equal(mask[:, i], oracles.keep_top(column, own))


def test_per_output_follows_axes_and_stacks():
    pattern, scores = jp.patterns.PerOutput(), scores_of((3, *SHAPE), 1)
    mask = mask_of(scores, pattern, 0.25)
    assert (mask.sum(1) == 9).all()
    torch = jp.Axes(inputs=(-1,), outputs=(-2,))
    turned = mask_of(scores.swapaxes(1, 2), pattern, 0.25, axes=torch)
    np.testing.assert_array_equal(turned.swapaxes(1, 2), mask)


def test_per_output_takes_the_same_share_of_leaves_of_any_size_in_one_ranking():
    scores = {"a": jnp.asarray(ONES), "b": jnp.asarray(scores_of((16, 3), 2))}
    masks = jp.masks.make(
        scores, 0.5, pattern=jp.patterns.PerOutput(), allocation="global"
    )
    assert (np.asarray(masks["a"]).sum(0) == 6).all()
    assert (np.asarray(masks["b"]).sum(0) == 8).all()


def test_per_output_takes_an_uneven_share_of_each_leaf_too():
    scores = {"a": jnp.asarray(scores_of((4, 64), 3)), "b": 9 + jnp.ones((4, 64))}
    masks = jp.masks.make(scores, 0.6, pattern="per-output")
    for mask in masks.values():
        assert (~np.asarray(mask)).sum() == round(0.6 * 256)


def test_per_output_ranks_nan_lowest():
    column = np.repeat(np.array([np.nan, -np.inf, 0.0, -0.0], np.float32), 3)
    pruned = pruned_under_jit(ONES, ONES * column[:, None], jp.patterns.PerOutput())
    np.testing.assert_array_equal(pruned[:, 0], [0] * 6 + [1] * 6)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("unstructured", jp.patterns.Unstructured()),
        ("per-output", jp.patterns.PerOutput()),
        ("channel", jp.patterns.Channel()),
        ("2:4", jp.patterns.NM(2, 4)),
        ("5:12", jp.patterns.NM(5, 12)),
        ("2x3", jp.patterns.Block(2, 3)),
    ],
)
def test_a_pattern_may_be_given_by_its_name(name, pattern):
    assert jp.patterns.parse(name) == pattern == jp.patterns.parse(pattern)
    scores = {"w": jnp.asarray(scores_of(SHAPE, 0, ties=False))}
    sparsity = pattern.sparsity or 0.5
    masks = jp.masks.make(scores, sparsity, pattern=name)
    expected = jp.masks.make(scores, sparsity, pattern=pattern)
    np.testing.assert_array_equal(np.asarray(masks["w"]), np.asarray(expected["w"]))
    pruned = jp.prune(scores, scores, sparsity, pattern=name)
    np.testing.assert_array_equal(np.asarray(pruned["w"]) != 0, expected["w"])


@pytest.mark.parametrize("bad", ["2/4", "blocks", "2:4:8", "", "-1:4"])
def test_an_unknown_pattern_names_the_choices(bad):
    with pytest.raises(ValueError, match="unstructured, per-output, chan"):
        jp.masks.make({"w": ONES}, 0.5, pattern=bad)


@pytest.mark.parametrize("bad", [jp.patterns.NM, None, 4])
def test_what_is_no_pattern_is_refused_with_the_choices(bad):
    with pytest.raises(TypeError, match=r"such as jp\.patterns\.NM\(2, 4\)"):
        jp.prune({"w": ONES}, {"w": ONES}, 0.5, pattern=bad)


@pytest.mark.parametrize(("n", "m"), [(33, 65), (2049, 2100), (2090, 2100)])
def test_nm_counts_groups_that_float16_cannot(n, m):
    scores = np.random.default_rng(0).normal(size=(2 * m, 1)).astype(np.float32)
    mask = jp.masks.make({"k": jnp.asarray(scores)}, pattern=jp.patterns.NM(n, m))["k"]
    np.testing.assert_array_equal(mask, oracles.keep_nm(scores, n, m))


@pytest.mark.parametrize(
    "pattern",
    [
        "2:4",
        *(
            pytest.param(name, marks=pytest.mark.full)
            for name in ("per-output", "channel", "4x4")
        ),
    ],
)
def test_outside_of_jit_a_leaf_of_another_shape_takes_five_programs(pattern):
    """Not one for each operation: a model has many shapes, and compiling takes long."""
    sparsity = None if pattern == "2:4" else 0.5
    taken = []
    for shape in ((24, 32), (32, 24)):
        scores = {"w": jnp.asarray(scores_of(shape, 0, ties=False))}
        with compiled() as programs:
            masks = jp.masks.make(scores, sparsity, pattern=pattern)
            jp.prune(scores, scores, sparsity, pattern=pattern)
        assert np.asarray(masks["w"]).sum() == 384
        taken.append(len(programs))
    # For NaN, of units, of a count, of a mask, of the pruned leaf.
    assert taken[1] <= 5, taken


@pytest.mark.parametrize("pattern", ["2:4", "per-output"])
def test_subnormal_scores_have_an_order(pattern):
    scores = {"w": jnp.array([[1e-40], [3e-40], [2e-40], [4e-40]])}
    sparsity = None if pattern == "2:4" else 0.5
    masks = jp.masks.make(scores, sparsity, pattern=pattern)
    assert masks["w"].ravel().tolist() == [False, True, False, True]


@pytest.mark.parametrize("unit", [1e-60, 1.0, 1e60])
@pytest.mark.parametrize("pattern", ["channel", "1x1"])
def test_units_of_float64_are_ranked_in_its_whole_range(unit, pattern):
    with jax.enable_x64(True):
        scores = {"w": jnp.array([[1.0, 3.0, 2.0, 4.0]]) * unit}
        masks = jp.masks.make(scores, 0.5, pattern=pattern)
    assert np.asarray(masks["w"]).tolist() == [[False, True, False, True]]

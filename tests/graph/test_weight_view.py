"""A part of a leaf is read exactly and put back exactly; the rest stays."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprune.graph.weight_view import WeightView

# Ways to two parts of a leaf of 8 x 6 that have no element in common.
PARTED = {
    "reshaped": lambda w, i: w.reshape((8, 2, 3)).slice((0, i, 0), (8, 1, 3)),
    "interleaved": lambda w, i: w.reshape((8, 3, 2)).slice((0, 0, i), (8, 3, 1)),
    "moved": lambda w, i: (
        w.reshape((8, 2, 3)).transpose((1, 0, 2)).slice((i, 0, 0), (1, 8, 3))
    ),
    "reversed": lambda w, i: w.reverse((1,)).slice((0, 3 * i), (8, 3)),
    "moved later": lambda w, i: (
        w.reshape((2, 4, 6)).slice((i, 0, 0), (1, 4, 6)).transpose((2, 1, 0))
    ),
}

SHAPES = [(12,), (4, 6), (3, 4, 6), (2, 3, 2, 4)]


def numbered(shape, dtype=np.float32):
    return np.arange(math.prod(shape), dtype=dtype).reshape(shape)


@st.composite
def moved(draw):
    """A shape, a view of it by some moves, and what NumPy makes of them."""
    shape = draw(st.sampled_from(SHAPES))
    view, array = WeightView.whole(0, shape), numbered(shape)
    for kind in draw(st.lists(st.sampled_from("srtnv"), max_size=5)):
        if kind == "s":
            box = []
            for size in array.shape:
                low = draw(st.integers(0, size - 1))
                box.append((low, draw(st.integers(low + 1, size))))
            view = view.slice([a for a, _ in box], [b - a for a, b in box])
            array = array[tuple(slice(*ends) for ends in box)]
        elif kind == "n":
            steps = [draw(st.integers(1, 3)) for _ in array.shape]
            view = view.in_steps(steps)
            array = array[tuple(slice(None, None, step) for step in steps)]
        elif kind == "v":
            axes = draw(st.sets(st.integers(0, array.ndim - 1)))
            view, array = view.reverse(sorted(axes)), np.flip(array, sorted(axes))
        elif kind == "r":
            left, new = array.size, []
            while left > 1 and len(new) < 3:
                new.append(draw(st.sampled_from(factors(left))))
                left //= new[-1]
            new.append(left)
            view, array = view.reshape(new), array.reshape(new)
        else:
            order = draw(st.permutations(range(array.ndim)))
            view, array = view.transpose(order), array.transpose(order)
    return shape, view, array


def factors(number):
    return [n for n in range(1, number + 1) if number % n == 0]


@settings(max_examples=30)
@given(case=moved())
def test_a_view_reads_what_numpy_does(case):
    shape, view, expected = case
    assert view.shape == expected.shape
    read = np.asarray(view.read(jnp.asarray(numbered(shape))))
    np.testing.assert_array_equal(read, expected)
    assert view.sliced == (expected.size < math.prod(shape))


@settings(max_examples=30)
@given(case=moved())
def test_what_is_written_is_read_and_the_rest_stays(case):
    shape, view, expected = case
    leaf = jnp.asarray(numbered(shape))
    written = np.asarray(view.write(leaf, jnp.asarray(-1 - expected), donate=False))
    own = numbered(shape)
    seen = np.isin(own, expected)  # every number occurs once
    np.testing.assert_array_equal(written, np.where(seen, -1 - own, own))
    np.testing.assert_array_equal(leaf, own)


@settings(max_examples=30)
@given(case=moved())
def test_a_box_and_the_axes_say_where_the_part_lies(case):
    shape, view, expected = case
    if view.box is not None:
        box = numbered(shape)[np.ix_(*view.box)]
        np.testing.assert_array_equal(np.sort(box, None), np.sort(expected, None))
    # Walking along an axis of the view changes no leaf axis but those behind it.
    for axis, behind in enumerate(view.axes):
        rest = np.moveaxis(expected, axis, 0).reshape(expected.shape[axis], -1)[:, 0]
        places = np.stack(np.unravel_index(rest.astype(int), shape))
        changed = {i for i, own in enumerate(places) if len(set(own.tolist())) > 1}
        assert changed <= set(behind)


@settings(max_examples=30)
@given(case=moved(), data=st.data())
def test_views_that_are_apart_have_no_element_in_common(case, data):
    _, view, array = case
    parts = []
    for _ in range(2):
        sizes = [data.draw(st.integers(1, size)) for size in array.shape]
        ends = zip(array.shape, sizes, strict=True)
        starts = [data.draw(st.integers(0, size - n)) for size, n in ends]
        box = (slice(a, a + n) for a, n in zip(starts, sizes, strict=True))
        parts.append((view.slice(starts, sizes).reverse((0,)), array[tuple(box)]))
    (first, seen), (second, also_seen) = parts
    common = set(seen.ravel().tolist()) & set(also_seen.ravel().tolist())
    assert first.is_apart(second) == second.is_apart(first) == (not common)


@pytest.mark.parametrize("way", PARTED)
def test_parts_of_a_leaf_that_moved_are_apart(way):
    parts = [PARTED[way](WeightView.whole(0, (8, 6)), i) for i in (0, 1)]
    numbers = [part.read(jnp.asarray(numbered((8, 6)))).ravel() for part in parts]
    assert not set(numbers[0].tolist()) & set(numbers[1].tolist())
    assert parts[0].is_apart(parts[1])
    assert not parts[0].is_apart(parts[0])
    assert not parts[0].is_apart(WeightView.whole(0, (8, 6)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_leaf_keeps_its_dtype(dtype):
    leaf = jnp.asarray(numbered((4, 6)), dtype)
    view = WeightView.whole(0, (4, 6)).slice((1, 0), (2, 6)).transpose((1, 0))
    assert view.read(leaf).dtype == dtype
    part = jnp.full((6, 2), 1 / 3, jnp.float32)
    written = view.write(leaf, part, donate=False)
    assert written.dtype == dtype
    np.testing.assert_array_equal(written[1:3], jnp.full((2, 6), 1 / 3, dtype))
    np.testing.assert_array_equal(written[::3], leaf[::3])


def test_a_donated_leaf_is_written_alike():
    view = WeightView.whole(0, (3, 4)).slice((1, 0), (1, 4)).reshape((2, 2))
    leaf, part = jnp.asarray(numbered((3, 4))), -jnp.ones((2, 2))
    kept = np.asarray(view.write(leaf, part, donate=False))
    np.testing.assert_array_equal(view.write(leaf, part, donate=True), kept)


def test_a_matrix_groups_axes_as_batch_input_output():
    view = WeightView.whole(0, (3, 4, 2, 5)).matrix(1, 1)
    assert view.shape == (3, 4, 10)
    assert [set(axes) for axes in view.axes] == [{0}, {1}, {2, 3}]
    whole = WeightView.whole(0, (4, 6)).matrix(0, 1)
    assert whole.shape == (1, 4, 6)
    assert [set(axes) for axes in whole.axes] == [set(), {0}, {1}]


def test_an_axis_made_of_two_is_known_as_both():
    view = WeightView.whole(0, (4, 6)).reshape((24,))
    assert set(view.axes[0]) == {0, 1}
    # Cut across rows it is no box of the leaf.
    assert view.slice((3,), (10,)).box is None


def test_moves_that_change_nothing_are_no_moves():
    view = WeightView.whole(0, (4, 6))
    assert view.reshape((4, 6)) == view
    assert view.transpose((0, 1)) == view
    assert view.slice((0, 0), (4, 6)) == view

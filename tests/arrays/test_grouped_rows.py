"""Rows in groups, each group with a matrix: against NumPy, one group at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

from jaxprune.arrays import grouped_rows
from tests.support.compilations import compiled

IN, OUT, ROWS, GROUPS = 5, 3, 100, 4
matmul = jax.jit(grouped_rows.dot)
add_outer = jax.jit(grouped_rows.add_outer)


@st.composite
def groups(draw):
    """Rows and matrices, and how many rows each group has; some may be nobody's."""
    ends = draw(st.lists(st.integers(0, ROWS), min_size=GROUPS, max_size=GROUPS))
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    rows = rng.normal(size=(ROWS, IN)).astype(np.float32)
    weight = rng.normal(size=(GROUPS, IN, OUT)).astype(np.float32)
    return rows, weight, np.diff(sorted(ends), prepend=0).astype(np.int32)


def parts(sizes):
    ends = np.cumsum(sizes)
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def one_by_one(rows, weight, sizes):
    made = np.zeros((len(rows), weight.shape[2]), np.float64)
    for own, part in zip(weight, parts(sizes), strict=True):
        made[part] = rows[part].astype(np.float64) @ own
    return made


@given(groups())
def test_each_row_meets_the_matrix_of_its_group(case):
    rows, weight, sizes = case
    found = matmul(rows, weight, sizes)
    np.testing.assert_allclose(found, one_by_one(*case), atol=1e-5)


@given(groups())
def test_sums_and_products_are_over_the_groups_own_rows(case):
    rows, _, sizes = case
    begun = np.ones((len(sizes), IN, IN), np.float32)
    found = add_outer(begun, rows, 2 * rows, sizes)
    wide = rows.astype(np.float64)
    expected = [1 + 2 * wide[part].T @ wide[part] for part in parts(sizes)]
    np.testing.assert_allclose(found, np.stack(expected), atol=1e-4)
    sums = [wide[part].sum(0) for part in parts(sizes)]
    np.testing.assert_allclose(grouped_rows.sums(rows, sizes), sums, atol=1e-5)


@given(groups())
def test_every_row_knows_its_group(case):
    rows, _, sizes = case
    expected = np.repeat(np.arange(len(sizes) + 1), [*sizes, len(rows) - sizes.sum()])
    np.testing.assert_array_equal(grouped_rows.of_rows(len(rows), sizes), expected)


@jax.jit
def values_and_gradients(rows, weight, sizes, given):
    """Ours, and those of `ragged_dot`."""
    found, back = jax.vjp(lambda *own: grouped_rows.dot(*own, sizes), rows, weight)
    expected, theirs = jax.vjp(lambda *own: lax.ragged_dot(*own, sizes), rows, weight)
    return (found, *back(given)), (expected, *theirs(given))


def drawn(*shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape).astype(dtype))


@pytest.mark.parametrize(
    ("sizes", "count"), [([17, 0, 20], 39), ([0, 0, 0], 39), ([300, 1, 2], 305)]
)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_values_and_gradients_are_those_of_ragged_dot(sizes, count, dtype):
    rows, weight = drawn(count, IN, dtype=dtype), drawn(3, IN, OUT, dtype=dtype)
    given = drawn(count, OUT, dtype=dtype)
    near = {"rtol": 2e-2, "atol": 2e-2} if dtype == jnp.bfloat16 else {"atol": 1e-4}
    pair = values_and_gradients(rows, weight, np.array(sizes, np.int32), given)
    for own, other in zip(*pair, strict=True):
        assert own.dtype == other.dtype
        np.testing.assert_allclose(
            *(np.asarray(x, np.float32) for x in (own, other)), **near
        )


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint32"])
def test_sizes_may_be_of_any_integers(dtype):
    rows, weight = drawn(330, IN), drawn(3, IN, OUT)
    sizes = np.array([100, 120, 110], dtype)
    expected = lax.ragged_dot(rows, weight, jnp.asarray(sizes, np.int32))
    found = grouped_rows.dot(rows, weight, jnp.asarray(sizes))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.asarray(grouped_rows.of_rows(330, jnp.asarray(sizes)))[-1] == 2


def test_a_second_call_outside_of_jit_compiles_nothing():
    rows, weight = drawn(40, IN), drawn(2, IN, OUT)
    sizes = jnp.asarray(np.array([3, 17]))
    grouped_rows.dot(rows, weight, sizes)
    with compiled() as seconds:
        grouped_rows.dot(rows, weight, sizes)
    assert seconds == []


def test_inside_of_shard_map_it_has_the_same_values_and_gradients():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, weight = drawn(2, 40, IN), drawn(3, IN, OUT)
    sizes = np.array([[3, 17, 20], [40, 0, 0]])

    def loss(dot, weight):
        def one(rows, weight, sizes):
            return dot(rows[0], weight, sizes[0])[None]

        split, whole = jax.P("x"), jax.P()
        mapped = jax.shard_map(
            one, mesh=mesh, in_specs=(split, whole, split), out_specs=split
        )
        return jnp.square(mapped(rows, weight, sizes)).sum()

    found, expected = (
        jax.jit(jax.value_and_grad(functools.partial(loss, dot)))(weight)
        for dot in (grouped_rows.dot, lax.ragged_dot)
    )
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-4)


def test_what_lies_behind_the_groups_may_be_no_number():
    rows = np.ones((40, IN), np.float32)
    rows[20:] = np.nan
    rows, weight = jnp.asarray(rows), jnp.asarray(np.ones((2, IN, OUT), np.float32))
    sizes = jnp.asarray(np.array([3, 17]))
    found = np.asarray(grouped_rows.dot(rows, weight, sizes))
    np.testing.assert_array_equal(found[:20], np.full((20, OUT), IN))
    np.testing.assert_array_equal(found[20:], np.zeros((20, OUT)))
    begun = np.zeros((2, IN, IN), np.float32)
    square = np.asarray(grouped_rows.add_outer(begun, rows, rows, sizes))
    np.testing.assert_array_equal(square[:, 0, 0], [3, 17])


def test_over_a_mesh_and_in_a_trace_it_is_the_primitive_itself():
    rows, weight = drawn(8, IN), drawn(2, IN, OUT)
    sizes = jnp.asarray(np.array([3, 5]))
    found = {}

    def primitives(*operands):
        text = str(jax.make_jaxpr(grouped_rows.dot)(*operands))
        return "while" in text, "ragged_dot_general" in text

    found["alone"] = primitives(rows, weight, sizes)
    with jax.disable_jit():
        found["traced"] = primitives(rows, weight, sizes)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    found["mesh"] = primitives(rows, jax.device_put(weight, where), sizes)
    assert found == {
        "alone": (True, True),  # of which TPU takes the second
        "traced": (False, True),
        "mesh": (False, True),
    }


def test_nothing_is_held_once_for_each_group():
    rows = jax.ShapeDtypeStruct((2048, 256), np.float32)
    weight = jax.ShapeDtypeStruct((64, 256, 16), np.float32)
    sizes = jax.ShapeDtypeStruct((64,), np.int32)
    programs = grouped_rows.dot, lax.ragged_dot
    ours, theirs = (
        jax.jit(f)
        .lower(rows, weight, sizes)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for f in programs
    )
    once = 2048 * 256 * 4
    assert ours < 4 * once
    assert theirs > 60 * once  # if no longer so, lax.ragged_dot will do

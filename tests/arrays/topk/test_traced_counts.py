"""A traced count keeps what the oracle keeps, by one program for all counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxprune.arrays.topk import thresholds
from jaxprune.arrays.topk.count_search import Count
from tests.support import oracles
from tests.support.trajectories import array

SHAPES = [(8, 6), (), (0, 4), (16, 2)]
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16, jnp.float32]
VALUES = [0.0, -0.0, 1.0, -1.0, 0.5, 1e-7, np.inf, -np.inf, np.nan]
SIZES = [48, 1, 0, 32]
SIZE = sum(SIZES)


def drawn(seed):
    """Leaves with many ties, infinities and NaN."""
    rng = np.random.default_rng(seed)
    pairs = zip(SHAPES, DTYPES, strict=True)
    return [
        jnp.asarray(np.asarray(rng.choice(VALUES, shape), np.float32).astype(dtype))
        for shape, dtype in pairs
    ]


mask = jax.jit(thresholds.above_cut)


def together(leaves, kept):
    cuts = thresholds.cut_together(leaves, kept)
    return list(map(mask, leaves, cuts))


def each(leaves, kept):
    return list(map(mask, leaves, thresholds.cut_each(leaves, kept)))


def one_program(function):
    """Compiled; traced a second time it fails."""
    traces = []

    def once(leaves, kept):
        assert not traces
        traces.append(kept)
        return function(leaves, kept)

    return jax.jit(once)


def counts():
    """For all leaves, and for each."""
    yield 0, [0] * 4
    yield 1, [1, 1, 0, 1]
    yield SIZE // 3, [16, 0, 0, 11]
    yield SIZE - 1, [47, 1, 0, 31]
    yield SIZE, SIZES


def expected(leaves, kept, own):
    """The oracle's masks of one ranking, and of one of each leaf."""
    row = np.concatenate([array(leaf).ravel() for leaf in leaves])
    whole = oracles.keep_top(row, SIZE - kept)
    pairs = zip(leaves, SIZES, own, strict=True)
    apart = [oracles.keep_top(array(leaf), size - k) for leaf, size, k in pairs]
    return whole, np.concatenate([mask.ravel() for mask in apart])


def joined(masks):
    return np.concatenate([np.asarray(mask).ravel() for mask in masks])


@pytest.mark.full
def test_one_program_serves_every_count_and_keeps_what_the_oracle_keeps():
    programs = one_program(together), one_program(each)
    for seed in range(3):
        leaves = drawn(seed)
        for kept, own in counts():
            found = [
                programs[0](leaves, jnp.int32(kept)),
                programs[1](leaves, jnp.array(own)),
            ]
            for masks, wanted in zip(found, expected(leaves, kept, own), strict=True):
                np.testing.assert_array_equal(joined(masks), wanted)


@pytest.mark.full
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_eight_devices_too(kind):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    leaves = drawn(7)
    spread = [
        jax.device_put(leaf, NamedSharding(mesh, P("x", "y") if leaf.size > 1 else P()))
        for leaf in leaves
    ]
    programs = one_program(together), one_program(each)
    with jax.set_mesh(mesh):
        for kept, own in counts():
            found = [
                programs[0](spread, jnp.int32(kept)),
                programs[1](spread, jnp.array(own)),
            ]
            for masks, wanted in zip(found, expected(leaves, kept, own), strict=True):
                np.testing.assert_array_equal(joined(masks), wanted)


@pytest.mark.full
@pytest.mark.parametrize("kept", [-5, SIZE + 5])
def test_a_count_out_of_range_is_the_nearest_in_range(kept):
    leaves = drawn(1)
    wide = Count.of([max(kept, 0) << 3])
    for number in (jnp.int32(kept), wide):
        assert joined(together(leaves, number)).sum() == (0 if kept < 0 else SIZE)
    own = jnp.full(4, kept)
    assert joined(each(leaves, own)).sum() == (0 if kept < 0 else SIZE)


@pytest.mark.parametrize("kept", [-1, SIZE + 1])
def test_a_python_integer_out_of_range_is_refused(kept):
    with pytest.raises(ValueError, match=f"must be 0 to {SIZE}, .* got {kept}"):
        thresholds.cut_together(drawn(0), kept)
    with pytest.raises(ValueError, match="must be 0 to 48"):
        thresholds.cut_each(drawn(0), [49, 1, 0, 1])

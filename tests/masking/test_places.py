"""Leaves, scores and masks may lie on different devices and in any floating dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxprune as jp
from tests.support import oracles
from tests.support.trajectories import array, same_bits

# Seconds each: programs for several places.
pytestmark = pytest.mark.full

SHAPES = {"a": (8, 8), "b": (16, 4), "c": (4, 8)}
HOST = {
    name: np.random.default_rng(i).integers(-20, 20, shape).astype(np.float32)
    for i, (name, shape) in enumerate(SHAPES.items())
}


def stages():
    """A leaf on one device, one on another, one on a mesh of two more."""
    devices = jax.devices()
    mesh = Mesh(np.array(devices[2:4]), ("x",))
    rows = NamedSharding(mesh, PartitionSpec("x"))
    places = dict(zip(SHAPES, (devices[0], devices[1], rows), strict=True))
    return {name: jax.device_put(x, places[name]) for name, x in HOST.items()}


def sizes(tree):
    return [np.abs(x) for x in tree.values()]


@pytest.mark.parametrize(
    ("allocation", "pattern"),
    [
        ("layer", "unstructured"),
        ("global", "unstructured"),
        ("layer", "2:4"),
        ("global", "2x2"),
        ("global", "channel"),
        ("layer", "per-output"),
    ],
)
def test_leaves_on_different_devices_are_pruned_as_on_one(allocation, pattern):
    params, together = stages(), jax.tree.map(jnp.asarray, HOST)
    sparsity = None if pattern == "2:4" else 0.5
    how = {"allocation": allocation, "pattern": pattern}
    expected = jp.prune(together, jp.scores.magnitude(together), sparsity, **how)
    pruned = jp.prune(params, jp.scores.magnitude(params), sparsity, **how)
    for name, leaf in pruned.items():
        np.testing.assert_array_equal(leaf, expected[name])
        assert leaf.sharding == params[name].sharding
    if pattern == "unstructured":
        keep = oracles.keep_global if allocation == "global" else oracles.keep_layer
        for leaf, kept in zip(pruned.values(), keep(sizes(HOST), 0.5), strict=True):
            assert np.all(np.asarray(leaf)[~kept] == 0)


@pytest.mark.parametrize(
    ("committed", "pattern"),
    [
        (False, "unstructured"),
        (True, "unstructured"),
        (False, "2:4"),
        (True, "2x2"),
        (True, "channel"),
        (False, "per-output"),
    ],
)
def test_scores_of_one_device_prune_parameters_on_a_mesh(committed, pattern):
    scores = jp.scores.magnitude(jax.tree.map(jnp.asarray, HOST))
    if committed:
        scores = jax.device_put(scores, jax.devices()[1])
    sparsity = None if pattern == "2:4" else 0.5
    masks = jp.masks.make(scores, sparsity, pattern=pattern)
    mesh = jax.make_mesh((4,), ("x",))
    rows = NamedSharding(mesh, PartitionSpec("x"))
    params = jax.tree.map(lambda x: jax.device_put(x, rows), HOST)
    expected = jp.masks.apply(jax.tree.map(jnp.asarray, HOST), jax.device_get(masks))
    for pruned in (
        jp.masks.apply(params, masks),
        jp.prune(params, scores, sparsity, pattern=pattern),
    ):
        assert same_bits(jax.device_get(pruned), jax.device_get(expected))
        assert all(x.sharding.is_equivalent_to(rows, 2) for x in pruned.values())


def test_scores_of_numpy_are_ranked_too():
    scores = {name: np.abs(x) for name, x in HOST.items()}
    for allocation, keep in (
        ("layer", oracles.keep_layer),
        ("global", oracles.keep_global),
        ("matrix", oracles.keep_layer),
    ):
        masks = jp.masks.make(scores, 0.5, allocation=allocation)
        for mask, kept in zip(masks.values(), keep(sizes(HOST), 0.5), strict=True):
            np.testing.assert_array_equal(mask, kept)


@pytest.mark.parametrize(
    ("dtype", "pattern"),
    [
        ("bfloat16", "unstructured"),
        ("float16", "unstructured"),
        ("float8_e4m3fn", "unstructured"),
        ("float8_e4m3b11fnuz", "unstructured"),
        ("float8_e5m2", "unstructured"),
        ("bfloat16", "2:4"),
        ("float16", "2x2"),
        ("float8_e4m3fn", "channel"),
        ("float8_e4m3b11fnuz", "per-output"),
        ("float8_e5m2", "2x2"),
    ],
)
def test_narrow_scores_are_ranked_as_the_numbers_they_are(dtype, pattern):
    narrow = {k: jnp.abs(jnp.asarray(v / 4)).astype(dtype) for k, v in HOST.items()}
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), narrow)
    sparsity = None if pattern == "2:4" else 0.5
    for allocation in ("layer", "global"):
        how = {"allocation": allocation, "pattern": pattern}
        masks = jp.masks.make(narrow, sparsity, **how)
        assert same_bits(masks, jp.masks.make(wide, sparsity, **how))
        if pattern == "unstructured":
            keep = oracles.keep_global if allocation == "global" else oracles.keep_layer
            for mask, kept in zip(
                masks.values(), keep(list(map(array, wide.values())), 0.5), strict=True
            ):
                np.testing.assert_array_equal(mask, kept)


STRICT = [
    ("layer", "unstructured"),
    ("global", "unstructured"),
    ("erk", "2x2"),
    ("layer", "2:4"),
    ("global", "channel"),
    ("layer", "per-output"),
]


@pytest.mark.parametrize(("allocation", "pattern"), STRICT)
def test_everything_works_where_promotion_is_forbidden(allocation, pattern):
    params = jax.tree.map(jnp.asarray, HOST)
    sparsity = None if pattern == "2:4" else 0.5
    how = {"allocation": allocation, "pattern": pattern}
    expected = jp.prune(params, jp.scores.magnitude(params), sparsity, **how)
    with jax.numpy_dtype_promotion("strict"):
        scores = jp.scores.magnitude(params)
        assert same_bits(jp.prune(params, scores, sparsity, **how), expected)
        mixed = dict(scores, a=scores["a"].astype(jnp.bfloat16))
        jp.masks.make(mixed, sparsity, **how)
        jax.eval_shape(lambda p, s: jp.prune(p, s, sparsity, **how), params, mixed)


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("allocation", ["layer", "global"])
def test_inside_of_shard_map_each_device_ranks_its_own_shard(allocation, check):
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))
    rows = PartitionSpec("x")
    scores = {k: jnp.abs(jnp.asarray(HOST[k])) for k in ("a", "b")}

    def own(scores):
        return jp.masks.make(scores, 0.5, allocation=allocation)

    mapped = jax.shard_map(
        own, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=check
    )
    masks = jax.jit(mapped)(scores)
    for shard in range(4):
        local = {
            k: np.asarray(v).reshape(4, -1, v.shape[1])[shard]
            for k, v in scores.items()
        }
        keep = oracles.keep_global if allocation == "global" else oracles.keep_layer
        for name, kept in zip(local, keep(list(local.values()), 0.5), strict=True):
            own_part = np.asarray(masks[name]).reshape(4, *kept.shape)[shard]
            np.testing.assert_array_equal(own_part, kept)

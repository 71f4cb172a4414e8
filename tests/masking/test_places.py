"""Leaves, scores and masks may lie on different devices and in any floating dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxprune as jp
from jaxprune.arrays import placement
from tests.support import oracles
from tests.support.trajectories import same_bits

# Seconds each: programs for several places.
pytestmark = [pytest.mark.jax_api, pytest.mark.full]

RANDOM = np.random.default_rng(0)
# Of one shape, for which a device's programs are compiled once.
EQUAL = {k: RANDOM.integers(-20, 20, (8, 8)).astype(np.float32) for k in "abc"}
UNEQUAL = EQUAL | {"c": EQUAL["c"][:4]}


def mesh_of_two():
    mesh = Mesh(np.array(jax.devices()[2:4]), ("x",))
    return NamedSharding(mesh, PartitionSpec("x"))


def stages():
    """A leaf on one device, one on another, one on a mesh of two more."""
    places = dict(zip(UNEQUAL, (*jax.devices()[:2], mesh_of_two()), strict=True))
    return jax.device_put(UNEQUAL, places)


def sizes(tree):
    return [np.abs(x) for x in tree.values()]


def means(leaf, rows, columns):
    high, wide = leaf.shape
    tiles = leaf.reshape(high // rows, rows, wide // columns, columns)
    return tiles.mean((1, 3))


def pruned_by_oracles(tree, allocation, pattern):
    """The leaves without half of their units, those of the smallest mean."""
    leaves = sizes(tree)
    if pattern == "2:4":
        masks = [oracles.keep_nm(leaf, 2, 4) for leaf in leaves]
    elif pattern == "per-output":
        masks = [np.stack(oracles.keep_layer(leaf.T, 0.5), 1) for leaf in leaves]
    else:
        keep = oracles.keep_global if allocation == "global" else oracles.keep_layer
        tiles = [
            {"unstructured": (1, 1), "2x2": (2, 2), "channel": (len(leaf), 1)}[pattern]
            for leaf in leaves
        ]
        kept = keep(
            [means(leaf, *t) for leaf, t in zip(leaves, tiles, strict=True)], 0.5
        )
        masks = [np.kron(k, np.ones(t)) for k, t in zip(kept, tiles, strict=True)]
    pairs = zip(tree.items(), masks, strict=True)
    return {name: np.where(mask, leaf, np.float32(0)) for (name, leaf), mask in pairs}


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
    params = stages()
    sparsity = None if pattern == "2:4" else 0.5
    how = {"allocation": allocation, "pattern": pattern}
    expected = pruned_by_oracles(UNEQUAL, **how)
    pruned = jp.prune(params, jp.scores.magnitude(params), sparsity, **how)
    for name, leaf in pruned.items():
        np.testing.assert_array_equal(leaf, expected[name])
        assert leaf.sharding == params[name].sharding


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
    scores = jax.tree.map(lambda x: jnp.asarray(np.abs(x)), EQUAL)
    if committed:
        scores = jax.device_put(scores, jax.devices()[1])
    sparsity = None if pattern == "2:4" else 0.5
    options = {"allocation": "layer", "pattern": pattern}
    masks = jp.masks.make(scores, sparsity, **options)
    rows = mesh_of_two()
    params = jax.device_put(EQUAL, rows)
    expected = pruned_by_oracles(EQUAL, "layer", pattern)
    for pruned in (
        jp.masks.apply(params, masks),
        jp.prune(params, scores, sparsity, **options),
    ):
        assert same_bits(jax.device_get(pruned), expected)
        assert all(x.sharding.is_equivalent_to(rows, 2) for x in pruned.values())


def test_scores_of_numpy_are_ranked_too():
    scores = {name: np.abs(x) for name, x in UNEQUAL.items()}
    for allocation, keep in (
        ("layer", oracles.keep_layer),
        ("global", oracles.keep_global),
        ("matrix", oracles.keep_layer),
    ):
        masks = jp.masks.make(scores, 0.5, allocation=allocation)
        for mask, kept in zip(masks.values(), keep(sizes(UNEQUAL), 0.5), strict=True):
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
    rounded = {k: np.abs(v / 4).astype(jnp.dtype(dtype)) for k, v in EQUAL.items()}
    values = jax.tree.map(lambda x: x.astype(np.float32), rounded)
    narrow, wide = jax.tree.map(jnp.asarray, (rounded, values))
    sparsity = None if pattern == "2:4" else 0.5
    for allocation in ("layer", "global"):
        how = {"allocation": allocation, "pattern": pattern}
        masks = jp.masks.make(narrow, sparsity, **how)
        assert same_bits(masks, jp.masks.make(wide, sparsity, **how))
        if pattern == "unstructured":
            keep = oracles.keep_global if allocation == "global" else oracles.keep_layer
            kept = keep(list(values.values()), 0.5)
            for mask, expected in zip(masks.values(), kept, strict=True):
                np.testing.assert_array_equal(mask, expected)


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
    params = jax.tree.map(jnp.asarray, EQUAL)
    sparsity = None if pattern == "2:4" else 0.5
    how = {"allocation": allocation, "pattern": pattern}
    expected = jp.prune(params, jp.scores.magnitude(params), sparsity, **how)
    with jax.numpy_dtype_promotion("strict"):
        scores = jp.scores.magnitude(params)
        assert same_bits(jp.prune(params, scores, sparsity, **how), expected)
        mixed = dict(scores, a=scores["a"].astype(jnp.bfloat16))
        jp.masks.make(mixed, sparsity, **how)
        jax.eval_shape(lambda p, s: jp.prune(p, s, sparsity, **how), params, mixed)


@pytest.mark.parametrize(
    ("allocation", "check"), [("layer", True), ("global", True), ("global", False)]
)
def test_inside_of_shard_map_each_device_ranks_its_own_shard(allocation, check):
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))
    rows = PartitionSpec("x")
    scores = {name: np.abs(EQUAL[name]) for name in "ab"}

    def own(scores):
        return jp.masks.make(scores, 0.5, allocation=allocation)

    mapped = jax.shard_map(
        own, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=check
    )
    masks = jax.jit(mapped)(scores)
    for shard in range(4):
        local = {k: v.reshape(4, -1, 8)[shard] for k, v in scores.items()}
        keep = oracles.keep_global if allocation == "global" else oracles.keep_layer
        for name, kept in zip(local, keep(list(local.values()), 0.5), strict=True):
            own_part = np.asarray(masks[name]).reshape(4, *kept.shape)[shard]
            np.testing.assert_array_equal(own_part, kept)


@pytest.mark.parametrize("spec", [PartitionSpec("x"), PartitionSpec()])
def test_applied_masks_leave_the_parameters_where_they_are(spec):
    mesh = Mesh(np.array(jax.devices()[2:4]), ("x",))
    weights = jax.device_put(EQUAL, NamedSharding(mesh, spec))
    other = NamedSharding(mesh, PartitionSpec(None, "x"))
    masks = jax.device_put({k: v > 0 for k, v in EQUAL.items()}, other)
    for pruned in jp.masks.apply(weights, masks).values():
        assert pruned.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)


def test_the_same_devices_may_stand_in_another_order():
    one, other = (
        NamedSharding(Mesh(np.array(devices), ("x",)), PartitionSpec("x"))
        for devices in (jax.devices(), jax.devices()[::-1])
    )
    values = {name: EQUAL[name] for name in "ab"}
    params = jax.device_put(values, one)
    scores = {"a": jax.device_put(np.abs(EQUAL["a"]), one)}
    scores["b"] = jax.device_put(np.abs(EQUAL["b"]), other)
    expected = jp.prune(values, jp.scores.magnitude(values), 0.5, allocation="global")
    found = jp.prune(params, scores, 0.5, allocation="global", donate=True)
    for name, leaf in found.items():
        np.testing.assert_array_equal(leaf, expected[name])
        assert leaf.sharding.is_equivalent_to(one, 2)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int32])
def test_the_least_integer_is_a_number_like_any_other(dtype):
    least = jnp.iinfo(dtype).min
    params = {"w": jnp.array([[least, 1, 2, 3], [least, 5, 6, 7]], dtype)}
    scores = {"w": jnp.array([[8.0, 1, 2, 3], [9, 5, 6, 7]])}
    for prune in (jp.prune, jax.jit(jp.prune, static_argnames="sparsity")):
        whole = prune(params, scores, sparsity=0.0)["w"]
        np.testing.assert_array_equal(whole, params["w"])
    tx = jp.keep_masks(optax.sgd(0.1), {"w": jnp.ones((2, 4), bool)})
    assert jp.masks.get(jax.jit(tx.init)(params))["w"].all()


def test_integers_under_jit_stay_where_they_are():
    mesh = Mesh(np.array(jax.devices()).reshape(-1), ("x",))
    rows = NamedSharding(mesh, PartitionSpec("x"))
    leaf = jax.device_put(jnp.arange(16, dtype=jnp.int8).reshape(8, 2), rows)
    zeros = jax.jit(lambda x: placement.zeros_like(x, np.float32))(leaf)
    assert zeros.sharding.is_equivalent_to(rows, 2)
    assert not zeros.any()

"""Every eager public function works inside `jax.set_mesh`, Auto and Explicit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxprune as jp

KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
BATCH = np.random.default_rng(1).normal(size=(8, 64)).astype(np.float32)
WEIGHT = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)


def model(params, x):
    return jnp.tanh(x @ params["w"])


def score(params):
    return jp.scores.magnitude(params)


def chosen(**options):
    return lambda params, state: jp.masks.make(score(params), **options)


def pruned(**options):
    return lambda params, state: jp.prune(params, score(params), **options)


def half(params):
    return jp.masks.make(score(params), 0.5)


CALLS = {
    "get_importance": lambda params, state: jp.get_importance(state),
    "criterion of a state": lambda params, state: jp.scores.obd(params, state),
    "sparsity": lambda params, state: jp.sparsity(params),
    "explain": lambda params, state: jp.tree.explain(params),
    "apply": lambda params, state: jp.masks.apply(params, half(params)),
    "pack": lambda params, state: jp.masks.unpack(jp.masks.pack(half(params))),
    "overlap": lambda params, state: jp.masks.overlap(half(params), half(params)),
    "metrics": lambda params, state: jax.tree.map(
        np.float64, jp.metrics(jp.keep_masks(optax.sgd(0.1), half(params)).init(params))
    ),
    "combine": lambda params, state: jp.masks.combine(half(params), half(params)),
    "above": lambda params, state: jp.masks.above(score(params), 0.1),
    "trace": lambda params, state: jp.trace(model, params, BATCH),
    "axis_groups": lambda params, state: jp.axis_groups(model, params, BATCH),
    "calibrate": lambda params, state: jp.calibrate(model, params, [BATCH]),
    "prune_trained": lambda params, state: jp.prune_trained(
        model, params, [BATCH], "sparsegpt", sparsity=0.5
    ),
    **{
        f"{name} by {pattern} and {allocation}": call(
            pattern=pattern, allocation=allocation, sparsity=0.5
        )
        for name, call in (("make", chosen), ("prune", pruned))
        for pattern in (
            "unstructured",
            "16x16",
            "per-output",
            jp.patterns.Channel(),
        )
        for allocation in ("layer", "global")
    },
    "make by 2:4": chosen(pattern="2:4"),
    "prune by 2:4": pruned(pattern="2:4"),
}


@pytest.fixture(scope="module", params=KINDS)
def sharded(request):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(KINDS[request.param],) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("a", "b"))
    params = {"w": jax.device_put(WEIGHT, sharding)}
    tx = optax.adamw(1e-3)

    @jax.jit
    def step(params, state):
        return tx.update(jax.tree.map(jnp.cos, params), state, params)[1]

    return mesh, params, step(params, tx.init(params))


@pytest.mark.parametrize("name", CALLS)
def test_inside_the_context_of_a_mesh_as_outside(name, sharded):
    mesh, params, state = sharded
    with jax.set_mesh(mesh):
        inside = CALLS[name](params, state)
    outside = CALLS[name](params, state)
    for a, b in zip(jax.tree.leaves(inside), jax.tree.leaves(outside), strict=True):
        if hasattr(a, "shape"):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def two_layers(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


SHRUNK = {
    "by scores": lambda params: jp.shrink(
        two_layers, params, [BATCH], score(params), 0.5
    ),
    "by batches": lambda params: jp.shrink(
        two_layers, params, [BATCH], "sparsegpt", 0.5
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("name", SHRUNK)
def test_units_go_inside_the_context_of_a_mesh_as_outside(name, sharded):
    rng, whole = np.random.default_rng(2), NamedSharding(sharded[0], PartitionSpec())
    shapes = {"up": (64, 32), "down": (32, 16)}
    params = {
        leaf: jax.device_put(rng.normal(size=shape).astype(np.float32), whole)
        for leaf, shape in shapes.items()
    }
    with jax.set_mesh(sharded[0]):
        inside = SHRUNK[name](params)
    outside = SHRUNK[name](params)
    assert inside.report["kept"] == outside.report["kept"]
    for leaf in ("up", "down"):
        np.testing.assert_allclose(
            inside.params[leaf], outside.params[leaf], rtol=1e-5, atol=1e-6
        )

"""One table: what every transformation of the package promises to optax."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxprune as jp
from tests.support.trajectories import containers, gradients, leaves, same_bits, weights

MASKS = {
    "layer": {
        "bias": optax.MaskedNode(),
        "kernel": np.arange(12).reshape(4, 3) % 2 == 0,
    },
    "token_embedding": optax.MaskedNode(),
}
STATISTICS = ("square", "taylor")
TABLE = {
    "track_importance": lambda masks: jp.track_importance(),
    "track_importance, both": lambda masks: jp.track_importance(
        jp.weightings.exponential(0.9),
        every=2,
        start=1,
        average=("weight", "magnitude"),
    ),
    "track_gradients": lambda masks: jp.track_gradients(),
    "track_gradients, both": lambda masks: jp.track_gradients(average=STATISTICS),
    "keep_masks": lambda masks: jp.keep_masks(optax.adamw(0.1), masks),
    "gradual": lambda masks: jp.gradual(optax.adamw(0.1), {1: 0.5}),
    "gradual, packed": lambda masks: jp.gradual(
        optax.adamw(0.1), {1: 0.5}, grow=jp.grow.gradient(), packed=True
    ),
    "straight_through": lambda masks: jp.straight_through(
        optax.adamw(0.1), {1: 0.5}, freeze=2
    ),
    "admm": lambda masks: jp.admm(optax.adamw(0.1), 0.5, end=2, interval=1),
    "lora": lambda masks: jp.lora(optax.adamw(0.1), rank=2),
    "all": lambda masks: jp.keep_masks(
        optax.chain(
            jp.track_gradients(average=STATISTICS),
            optax.adamw(0.1),
            jp.track_importance(average=("weight", "magnitude")),
        ),
        masks,
    ),
}

# Each call outside of jit compiles their search anew.
SLOW = {"gradual, packed", "straight_through", "admm"}


def masks():
    return jax.tree.map(jnp.asarray, MASKS)


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.full if name in SLOW else ())
        for name in TABLE
    ]
)
def tx(request):
    return TABLE[request.param](masks())


def test_is_a_transformation_with_extra_arguments(tx):
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    params = weights()
    state = tx.init(params)
    plain, _ = tx.update(params, state, params)
    extra, _ = tx.update(params, state, params, value=1.0, nothing_known=object())
    assert same_bits(plain, extra)


def test_init_is_a_function_of_shapes_alone(tx):
    params = weights(jnp.bfloat16)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        tx.init(params), jax.eval_shape(tx.init, abstract)
    )


def test_init_takes_abstract_parameters_as_they_are(tx):
    params = weights()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    state = tx.init(abstract)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))


def test_structure_and_types_are_those_of_the_gradients(tx):
    for dtype in (jnp.float32, jnp.bfloat16):
        params = weights(dtype)
        state = tx.init(params)
        updates, new = tx.update(params, state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, new)
        assert jax.tree.structure(state) == jax.tree.structure(new)


def test_update_is_pure(tx):
    params = weights()
    state = tx.init(params)
    first, second = tx.update(params, state, params), tx.update(params, state, params)
    assert same_bits(first, second)


def test_second_step_does_not_compile_again(tx):
    params = weights()
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state, params)
    assert all(np.isfinite(x).all() for x in leaves(params))


def test_every_leaf_of_the_state_is_an_array(tx):
    params = weights()
    for state in (tx.init(params), tx.update(params, tx.init(params), params)[1]):
        assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))


def test_state_has_no_buffer_of_the_parameters_or_masks():
    params, mine = weights(), masks()
    for make in TABLE.values():
        state = make(mine).init(params)
        taken = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(state) if x.ndim}
        theirs = {x.unsafe_buffer_pointer() for x in jax.tree.leaves((params, mine))}
        assert not taken & theirs


@pytest.mark.parametrize(
    "kind", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.full)]
)
def test_sharding_of_the_state_is_that_of_the_parameters(tx, kind):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,))
    row = NamedSharding(mesh, PartitionSpec("x"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    place = lambda p: jax.device_put(p, row if p.shape[0] == 4 else everywhere)  # noqa: E731
    params = jax.tree.map(place, weights())
    state = tx.init(params)
    _, new = jax.jit(tx.update)(params, state, params)
    for held in (state, new):
        for x in jax.tree.leaves(held):
            if x.shape == (4, 3) and x.dtype != bool:
                assert x.sharding.is_equivalent_to(row, 2)


CHOOSERS = {"gradual", *SLOW}


@pytest.mark.parametrize("name", containers())
@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(TABLE.keys() - CHOOSERS, id="quick"),
        pytest.param(CHOOSERS, id="choosers", marks=pytest.mark.full),
    ],
)
def test_every_transformation_takes_every_kind_of_tree(name, rows):
    params = containers()[name]
    scores = jp.scores.magnitude(params, prunable=lambda name, leaf: True)
    grads = jax.tree.map(lambda g: g[0], gradients(params, 1))
    for row in sorted(rows):
        tx = TABLE[row](jp.masks.make(scores, 0.5))
        updates, _ = tx.update(grads, tx.init(params), params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        optax.apply_updates(params, updates)


def test_works_under_vmap_as_one_by_one(tx):
    models = [weights(seed=s) for s in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *models)
    states = jax.vmap(tx.init)(stacked)
    updates, _ = jax.vmap(tx.update)(stacked, states, stacked)
    for i, params in enumerate(models):
        alone, _ = tx.update(params, tx.init(params), params)
        for a, b in zip(leaves(alone), leaves(updates), strict=True):
            np.testing.assert_allclose(a, b[i], rtol=1e-6, atol=1e-7)

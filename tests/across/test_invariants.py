"""One table: what every transformation of the package promises to optax."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxprune as jp
from tests.support.trajectories import containers, gradients, leaves, same_bits, weights

pytestmark = pytest.mark.jax_api

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
    "lora": lambda masks: jp.contrib.lora(optax.adamw(0.1), rank=2),
    "scale_by_density": lambda masks: jp.contrib.scale_by_density(),
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
SLOW = {"gradual, packed", "straight_through"}


def masks():
    return jax.tree.map(jnp.asarray, MASKS)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=pytest.mark.full if name in SLOW else ())
        for name in TABLE
    ],
)
def tx(request):
    return TABLE[request.param](masks())


@pytest.fixture(scope="module")
def step(tx):
    """A state outside of jit, and what an update makes of it."""
    params = weights()
    state = tx.init(params)
    return state, tx.update(params, state, params)


def test_the_table_has_every_public_transformation():
    returns = "GradientTransformation"
    public = {
        name
        for module in (jp, jp.contrib)
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and returns in str(inspect.signature(value).return_annotation)
    }
    assert public == {name.split(",")[0] for name in TABLE} - {"all"}


def test_is_pure_and_a_transformation_with_extra_arguments(tx, step):
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    params, (state, plain) = weights(), step
    extra = tx.update(params, state, params, value=1.0, nothing_known=object())
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


def test_structure_and_types_are_those_of_the_gradients(tx, step):
    wide, lean = weights(), weights(jnp.bfloat16)
    begun = jax.eval_shape(tx.init, lean)
    traced = begun, jax.eval_shape(tx.update, lean, begun, lean)
    for params, state, (updates, new) in ((wide, *step), (lean, *traced)):
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, new)
        assert jax.tree.structure(state) == jax.tree.structure(new)


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


def test_every_leaf_of_the_state_is_an_array(step):
    for state in (step[0], step[1][1]):
        assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))


def test_state_has_no_buffer_of_the_parameters_or_masks():
    params, mine = weights(), masks()
    for make in TABLE.values():
        state = make(mine).init(params)
        taken = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(state) if x.ndim}
        theirs = {x.unsafe_buffer_pointer() for x in jax.tree.leaves((params, mine))}
        assert not taken & theirs


@pytest.mark.full
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharding_of_the_state_is_that_of_the_parameters(tx, kind):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,))
    row = NamedSharding(mesh, PartitionSpec("x"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    place = lambda p: jax.device_put(p, row if p.shape[0] == 4 else everywhere)  # noqa: E731
    params = jax.tree.map(place, weights())
    state = tx.init(params)
    assert like_the_kernel(state) or isinstance(state, optax.EmptyState)
    for x in like_the_kernel(state):
        assert x.sharding.is_equivalent_to(row, 2)
    if kind == AxisType.Explicit:  # there it is part of the type
        _, new = jax.eval_shape(tx.update, params, state, params)
        assert all(x.sharding.spec[0] == "x" for x in like_the_kernel(new))
    else:
        _, new = jax.jit(tx.update)(params, state, params)
        assert all(x.sharding.is_equivalent_to(row, 2) for x in like_the_kernel(new))


def like_the_kernel(state):
    leaves = jax.tree.leaves(state)
    shapes = {(4, 3), (4, 2)}  # of the factor of `lora` that has its rows
    return [x for x in leaves if x.shape in shapes and x.dtype != bool]


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
    grads = jax.tree.map(lambda g: np.asarray(g)[0], gradients(params, 1))
    for row in sorted(rows):
        tx = TABLE[row](jp.masks.make(scores, 0.5))
        state = jax.eval_shape(tx.init, params)
        updates, _ = jax.eval_shape(tx.update, grads, state, params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        jax.eval_shape(optax.apply_updates, params, updates)


@pytest.mark.full
def test_works_under_vmap_as_one_by_one(tx):
    def update(params):
        return tx.update(params, tx.init(params), params)[0]

    models = [weights(seed=s) for s in range(2)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *models)
    updates = jax.jit(jax.vmap(update))(stacked)
    alone = jax.jit(update)
    for i, params in enumerate(models):
        for a, b in zip(leaves(alone(params)), leaves(updates), strict=True):
            np.testing.assert_allclose(a, b[i], rtol=1e-6, atol=1e-7)

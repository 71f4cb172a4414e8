"""E[g^2] is found where an optimizer keeps it, and nothing else is taken for it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax import contrib

import jaxprune as jp
from tests.support.trajectories import record

PARAMS = {"kernel": jnp.asarray(np.ones((2, 2), np.float32))}
SIZES = np.array([[1.0, 0.1], [0.01, 0.001]], np.float32)

KEPT = {
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1),
    "nadam": optax.nadam(0.1),
    "radam": optax.radam(0.1),
    "lamb": optax.lamb(0.1),
    "amsgrad": optax.amsgrad(0.1),
    "rmsprop": optax.rmsprop(0.1),
    "rmsprop, corrected": optax.rmsprop(0.1, bias_correction=True),
    "rmsprop, centred": optax.rmsprop(0.1, centered=True),
    "rmsprop, both": optax.rmsprop(0.1, centered=True, bias_correction=True),
    "adagrad": optax.adagrad(0.1, initial_accumulator_value=0.0),
    "adadelta": optax.adadelta(0.1),
    "ademamix": contrib.ademamix(0.1),
    "simplified_ademamix": contrib.simplified_ademamix(0.1),
    "adopt": contrib.adopt(0.1),
    "schedule_free_adamw": contrib.schedule_free_adamw(0.1),
    "madgrad": contrib.madgrad(0.1),
    "momo_adam": contrib.momo_adam(0.1),
    "dadapt_adamw": contrib.dadapt_adamw(0.1),
    "prodigy": contrib.prodigy(0.1),
    "mechanize": contrib.mechanize(optax.adam(0.1)),
}
# The rest are of the full suite.
SOME = {"adam", "rmsprop, corrected", "adadelta", "ademamix", "schedule_free_adamw"}
OTHERWISE = {
    "adabelief": (optax.adabelief(0.1), "AdaBelief"),
    "acprop": (contrib.acprop(0.1), "ACProp"),
    "adan": (optax.adan(0.1), "Adan"),
    "adafactor": (optax.adafactor(0.1, min_dim_size_to_factor=2), "Adafactor"),
    "sm3": (optax.sm3(0.1), "SM3"),
    "novograd": (optax.novograd(0.1), "NovoGrad"),
    "galore": (contrib.galore(0.1, rank=1), "GaLore"),
}


def trained(tx, steps=20):
    grads = {"kernel": jnp.asarray(np.tile(SIZES, (steps, 1, 1)))}
    return record(tx, PARAMS, grads, value=jnp.float32(1.0)).state


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in SOME else pytest.mark.full)
        for name in KEPT
    ],
)
def test_ten_times_the_gradient_is_a_hundred_times_the_square(name):
    square = jp.get_importance(trained(KEPT[name])).square["kernel"]
    square = np.asarray(square, np.float64)
    # Epsilons of the optimizers are inside of some moments.
    expected = np.asarray(SIZES, np.float64) ** 2
    np.testing.assert_allclose(square / square[0, 0], expected, rtol=0.02)


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_is_no_mean_of_squares_is_refused_with_the_tracker_that_serves(name):
    tx, word = OTHERWISE[name]
    state = trained(optax.chain(tx, jp.track_importance()))
    assert jp.get_importance(state).square is None
    way_out = rf"{word}.*optax\.chain\(jp\.track_gradients\(\), optimizer\)"
    with pytest.raises(ValueError, match=way_out):
        jp.scores.preconditioned_magnitude(PARAMS, state)
    state = trained(optax.chain(jp.track_gradients(), tx))
    square = np.asarray(jp.get_importance(state).square["kernel"], np.float64)
    np.testing.assert_allclose(square, np.asarray(SIZES, np.float64) ** 2, rtol=1e-5)


def test_parameters_named_as_a_states_fields_are_none():
    params = {"nu": PARAMS["kernel"]}
    state = optax.sgd(0.1, momentum=0.9).init(params)
    with pytest.raises(ValueError, match="tracks nothing"):
        jp.get_importance(state)


ONES = jnp.asarray(np.ones((4, 4), np.float32))
TREE = {"body": {"k": ONES, "q": ONES}, "out": {"kernel": ONES}}
PREFIXES = {
    "two Adams": optax.partition(
        {"a": optax.adam(0.1), "b": optax.adam(0.2)}, {"body": "a", "out": "b"}
    ),
    "two trackers": optax.partition(
        {
            "a": optax.chain(jp.track_gradients(), optax.sgd(0.1)),
            "b": optax.chain(jp.track_gradients(storage="int8"), optax.sgd(0.2)),
        },
        {"body": "a", "out": "b"},
    ),
    "frozen": optax.partition(
        {"a": optax.adam(0.1), "b": optax.set_to_zero()}, {"body": "a", "out": "b"}
    ),
    "masked": optax.masked(optax.adam(0.1), {"body": True, "out": False}),
}


@pytest.mark.parametrize("name", PREFIXES)
def test_labels_of_whole_subtrees_are_as_good_as_those_of_leaves(name):
    tx = PREFIXES[name]
    _, state = jax.jit(tx.update)(TREE, jax.jit(tx.init)(TREE), TREE)
    half_frozen = name in ("frozen", "masked")
    rule = jp.tree.excluding("out/*") if half_frozen else jp.tree.prunable
    scores = jp.scores.preconditioned_magnitude(TREE, state, prunable=rule)
    assert jax.tree.structure(scores["body"]) == jax.tree.structure(TREE["body"])
    assert isinstance(scores["out"]["kernel"], optax.MaskedNode) == half_frozen
    if half_frozen:
        with pytest.raises(ValueError, match="'out/kernel' were not"):
            jp.scores.preconditioned_magnitude(TREE, state)


def test_a_moment_of_other_leaves_is_no_neighbour_of_what_is_tracked():
    """After a step Adam's is a thousandth of E[g^2]: both in one ranking would err."""
    tracker = optax.masked(jp.track_gradients(), {"body": True, "out": False})
    tx = optax.chain(tracker, optax.adam(0.1))
    _, state = tx.update(TREE, tx.init(TREE), TREE)  # gradients of one
    square = jp.get_importance(state).square
    np.testing.assert_array_equal(square["body"]["k"], ONES)
    assert jax.tree.leaves(square["out"]) == []


@pytest.mark.full
@pytest.mark.parametrize("make", [jp.track_importance, jp.track_gradients])
@pytest.mark.parametrize("storage", ["int8", "float32", "bfloat16"])
def test_nnx_optimizers_take_as_many_steps_as_you_like(make, storage):
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    tx = optax.chain(make(storage=storage), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    plain = nnx.state(model, nnx.Param)
    state = tx.init(nnx.as_pure(plain))
    update = jax.jit(tx.update)  # compiled, as in NNX's step
    traces = []

    @nnx.jit
    def step(model, optimizer, grads):
        traces.append(1)
        optimizer.update(model, grads)

    for size in (1.0, 2.0, 3.0, 4.0):
        params = nnx.state(model, nnx.Param)
        grads = jax.tree.map(
            lambda w, size=size: np.full(w.shape, size, np.float32), params
        )
        _, state = update(nnx.as_pure(grads), state, nnx.as_pure(params))
        step(model, optimizer, grads)
    assert len(traces) == 1
    for held in (optimizer, nnx.state(optimizer)):
        for field, own in jp.get_importance(state)._asdict().items():
            found = getattr(jp.get_importance(held), field)
            assert (own is None) == (found is None)
            if own is not None:
                for name, leaf in jp.tree.named_leaves(found).items():
                    np.testing.assert_array_equal(leaf, jp.tree.named_leaves(own)[name])


def test_a_gradient_that_is_not_finite_does_not_spoil_the_average():
    kernel = np.full((4, 2, 2), 2.0, np.float32)
    kernel[1, 0], kernel[2, 1, 0] = np.nan, np.inf
    tx = jp.track_gradients(average=("square", "taylor"))
    grads = {"kernel": jnp.asarray(kernel)}
    state = record(optax.chain(tx, optax.scale(0.0)), PARAMS, grads).state
    held = jp.get_importance(state)
    np.testing.assert_array_equal(held.square["kernel"], np.full((2, 2), 4.0))
    np.testing.assert_array_equal(held.taylor["kernel"], np.full((2, 2), 2.0))


@pytest.mark.full
def test_states_that_vmap_stacks_over_seeds_are_read_outside_of_it():
    params = {"w": jnp.ones((3, 4, 3)) * jnp.array([1.0, 1e2, 1e4])[:, None, None]}
    tx = optax.chain(optax.adam(0.1), jp.track_importance(storage="int8"))

    def run(params):
        state = tx.init(params)
        for scale in (1.0, 0.5):
            grads = {"w": scale * params["w"]}
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    last, state = jax.vmap(run)(params)
    found = jp.scores.averaged_weight(last, state)["w"]
    np.testing.assert_allclose(found, jnp.abs(last["w"]), rtol=0.2)
    assert jp.get_importance(jax.vmap(run)(params)[1][0]).square["w"].shape == (3, 4, 3)

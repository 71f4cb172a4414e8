"""Each criterion is its formula, on the leaves that may be pruned and on no others."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxprune as jp
from tests.support import oracles
from tests.support.trajectories import array, containers, gradients, record, weights

PARAMS = weights()
KERNEL = array(PARAMS["layer"]["kernel"])


def statistics(*fields):
    """An importance with the fields asked for, positive and of all sizes."""
    made = {}
    for seed, field in enumerate(("weight", "magnitude", "square", "taylor")):
        drawn = jax.tree.map(np.asarray, weights(seed=seed + 5))
        tree = jax.tree.map(lambda w, s=seed: w + np.float32(0.1 * s), drawn)
        if field != "weight":
            tree = jax.tree.map(lambda w: w**2 + np.float32(1e-6), tree)
        made[field] = jax.tree.map(jnp.asarray, tree) if field in fields else None
    return jp.Importance(**made)


FORMULAS = {
    "magnitude": ([], lambda i: oracles.magnitude(KERNEL)),
    "averaged_weight": (["weight"], lambda i: np.abs(i.weight)),
    "averaged_magnitude": (["magnitude"], lambda i: i.magnitude),
    "obd": (["square"], lambda i: oracles.obd(KERNEL, i.square)),
    "preconditioned_magnitude": (
        ["square"],
        lambda i: oracles.preconditioned_magnitude(KERNEL, i.square),
    ),
    "taylor": (["taylor"], lambda i: i.taylor),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_score_is_its_formula(name):
    needed, formula = FORMULAS[name]
    importance = statistics(*needed)
    scores = getattr(jp.scores, name)(PARAMS, importance)
    kernels = [None if t is None else array(t["layer"]["kernel"]) for t in importance]
    expected = formula(jp.Importance(*kernels))
    actual = array(scores["layer"]["kernel"])
    np.testing.assert_allclose(actual, expected, rtol=2e-6)
    assert isinstance(scores["layer"]["bias"], optax.MaskedNode)
    assert isinstance(scores["token_embedding"], optax.MaskedNode)


@pytest.mark.parametrize("name", FORMULAS)
def test_score_under_jit_is_the_same(name):
    importance = statistics(*FORMULAS[name][0])
    criterion = getattr(jp.scores, name)
    eager = criterion(PARAMS, importance)["layer"]["kernel"]
    jitted = jax.jit(criterion)(PARAMS, importance)["layer"]["kernel"]
    np.testing.assert_allclose(array(eager), array(jitted), rtol=1e-6)


@pytest.mark.parametrize("name", containers())
def test_every_kind_of_tree_is_scored(name):
    params = containers()[name]
    tx = optax.chain(optax.adam(0.1), jp.track_importance())
    run = record(tx, params, gradients(params, 2))
    scores = jp.scores.preconditioned_magnitude(
        run.params, jp.get_importance(run.state), prunable=lambda name, leaf: True
    )
    assert jax.tree.structure(scores) == jax.tree.structure(params)


STATES = {
    "a chain": lambda params: optax.chain(optax.adam(0.1), jp.track_importance()),
    "Adam alone": lambda params: optax.adam(0.1),
    "MultiSteps": lambda params: optax.MultiSteps(optax.adam(0.1), 2),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_serves_as_its_importance(name):
    state = STATES[name](PARAMS).init(PARAMS)
    state = jax.tree.map(lambda x: jnp.asarray(np.asarray(x) + 1, x.dtype), state)
    expected = jp.scores.preconditioned_magnitude(PARAMS, jp.get_importance(state))
    for criterion in (
        jp.scores.preconditioned_magnitude,
        jax.jit(jp.scores.preconditioned_magnitude),
    ):
        scores = criterion(PARAMS, state)["layer"]["kernel"]
        np.testing.assert_allclose(scores, expected["layer"]["kernel"], rtol=1e-6)


def test_an_nnx_optimizer_and_its_state_serve_as_importance():
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    gradient = jax.tree.map(lambda w: np.asarray(w) + np.float32(2), params)
    for tx in (
        optax.chain(jp.track_gradients(average=("square", "taylor")), optax.sgd(0.1)),
        optax.chain(optax.adamw(0.1), jp.track_importance()),
        optax.rmsprop(0.1),
    ):
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        nnx.jit(lambda m, o, g: o.update(m, g))(model, optimizer, gradient)
        expected = jp.scores.obd(params, jp.get_importance(optimizer))
        kept = jp.get_importance(optimizer)
        for held in (nnx.state(optimizer), nnx.split(optimizer)[1]):
            found = jp.get_importance(held)
            for field, average in kept._asdict().items():
                assert (getattr(found, field) is None) == (average is None), field
            scores = jp.scores.obd(params, held)
            np.testing.assert_array_equal(*map(leaves_of, (scores, expected)))


def leaves_of(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def test_the_moments_of_loras_factors_are_no_importance():
    params = {"kernel": jnp.asarray(np.ones((4, 4), np.float32))}
    state = jax.jit(jp.contrib.lora(optax.adam(0.1), 2).init)(params)
    model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    adapted = nnx.Optimizer(model, jp.contrib.lora(optax.adam(0.1), 2), wrt=nnx.Param)
    for held in (state, nnx.state(adapted)):
        with pytest.raises(ValueError, match="tracks nothing"):
            jp.scores.preconditioned_magnitude(params, held)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_small_squares_survive_low_precision_parameters(dtype):
    params = {"kernel": jnp.full((2, 2), 0.01, dtype)}
    square = {"kernel": jnp.array([[1e-9, 2e-9], [4e-9, 8e-9]])}
    importance = jp.Importance(weight=None, magnitude=None, square=square, taylor=None)
    scores = jp.scores.obd(params, importance)["kernel"]
    expected = oracles.obd(array(params["kernel"]), array(square["kernel"]))
    np.testing.assert_allclose(array(scores), expected, rtol=1e-5)


def test_random_is_a_function_of_its_seed_and_differs_by_leaf():
    params = {"a": {"kernel": jnp.ones((8, 8))}, "b": {"kernel": jnp.ones((8, 8))}}
    nothing = statistics()
    one = jp.scores.random(params, nothing, seed=3)
    again = jp.scores.random(params, nothing, seed=3)
    other = jp.scores.random(params, nothing, seed=4)
    kernel = lambda scores, name: array(scores[name]["kernel"])  # noqa: E731
    np.testing.assert_array_equal(kernel(one, "a"), kernel(again, "a"))
    assert not np.array_equal(kernel(one, "a"), kernel(other, "a"))
    assert not np.array_equal(kernel(one, "a"), kernel(one, "b"))


@pytest.mark.parametrize("compare", ["weight", "average"])
@pytest.mark.parametrize("rate", [0.1, 0.7, 2.0])
def test_threshold_is_the_authors_rule_in_both_readings(compare, rate):
    importance = statistics("weight")
    scores = jp.scores.threshold(PARAMS, importance, compare=compare)
    masks = jp.masks.above(scores, rate)
    averaged = array(importance.weight["layer"]["kernel"])
    expected = oracles.keep_threshold(KERNEL, averaged, rate, compare)
    np.testing.assert_array_equal(np.asarray(masks["layer"]["kernel"]), expected)
    assert masks["layer"]["kernel"].dtype == bool
    assert isinstance(masks["layer"]["bias"], optax.MaskedNode)


def test_threshold_compares_the_final_weight_by_default():
    importance = statistics("weight")
    by_default = jp.scores.threshold(PARAMS, importance)
    stated = jp.scores.threshold(PARAMS, importance, compare="weight")
    a, b = by_default["layer"]["kernel"], stated["layer"]["kernel"]
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_threshold_removes_what_is_equal_to_it():
    signs = {"kernel": jnp.array([[1.0, -1.0], [-1.0, 1.0]])}  # std 1
    scores = jp.scores.threshold(signs, jp.Importance(weight=signs))
    assert not np.asarray(jp.masks.above(scores, 1.0)["kernel"]).any()


def test_threshold_of_a_constant_average_removes_zeros_only():
    params = {"kernel": jnp.array([[0.0, -1.0], [-0.0, 1e-30]])}  # t = rate * 0
    constant = jp.Importance(weight={"kernel": jnp.ones((2, 2))})
    masks = jp.masks.above(jp.scores.threshold(params, constant), 2.0)
    np.testing.assert_array_equal(
        np.asarray(masks["kernel"]), [[False, True], [False, True]]
    )


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "prunable"),
    [
        ("blocks/0/attention/qkv/kernel", (4, 4), jnp.float32, True),
        ("blocks/0/mlp/up/kernel", (4, 8), jnp.bfloat16, True),
        ("conv/kernel", (3, 3, 4, 8), jnp.float32, True),
        ("blocks/0/mlp/up/bias", (8,), jnp.float32, False),
        ("attention/bias", (4, 4), jnp.float32, False),
        ("norm/scale", (4,), jnp.float32, False),
        ("token_embedding/embedding", (50, 4), jnp.float32, False),
        ("wte/embedding", (50, 4), jnp.float32, False),
        ("head/kernel", (4, 50), jnp.float32, False),
        ("blocks/0/mlp/up/kernel", (4, 8), jnp.int32, False),
        ("temperature", (), jnp.float32, False),
    ],
)
def test_default_rule_prunes_matrices_of_the_body(name, shape, dtype, prunable):
    assert jp.tree.prunable(name, jnp.zeros(shape, dtype)) is prunable


def test_a_rule_of_ones_own_replaces_the_default():
    scores = jp.scores.magnitude(
        PARAMS, statistics(), prunable=lambda name, leaf: name == "token_embedding"
    )
    assert isinstance(scores["layer"]["kernel"], optax.MaskedNode)
    assert scores["token_embedding"].shape == (5, 2)


def test_tracked_squares_rank_by_the_true_cost_of_removal():
    """On a noisy quadratic, E[g^2] = h^2 (noise variance) for the Hessian's diagonal h.

    Removing weight i costs h w^2 / 2. With label noise of variance 1/h a weight, as for
    a likelihood, E[g^2] = h, so that w^2 E[g^2] is twice the cost and ranks exactly.
    """
    rng = np.random.default_rng(0)
    hessian = 10 ** rng.uniform(-2, 1, (6, 5))
    centre = rng.normal(size=(6, 5)).astype(np.float32)
    noise = rng.choice([-1.0, 1.0], size=(400, 6, 5)) / np.sqrt(hessian)
    params = {"kernel": jnp.asarray(centre)}
    grads = {"kernel": jnp.asarray(-hessian * noise, jnp.float32)}
    tx = optax.chain(jp.track_gradients(), optax.scale(0.0), jp.track_importance())
    importance = jp.get_importance(record(tx, params, grads).state)
    cost = hessian * centre**2 / 2
    scores = array(jp.scores.obd(params, importance)["kernel"])
    np.testing.assert_array_equal(np.argsort(scores.ravel()), np.argsort(cost.ravel()))
    magnitude = array(jp.scores.magnitude(params, importance)["kernel"])
    lost = {
        name: cost[~oracles.keep_top(s, 15)].sum()
        for name, s in {"obd": scores, "magnitude": magnitude}.items()
    }
    assert lost["obd"] < lost["magnitude"]


def test_oscillating_weight_ranks_low_by_the_papers_average_only():
    """A weight that changes sign averages to nothing though it ends large."""
    steps = np.zeros((40, 2, 2), np.float32)
    steps[:, 0, 0] = 2.0 * (-1.0) ** np.arange(40)  # from -1 to 1 and back, ends at -1
    params = {"kernel": jnp.array([[-1.0, 0.5], [0.6, 0.7]])}
    tracker = jp.track_importance(average=("weight", "magnitude"))
    run = record(tracker, params, {"kernel": jnp.asarray(steps)})
    importance = jp.get_importance(run.state)

    def lowest(criterion):
        return int(np.argmin(array(criterion(run.params, importance)["kernel"])))

    assert lowest(jp.scores.averaged_weight) == 0
    assert lowest(jp.scores.magnitude) == 1
    assert lowest(jp.scores.averaged_magnitude) == 1

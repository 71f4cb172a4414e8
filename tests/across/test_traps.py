"""What went wrong in the predecessors stays right here: one trap, one test."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from optax import contrib

import jaxprune as jp
from tests.support import oracles
from tests.support.trajectories import (
    array,
    find,
    gradients,
    leaves,
    record,
    same_bits,
    weights,
)


def kernel_mask(params):
    masks = jp.masks.make(jp.scores.magnitude(params), 0.5)
    return masks, np.asarray(masks["layer"]["kernel"])


def test_a_plain_train_state_is_pruned_without_a_hook():
    params = weights()
    masks, mask = kernel_mask(params)
    tx = jp.keep_masks(optax.adam(0.1), masks)
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    ones = jax.tree.map(np.ones_like, params)
    for _ in range(3):
        state = jax.jit(TrainState.apply_gradients)(state, grads=ones)
    np.testing.assert_array_equal(array(state.params["layer"]["kernel"]) != 0, mask)


OPTIMIZERS = {
    "adabelief": optax.adabelief(0.1),
    "adadelta": optax.adadelta(0.1),
    "adafactor": optax.adafactor(0.1),
    "adagrad": optax.adagrad(0.1),
    "adam": optax.adam(0.1),
    "adamax": optax.adamax(0.1),
    "adamw": optax.adamw(0.1),
    "amsgrad": optax.amsgrad(0.1),
    "fromage": optax.fromage(0.1),
    "lamb": optax.lamb(0.1),
    "lars": optax.lars(0.1),
    "lion": optax.lion(0.1),
    "muon": contrib.muon(0.1),
    "nadam": optax.nadam(0.1),
    "noisy_sgd": optax.noisy_sgd(0.1, key=jax.random.key(0)),
    "novograd": optax.novograd(0.1),
    "radam": optax.radam(0.1),
    "rmsprop": optax.rmsprop(0.1),
    "rprop": optax.rprop(0.1),
    "schedule_free": contrib.schedule_free_adamw(0.1),
    "sgd": optax.sgd(0.1, 0.9, nesterov=True),
    "sm3": optax.sm3(0.1),
    "yogi": optax.yogi(0.1),
}

# Decay, factored moments, noise; the rest in the full suite.
FIRST = ("adamw", "adafactor", "noisy_sgd")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in FIRST else pytest.mark.full)
        for name in OPTIMIZERS
    ],
)
def test_every_optimizer_and_a_model_with_a_bias(name):
    """Noise, decay or factored moments of whatever kind cannot move what is pruned."""
    params = weights()
    masks, mask = kernel_mask(params)
    tx = optax.chain(jp.keep_masks(OPTIMIZERS[name], masks), jp.track_importance())
    run = record(tx, params, gradients(params, 4))
    kernel = array(run.weights["layer"]["kernel"])
    assert not kernel[:, ~mask].any()
    assert np.count_nonzero(kernel[-1]) == mask.sum()
    assert all(np.isfinite(x).all() for x in leaves(run.weights))
    importance = jp.get_importance(run.state)
    average = array(importance.weight["layer"]["kernel"])
    expected = oracles.average(kernel, "power", 0.5)
    np.testing.assert_allclose(average, expected, atol=1e-6 * np.abs(kernel).max())


def test_global_ranking_knows_no_norm_of_a_layer():
    """Two layers of equal weights and different size lose equal shares."""
    values = np.random.default_rng(0).permutation(np.arange(1.0, 65.0))
    params = {
        "large": jnp.asarray(np.tile(values, 9).reshape(24, 24), jnp.float32),
        "small": jnp.asarray(values.reshape(8, 8), jnp.float32),
    }
    pruned = jp.prune(params, jp.scores.magnitude(params), 0.5, allocation="global")
    report = jp.sparsity(pruned)
    assert report.total == 0.5
    assert report.by_leaf == {"large": (288, 576), "small": (32, 64)}


def test_nm_does_not_ignore_the_sparsity_asked_for():
    scores = {"k": np.ones((8, 4), np.float32)}
    with pytest.raises(ValueError, match="NM"):
        jp.masks.make(scores, 0.9, pattern=jp.patterns.NM(2, 4))


@pytest.mark.parametrize(
    "pattern",
    [jp.patterns.Unstructured(), jp.patterns.NM(2, 4), jp.patterns.Block(2, 3)],
    ids=str,
)
def test_of_ties_the_first_is_kept_by_every_pattern(pattern):
    scores = {"k": jnp.asarray(np.ones((12, 6), np.float32))}
    mask = np.asarray(jp.masks.make(scores, 0.5, pattern=pattern)["k"])
    assert mask[0, 0]
    assert not mask[-1, -1]


def test_blocks_pool_inputs_and_outputs_of_odd_sizes():
    scores = np.ones((7, 5), np.float32)
    scores[:2, :3] = 0.0
    masks = jp.masks.make(
        {"k": jnp.asarray(scores)}, 1 / 8, pattern=jp.patterns.Block(2, 3)
    )
    np.testing.assert_array_equal(np.asarray(masks["k"]), scores > 0)


def test_counts_are_exact_past_what_float32_can_count():
    size = 2**24 + 2**12
    removed = 2**24 + 1
    scores = {"k": jnp.asarray(np.zeros((2**12 + 1, 2**12), jnp.bfloat16))}
    sparsity = removed / size
    assert round(sparsity * size) == removed
    masks = jp.masks.make(scores, sparsity)
    assert jp.sparsity(masks).by_leaf == {"k": (removed, size)}
    assert int(np.asarray(masks["k"]).ravel()[: size - removed].sum()) == size - removed


@pytest.mark.parametrize("sparsity", [1.5, 1.0, -0.5])
def test_a_sparsity_that_is_none_is_refused(sparsity):
    with pytest.raises(ValueError, match="sparsity"):
        jp.prune({"k": np.ones((2, 2))}, {"k": np.ones((2, 2))}, sparsity)


def test_masking_does_not_multiply():
    params = {"k": jnp.array([[jnp.inf, -1.0], [jnp.nan, 2.0]])}
    out = jp.masks.apply(params, {"k": jnp.array([[False, False], [False, True]])})
    assert same_bits(out, {"k": jnp.array([[0.0, 0.0], [0.0, 2.0]])})


def test_steps_carry_no_moment_through_a_conditional():
    params = weights()
    masks, _ = kernel_mask(params)
    tx = jp.keep_masks(
        optax.chain(jp.track_gradients(), optax.adamw(0.1), jp.track_importance()),
        masks,
    )
    state = tx.init(params)
    text = str(jax.make_jaxpr(tx.update)(params, state, params))
    assert not re.search(r"\bcond\[", text)
    assert not re.search(r"\bsort\b|\btop_k\b", text)


def test_the_loss_reaches_the_inner_optimizer_through_all_layers():
    params = weights()
    masks, _ = kernel_mask(params)
    inner = optax.chain(
        jp.track_gradients(),
        optax.adam(0.1),
        contrib.reduce_on_plateau(patience=1, factor=0.5),
        jp.track_importance(),
    )
    run = record(jp.keep_masks(inner, masks), params, gradients(params, 9), value=3.0)
    (scale,) = find(run.state, "scale")
    assert float(scale) < 1.0


def test_prune_under_vmap_prunes_each_model_by_itself():
    models = [weights(seed=s) for s in range(3)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *models)

    def prune(params):
        return jp.prune(params, jp.scores.magnitude(params), 0.5)

    together = jax.tree.map(np.asarray, jax.jit(jax.vmap(prune))(stacked))
    for i, params in enumerate(models):
        assert same_bits(jax.tree.map(lambda x, i=i: x[i], together), prune(params))


def public():
    """Every public function with its dotted name."""
    modules = [jp, jp.weightings, jp.masks, jp.patterns, jp.scores, jp.tree]
    for module in modules:
        for name, value in vars(module).items():
            ours = getattr(value, "__module__", "").startswith("jaxprune")
            if not name.startswith("_") and inspect.isfunction(value) and ours:
                yield f"{module.__name__}.{name}", value


@pytest.mark.parametrize(("name", "function"), list(public()))
def test_documented_options_are_those_that_exist(name, function):
    text = inspect.getdoc(function) or ""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", text, re.M | re.S)
    if section:  # one-line helpers have none
        documented = re.findall(r"^  \**(\w+):", section.group(1), re.M)
        assert documented == list(inspect.signature(function).parameters)


def test_ten_equal_calls_give_one_result():
    params = weights()
    scores = jp.scores.magnitude(params)
    first = jp.prune(params, scores, 0.5, allocation="global")
    for _ in range(9):
        assert same_bits(jp.prune(params, scores, 0.5, allocation="global"), first)

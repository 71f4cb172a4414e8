"""straight_through: the bits of dense weights and a hook, and no hook."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from tests.support.trajectories import gradients, record, same_bits

SCHEDULE = jp.schedules.cubic(0.75, begin=2, end=12, every=5)
FREEZE, STEPS = 15, 20
SIZE = 24 * 30


def model(dtype=jnp.float32):
    random = np.random.default_rng(5)
    return {
        "bias": jnp.asarray(random.normal(size=30), dtype),
        "kernel": jnp.asarray(random.normal(size=(24, 30)), dtype),
    }


def each_step(grads):
    """The gradient of each step, of NumPy: slices of it compile nothing."""
    grads = jax.device_get(grads)
    return [jax.tree.map(lambda g, n=n: g[n], grads) for n in range(STEPS)]


def share(step):
    return max((s for t, s in SCHEDULE.table().items() if t <= step), default=0.0)


def with_a_hook(inner, params, grads, every, freeze):
    """The textbook's form: dense weights outside, masked before each gradient."""
    state, dense = inner.init(params), params
    masks = jp.masks.make(jp.scores.magnitude(params), 0.0)
    seen = []

    @jax.jit
    def step(gradient, state, dense):
        updates, state = inner.update(gradient, state, dense)
        return optax.apply_updates(dense, updates), state

    for n, gradient in enumerate(each_step(grads)):
        if n > freeze:
            gradient = jp.masks.apply(jax.tree.map(jnp.asarray, gradient), masks)
            dense = jp.masks.apply(dense, masks)
        dense, state = step(gradient, state, dense)
        # The hook before the next gradient.
        again = n in SCHEDULE.table() or (n - 2) % every == 0
        if 2 <= n <= freeze and again:
            scores = jp.scores.magnitude(dense)
            masks = jp.masks.make(scores, share(n), allocation="global")
        seen.append(jp.masks.apply(dense, masks))
    return jax.tree.map(lambda *x: np.stack(x), *seen), masks


@pytest.mark.full
@pytest.mark.parametrize("every", [1, 3])
def test_is_the_loop_with_a_hook_bit_for_bit(every):
    params = model()
    grads = gradients(params, STEPS)
    inner = optax.sgd(0.125, momentum=0.5)  # exact products: no fusion changes a bit
    tx = jp.straight_through(
        inner, SCHEDULE, freeze=FREEZE, every=every, criterion=jp.scores.magnitude
    )
    run = record(tx, params, grads)
    hooked, masks = with_a_hook(inner, params, grads, every, FREEZE)
    assert same_bits(run.weights, hooked)
    assert same_bits(jp.masks.get(run.state)["kernel"], masks["kernel"])


@pytest.mark.parametrize(
    "dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.full)]
)
def test_params_are_sparse_and_the_rest_is_parked_until_the_freeze(dtype):
    params = model(dtype)
    tx = jp.straight_through(optax.adamw(0.01), SCHEDULE, freeze=FREEZE)
    grads = gradients(params, STEPS)
    state = tx.init(params)

    @jax.jit
    def step(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for n, gradient in enumerate(each_step(grads)):
        params, state = step(params, state, gradient)
        kernel = np.asarray(params["kernel"]).astype(np.float32)
        parked = np.asarray(state.parked["kernel"]).astype(np.float32)
        mask = np.asarray(state.masks["kernel"])
        assert (~mask).sum() == round(share(n) * SIZE)
        # At each place one of the two is zero; bfloat16's rare zeros are weights too.
        assert not kernel[~mask].any()
        assert not parked[mask | (n >= FREEZE)].any()
        assert (kernel + parked == 0).sum() <= (2 if n < FREEZE else (~mask).sum() + 2)
        assert not np.signbit(kernel[~mask]).any()
        assert isinstance(state.parked["bias"], optax.MaskedNode)


def test_what_was_pruned_comes_back_with_the_weight_that_it_has_learned():
    params = {"w": jnp.array([[1.0, 2.0, 3.0, 4.0]])}
    tx = jp.straight_through(
        optax.sgd(1.0),
        jp.schedules.once(0, 0.5),
        freeze=None,
        criterion=jp.scores.magnitude,
    )
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    gradient = {"w": jnp.array([[-1.0, 0.0, 0.0, 0.0]])}  # the first grows by 1 a step
    seen = []
    for _ in range(5):
        params, state = step(params, state)
        seen.append(np.asarray(params["w"])[0].tolist())
    # After each step the dense weight is 2, 3, 4, 5, 6; of equal ones the first stays.
    assert seen == [[0, 0, 3, 4], *([w, 0, 0, 4] for w in (3, 4, 5, 6))]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"freeze": 11}, "last event at step 12, got every=1, freeze=11"),
        ({"freeze": 12, "every": 0}, "every >= 1"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(options, says):
    with pytest.raises(ValueError, match=says) as caught:
        jp.straight_through(optax.adamw(0.01), SCHEDULE, **options)
    assert not str(caught.value).endswith(".")


@pytest.mark.parametrize("option", ["every", "freeze"])
def test_a_fractional_step_is_refused(option):
    steps = {"freeze": None, option: 12.5}
    with pytest.raises(TypeError, match=f"integer {option}, got 12.5"):
        jp.straight_through(optax.adamw(0.01), SCHEDULE, **steps)

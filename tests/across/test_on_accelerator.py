"""On a GPU or TPU the package does what it does on a CPU: the tier `-m gpu`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune.posttraining.solvers import alps, sparsegpt
from tests.support.small_models import correlated, draw
from tests.support.trajectories import same_bits

pytestmark = pytest.mark.gpu

EVENTS = {2: 0.25, 5: 0.75}
STEPS = 8
SHAPE = (64, 96)
PATTERNS = ["unstructured", "per-output", "2:4", "4x4", "channel"]
OPTIMIZERS = {
    "gradual": lambda: jp.gradual(optax.adamw(1e-2), EVENTS),
    "gradual, packed": lambda: jp.gradual(optax.adamw(1e-2), EVENTS, packed=True),
    "straight_through": lambda: jp.straight_through(
        optax.adamw(1e-2), EVENTS, freeze=6
    ),
}


@pytest.fixture(scope="module")
def host():
    return jax.devices("cpu")[0]


def params(dtype=jnp.float32):
    return {"kernel": jnp.asarray(draw(0, *SHAPE), dtype), "bias": jnp.zeros(96, dtype)}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("allocation", ["layer", "global"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_are_those_of_a_cpu(host, pattern, allocation, dtype):
    scores = jp.scores.magnitude(params(dtype))
    share = None if pattern == "2:4" else 0.7
    make = jax.jit(
        lambda s: jp.masks.make(s, share, allocation=allocation, pattern=pattern)
    )
    assert same_bits(make(scores), make(jax.device_put(scores, host)))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_are_the_schedules_and_no_step_waits_for_the_host(name):
    tx = OPTIMIZERS[name]()
    x = jnp.asarray(draw(1, 32, SHAPE[0]))

    @jax.jit
    def step(params, state):
        def loss(params):
            return jnp.mean(jnp.tanh(x @ params["kernel"] + params["bias"][None]) ** 2)

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    weights = params()
    state = tx.init(weights)
    weights, state = step(weights, state)
    with jax.transfer_guard("disallow"):
        for _ in range(STEPS - 1):
            weights, state = step(weights, state)
    kernel = np.asarray(weights["kernel"])
    assert (kernel == 0).sum() == round(0.75 * kernel.size)
    assert not np.signbit(kernel[kernel == 0]).any()
    np.testing.assert_array_equal(jp.masks.get(state)["kernel"], kernel != 0)


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
def test_averages_are_those_of_a_cpu(host, storage):
    tx = optax.chain(optax.sgd(1e-2), jp.track_importance(storage=storage))

    def averages(params):
        def step(carry, number):
            gradient = jax.tree.map(lambda leaf: leaf * 0.1 + number / 100, carry[0])
            updates, state = tx.update(gradient, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        run = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), jnp.arange(9.0))[0])
        return jp.get_importance(run(params)[1]).weight

    own, theirs = averages(params()), averages(jax.device_put(params(), host))
    jax.tree.map(
        # Roundings of int8 are drawn; one code is a 127th of the largest.
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=1e-5, atol=0.05 if storage == "int8" else 1e-6
        ),
        own,
        theirs,
    )


@pytest.mark.parametrize("solver", [sparsegpt, alps])
def test_a_solver_leaves_the_error_that_it_leaves_on_a_cpu(host, solver):
    weight, x = draw(2, *SHAPE), correlated(3, 512, SHAPE[0])
    hessian = (x.T @ x / len(x)).astype(np.float32)
    kept = weight.size // 2

    def error(device):
        placed = jax.device_put((weight, hessian), device)
        found = solver.solve(*placed, kept)
        assert (np.asarray(found.weight) == 0).sum() == weight.size - kept
        return np.linalg.norm(x @ (weight - np.asarray(found.weight)))

    assert error(jax.devices()[0]) == pytest.approx(error(host), rel=1e-2)

"""Updates over a power of each matrix's density; zeros stay what masks them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp


def sparse_weights():
    """A quarter of one matrix is left, half of another; a bias with a zero."""
    rng = np.random.default_rng(0)
    up, down = rng.normal(size=(2, 8, 8)).astype(np.float32)
    up.ravel()[: 3 * 16] = 0
    down.ravel()[:32] = 0
    bias = rng.normal(size=8).astype(np.float32)
    bias[0] = 0
    return {"up": {"kernel": up}, "down": {"kernel": down, "bias": bias}}


def scaled(params, *args, **options):
    tx = jp.contrib.scale_by_density(*args, **options)
    ones = jax.tree.map(jnp.ones_like, params)
    return tx.update(ones, tx.init(params), params)[0]


@pytest.mark.parametrize(
    ("power", "up", "down"), [(0.5, 2, 2**0.5), (1.0, 4, 2), (0.0, 1, 1)]
)
def test_matrices_alone_take_larger_steps(power, up, down):
    updates = scaled(sparse_weights(), power)
    np.testing.assert_allclose(updates["up"]["kernel"], up, rtol=1e-6)
    np.testing.assert_allclose(updates["down"]["kernel"], down, rtol=1e-6)
    np.testing.assert_array_equal(updates["down"]["bias"], 1)


def test_a_stack_of_layers_has_one_density():
    stack = jnp.stack([jnp.ones((4, 4)), jnp.zeros((4, 4)).at[0].set(1)])
    updates = scaled({"kernel": stack}, 1.0)
    np.testing.assert_allclose(updates["kernel"], 32 / 20, rtol=1e-6)


def test_more_weights_than_32_bits_count():
    params = {"kernel": jax.ShapeDtypeStruct((2**12, 2**20), jnp.float32)}
    assert jax.eval_shape(scaled, params) == params


def test_which_leaves_is_the_caller_s_to_say():
    updates = scaled(sparse_weights(), prunable="up/*")
    assert float(updates["up"]["kernel"][0, 0]) == pytest.approx(4**0.75)
    np.testing.assert_array_equal(updates["down"]["kernel"], 1)


def test_nothing_left_and_nothing_gone_are_left_alone():
    params = {
        "none": {"kernel": jnp.zeros((4, 4))},
        "all": {"kernel": jnp.ones((4, 4))},
    }
    for update in jax.tree.leaves(scaled(params)):
        np.testing.assert_array_equal(update, 1)


def test_leaves_that_were_left_out_stay_out():
    params = sparse_weights()
    tx = optax.masked(
        jp.contrib.scale_by_density(0.5),
        {"up": True, "down": {"kernel": True, "bias": False}},
    )
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates["up"]["kernel"], 2 * params["up"]["kernel"])
    np.testing.assert_array_equal(updates["down"]["bias"], params["down"]["bias"])


def test_inside_of_gradual_zeros_stay_zeros_and_each_step_is_as_long_as_said():
    params = jax.tree.map(jnp.asarray, sparse_weights())
    params["up"]["kernel"] = jnp.ones((8, 8)).at[0].set(2.0)

    def run(*more):
        schedule = jp.schedules.once(0, 0.75)
        tx = jp.gradual(
            optax.chain(optax.sgd(0.1), *more),
            schedule,
            criterion=jp.scores.magnitude,
            prunable="up/*",
        )
        ones = jax.tree.map(jnp.ones_like, params)
        return tx.update(ones, tx.init(params), params)[0]["up"]["kernel"]

    plain, divided = run(), run(jp.contrib.scale_by_density(0.5))
    kept = plain == plain[0, 0]
    assert kept.sum() == 16
    # A quarter is left from this step on, so the step doubles; removals are as before.
    np.testing.assert_allclose(divided, jnp.where(kept, 2 * plain, plain), rtol=1e-6)


def test_a_power_out_of_range_and_missing_parameters_are_refused():
    with pytest.raises(ValueError, match=r"power in \[0, 1\], got 2"):
        jp.contrib.scale_by_density(2)
    tx = jp.contrib.scale_by_density()
    with pytest.raises(ValueError, match="scale_by_density"):
        tx.update({"w": jnp.ones((2, 2))}, tx.init({}))


def test_a_glob_that_matches_nothing_is_refused():
    params = sparse_weights()
    for rule in ("typo/*", jp.tree.excluding("typo/*")):
        tx = jp.contrib.scale_by_density(prunable=rule)
        with pytest.raises(ValueError, match="must match a leaf"):
            tx.update(params, tx.init(params), params)


def test_updates_of_two_bytes_where_promotion_is_forbidden():
    params = sparse_weights()
    updates = jax.tree.map(lambda x: jnp.ones_like(x, jnp.bfloat16), params)
    tx = jp.contrib.scale_by_density(1.0)
    with jax.numpy_dtype_promotion("strict"):
        scaled, _ = tx.update(updates, tx.init(params), params)
    assert scaled["up"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(scaled["up"]["kernel"], jnp.full((8, 8), 4.0))

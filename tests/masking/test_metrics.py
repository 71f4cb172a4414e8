"""What a logger shows of a training with masks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from tests.support.small_models import draw

PARAMS = jax.tree.map(
    jnp.asarray, {"up": draw(0, 8, 16), "down": draw(1, 16, 4), "bias": np.ones(4, "f")}
)
SCHEDULE = jp.schedules.constant(0.5, 0, 40, every=1)


def optimizer():
    return jp.gradual(
        optax.sgd(0.3), SCHEDULE, criterion="magnitude", grow=jp.grow.random(0.5)
    )


def step(state, params):
    updates, later = optimizer().update(jax.tree.map(jnp.sin, params), state, params)
    return optax.apply_updates(params, updates), later, jp.metrics(later, state)


def by_hand(before, after):
    """Sparsity and churn by leaf, in NumPy."""
    rows, total = {}, np.zeros(4)
    for name in ("down", "up"):
        old, new = (np.asarray(masks[name]) for masks in (before, after))
        counts = np.array(
            [(~new).sum(), new.size, (old & new).sum(), (old | new).sum()]
        )
        total += counts
        rows[f"sparsity/{name}"] = counts[0] / counts[1]
        rows[f"churn/{name}"] = 1 - counts[2] / counts[3]
    zeros, size, both, either = total
    return rows | {"sparsity": zeros / size, "churn": 1 - both / either}


@pytest.mark.full
def test_a_compiled_step_returns_what_is_counted_outside_of_it():
    params, state, jitted = PARAMS, optimizer().init(PARAMS), jax.jit(step)
    moved = 0
    for _ in range(4):
        before = jp.masks.get(state)
        params, later, traced = jitted(state, params)
        expected = by_hand(before, jp.masks.get(later))
        assert traced.keys() == expected.keys()
        eager = jp.metrics(later, state)
        for name, value in expected.items():
            assert eager[name] == pytest.approx(value)
            np.testing.assert_allclose(traced[name], value, rtol=1e-6, atol=1e-6)
        moved += expected["churn"] > 0
        state = later
    assert moved
    assert jitted._cache_size() == 1


def test_numbers_are_ready_for_json_outside_of_jit():
    rows = jp.metrics(optimizer().init(PARAMS))
    assert {type(value) for value in rows.values()} == {float}
    assert not any(name.startswith("churn") for name in rows)


def test_masks_that_keep_nothing_have_not_changed():
    nothing = {"w": jnp.zeros((2, 3), bool)}
    state = jp.keep_masks(optax.sgd(0.1), nothing).init({"w": jnp.ones((2, 3))})
    assert jp.metrics(state, state)["churn/w"] == 0
    traced = jax.jit(lambda s: jp.metrics(s, s))(state)
    assert float(traced["churn"]) == float(traced["churn/w"]) == 0


def test_a_state_without_masks_is_refused():
    with pytest.raises(ValueError, match="masks"):
        jp.metrics(optax.adam(0.1).init(PARAMS))

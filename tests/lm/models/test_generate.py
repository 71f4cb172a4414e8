"""Draws from a softmax over a vocabulary of many groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxprune.lm.models.generate import _categorical, _first_above

_COUNT = 20000


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_draws_have_the_shares_of_the_softmax_in_each_group(dtype):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, 1300).astype(np.float32)  # two groups and a part of one
    logits[[0, 511, 512, 1299]] = -np.inf
    logits = jnp.asarray(logits, dtype)
    rows = jnp.broadcast_to(logits, (_COUNT, 1300))
    drawn = np.asarray(_categorical(jax.random.key(0), rows))
    shares = np.asarray(jax.nn.softmax(logits.astype(jnp.float32)), np.float64)
    observed = np.bincount(drawn, minlength=1300) / _COUNT
    assert observed.shape == (1300,)
    assert not observed[shares == 0].any()
    error = np.sqrt(shares / _COUNT)
    assert np.all(np.abs(observed - shares) <= 5 * error + 2 / _COUNT)
    # Chi squared of those that are expected often has about as many as its degrees.
    often = shares * _COUNT >= 5
    statistic = _COUNT * np.sum((observed - shares)[often] ** 2 / shares[often])
    assert abs(statistic - often.sum()) < 5 * np.sqrt(2 * often.sum())


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("vocabulary", [1300, 2048])
@pytest.mark.parametrize("spec", [P("data"), P(None, "data"), P("data", "model")])
def test_a_mesh_may_split_rows_and_vocabulary(kind, vocabulary, spec):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind))
    logits = np.full((4, vocabulary), -np.inf, np.float32)
    expected = np.array([0, 511, 512, vocabulary - 1])
    logits[np.arange(4), expected] = 0
    with jax.set_mesh(mesh):
        placed = jax.device_put(logits, NamedSharding(mesh, spec))
        drawn = jax.jit(_categorical)(jax.random.key(0), placed)
    np.testing.assert_array_equal(drawn, expected)


def test_rows_are_drawn_apart():
    logits = jnp.full((2, 600), -jnp.inf).at[0, 3].set(0).at[1, 599].set(-1e30)
    np.testing.assert_array_equal(_categorical(jax.random.key(0), logits), [3, 599])


@pytest.mark.parametrize("uniform", [0.0, 0.5, float(np.nextafter(np.float32(1), 0))])
def test_what_has_no_weight_is_never_first(uniform):
    weights = jnp.zeros((1, 512)).at[0, 100].set(1e-30).at[0, 300].set(3e-30)
    index = int(_first_above(weights, jnp.full((1, 1), uniform))[0])
    assert index == (100 if uniform < 0.25 else 300)

"""Scores by activations: the papers' formulas, written out weight by weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.scores import from_activations
from tests.support import oracles_trained as oracles

RNG = np.random.default_rng(3)
WEIGHT = RNG.normal(size=(7, 5)).astype(np.float32)
INPUTS = oracles.inputs(50, 7)
SQUARE = jnp.asarray((INPUTS**2).mean(0), jnp.float32)


def test_wanda_is_the_weight_times_the_size_of_its_input():
    got = from_activations.wanda(jnp.asarray(WEIGHT), SQUARE)
    np.testing.assert_allclose(got, oracles.wanda(WEIGHT, INPUTS), rtol=1e-5)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_ria_is_the_relative_importance_times_the_size_of_its_input(power):
    got = from_activations.ria(jnp.asarray(WEIGHT), SQUARE, power)
    np.testing.assert_allclose(got, oracles.ria(WEIGHT, INPUTS, power), rtol=1e-5)


def test_an_input_and_an_output_of_zeros_score_zero():
    weight = WEIGHT.copy()
    weight[2], weight[:, 1] = 0, 0
    for scores in (
        from_activations.wanda(jnp.asarray(weight), SQUARE),
        from_activations.ria(jnp.asarray(weight), SQUARE),
    ):
        scores = np.asarray(scores)
        assert np.isfinite(scores).all()
        np.testing.assert_array_equal(scores == 0, weight == 0)


def test_scores_are_float32_and_can_be_mapped_over_a_stack():
    weight = jnp.asarray(WEIGHT.astype(jnp.bfloat16))
    stack = jnp.asarray(np.stack([weight, weight]))
    squares = jnp.asarray(np.stack([SQUARE, 4 * np.asarray(SQUARE)]))
    for score in (from_activations.wanda, from_activations.ria):
        each = jax.jit(jax.vmap(score))(stack, squares)
        assert each.dtype == jnp.float32
        expected = jax.jit(score)(weight, SQUARE)
        np.testing.assert_allclose(np.asarray(each)[0], expected, rtol=1e-6)

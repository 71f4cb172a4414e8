"""A shrunk function takes batches of other kinds than the one it was made with."""

import jax.numpy as jnp

import jaxprune as jp
from tests.support.small_models import draw


def test_a_number_and_an_array_are_not_one_program():
    def fn(params, batch):
        x, factor = batch
        return jnp.tanh(x @ params["up"]) @ params["down"] * factor

    shapes = {"up": (8, 6), "down": (6, 4)}
    params = {
        name: jnp.asarray(draw(i, *shape), jnp.bfloat16)
        for i, (name, shape) in enumerate(shapes.items())
    }
    x = jnp.asarray(draw(2, 5, 8), jnp.bfloat16)
    scores = jp.scores.magnitude(params)
    small = jp.shrink(fn, params, (x, 0.5), scores, {"down:0": 0.5})
    for factor in (0.5, jnp.float32(0.5), 0.5):
        found = small.fn(small.params, (x, factor))
        assert found.dtype == fn(params, (x, factor)).dtype

"""A shrunk function takes batches of other kinds than the one it was made with."""

import jax
import jax.numpy as jnp
import numpy as np

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
    small = jp.shrink(fn, params, [(x, 0.5)], scores, keep={"down:0": 0.5})
    for factor in (0.5, jnp.float32(0.5), 0.5):
        found = small.fn(small.params, (x, factor))
        assert found.dtype == fn(params, (x, factor)).dtype


def test_a_batch_may_leave_a_branch_out():
    def fn(params, batch):
        y = jnp.tanh(batch["x"] @ params["up"]) @ params["down"]
        if "t" in batch:
            y = y + jnp.tanh(batch["t"] @ params["other"]) @ params["back"]
        return y

    shapes = {"up": (8, 6), "down": (6, 4), "other": (8, 6), "back": (6, 4)}
    params = {name: draw(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    x, scores = draw(4, 5, 8), jp.scores.magnitude(params)
    shares = {"down:0": 0.5, "back:0": 0.5}
    small = jp.shrink(fn, params, [{"x": x, "t": x}], scores, shares)
    kept = small.report["kept"]["down:0"]
    expected = jnp.tanh(x @ params["up"][:, kept]) @ params["down"][kept]
    found = small.fn(small.params, {"x": x})
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_batch_may_be_empty():
    def fn(params, x):
        heads = jax.nn.softmax((x @ params["up"]).reshape(len(x), 3, 2), 1)
        return heads.reshape(len(x), 6) @ params["down"]

    params = {"up": draw(0, 8, 6), "down": draw(1, 6, 4)}
    scores = jp.scores.magnitude(params)
    groups = jp.axis_groups(fn, params, draw(2, 5, 8))
    name = next(group.name for group in groups if group.removable)
    small = jp.shrink(fn, params, [draw(2, 5, 8)], scores, keep={name: 0.5})
    assert small.fn(small.params, jnp.zeros((0, 8))).shape == (0, 4)


def test_one_group_may_be_named_by_itself():
    def fn(params, x):
        return jnp.tanh(x @ params["up"]) @ params["down"]

    params = {"up": draw(0, 8, 6), "down": draw(1, 6, 4)}
    scores, x = jp.scores.magnitude(params), draw(2, 5, 8)
    alone, listed = (
        jp.shrink(
            fn, params, [x], scores, keep={"parameters": 0.6}, groups=groups
        ).report["kept"]
        for groups in ("down:0", ["down:0"])
    )
    np.testing.assert_array_equal(alone["down:0"], listed["down:0"])


def test_a_number_among_the_scores_is_no_score():
    params = {"up": draw(0, 8, 6), "down": draw(1, 6, 4), "n": 1.0}
    scores = {**jp.scores.magnitude({k: params[k] for k in ("up", "down")}), "n": 0.0}

    def fn(params, x):
        return jnp.tanh(x @ params["up"]) @ params["down"] * params["n"]

    small = jp.shrink(fn, params, [draw(2, 5, 8)], scores, keep={"down:0": 0.5})
    assert small.params["up"].shape == (8, 3)

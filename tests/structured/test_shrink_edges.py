"""Ordinary models at the edge of what is traced, made smaller."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp

CHANCE = np.random.default_rng(0)
X = jnp.asarray(CHANCE.normal(size=(3, 5, 8)), "f")


def weights(**shapes):
    return {k: jnp.asarray(CHANCE.normal(size=v) / 3, "f") for k, v in shapes.items()}


MLP = weights(up=(8, 6), down=(6, 8))


def attention(p, x):
    q, k, v = ((x @ p[n]).reshape(*x.shape[:2], 2, 4) for n in "qkv")
    s = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(q.shape[-1])
    h = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s), v)
    return h.reshape(x.shape) @ p["o"]


def with_a_print(p, x):
    h = jnp.tanh(x @ p["up"])
    jax.debug.print("h {}", h.sum())
    return h @ p["down"]


def with_a_mean(p, x):
    h = jnp.tanh((x + jnp.mean(jnp.abs(x))) @ p["up"])
    return h @ p["down"]


def zeroed(params, smaller):
    """The parameters with zeros where the smaller ones lack units."""
    kept = smaller.cut(
        jax.tree.map(lambda x: jnp.arange(x.size).reshape(x.shape), params)
    )
    return jax.tree.map(
        lambda x, at: jnp.where(np.isin(np.arange(x.size), at).reshape(x.shape), x, 0),
        params,
        kept,
    )


@pytest.mark.full
@pytest.mark.parametrize(
    ("fn", "params"),
    [
        (attention, weights(q=(8, 8), k=(8, 8), v=(8, 8), o=(8, 8))),
        (with_a_print, MLP),
        (with_a_mean, MLP),
    ],
)
def test_a_jitted_shrunk_function_takes_other_batches(fn, params):
    smaller = jp.shrink(fn, params, [X], jp.scores.magnitude, 0.5)
    assert smaller.report["after"]["flops"] < smaller.report["before"]["flops"]
    full = zeroed(params, smaller)
    for batch in (X, X[:1], X[:, :2]):
        np.testing.assert_allclose(
            jax.jit(smaller.fn)(smaller.params, batch), fn(full, batch), atol=1e-5
        )


def test_rows_that_are_filled_with_a_number_keep_their_units():
    def fn(p, ids, fill):
        h = p["table"].at[ids].get(mode="fill", fill_value=fill)
        return (h * jax.lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-6)) @ p[
            "head"
        ]

    params, ids = weights(table=(5, 8), head=(8, 3)), jnp.array([0, 7, 2])

    def removable(fill):
        groups = jp.axis_groups(lambda p, x: fn(p, x, fill), params, ids)
        return {group.name: group.removable for group in groups}["head:0"]

    assert removable(0.0)
    assert not removable(1.0)


def test_the_dtype_of_a_result_is_the_originals_whatever_the_batch():
    def fn(p, x):
        return jnp.tanh(x @ p["up"]) @ p["down"] * p["rate"]

    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), MLP) | {"rate": 0.5}
    x = X.astype(jnp.bfloat16)
    smaller = jp.shrink(fn, low, [x], jp.scores.magnitude, 0.5)
    for batch in (x, x[:2]):
        assert smaller.fn(smaller.params, batch).dtype == fn(low, batch).dtype
    strong = smaller.params | {"rate": jnp.float32(0.5)}
    assert smaller.fn(strong, x).dtype == fn(low | {"rate": strong["rate"]}, x).dtype


@pytest.mark.full
def test_constants_of_layers_are_cut_as_each_layer_or_not_at_all():
    noise = jnp.asarray(CHANCE.normal(size=(2, 6)), "f")

    def fn(p, x):
        if len(x) > 3:  # all layers at once
            h = jnp.einsum("bd,ldf->lbf", x, p["up"]) * noise[:, None]
            return jnp.einsum("lbf,lfd->bd", jnp.tanh(h), p["down"])
        return sum(
            jnp.tanh((x @ p["up"][i]) * noise[i][None]) @ p["down"][i] for i in range(2)
        )

    params, x = weights(up=(2, 8, 6), down=(2, 6, 8)), X[0]
    smaller = jp.shrink(fn, params, [x[:3]], jp.scores.magnitude, 0.5)
    full = zeroed(params, smaller)
    own = smaller.fn(smaller.params, x[:3])
    np.testing.assert_allclose(own, fn(full, x[:3]), atol=1e-5)
    with pytest.raises(ValueError, match="the same units for every batch"):
        smaller.fn(smaller.params, x)


def test_a_state_of_one_bare_array_is_cut():
    w = weights(w=(6, 6))["w"]
    own = jp.shrink(
        lambda w, x: jnp.tanh(x @ w).sum(-1),
        w,
        [X[0, :, :6]],
        jp.scores.magnitude,
        keep={":1": 0.5},
    )
    state = own.cut(optax.adam(1e-3).init(w))
    assert own.params.shape == (6, 3)
    assert state[0].mu.shape == (6, 3)


def test_a_state_of_part_of_the_parameters_is_not_left_whole():
    def fn(variables, x):
        return jnp.tanh(x @ variables["params"]["up"]) @ variables["params"]["down"]

    variables = {"params": MLP}
    smaller = jp.shrink(fn, variables, [X], jp.scores.magnitude, 0.5)
    tx = optax.adam(1e-3)
    assert smaller.cut(tx.init(variables))[0].mu["params"]["up"].shape == (8, 3)
    assert jax.tree.leaves(smaller.cut(optax.sgd(0.1).init(MLP))) == []
    with pytest.raises(ValueError, match=r"leaves of the parameters \('params/down'"):
        smaller.cut(tx.init(MLP))


def test_a_head_has_a_say_in_which_inputs_go_only_where_a_rule_scores_it():
    def fn(params, x):
        return jax.nn.relu(x @ params["up"]["kernel"]) @ params["classifier"]["kernel"]

    up = jnp.tile(jnp.array([[3.0, 2.0, 1.0]]), (2, 1))  # (in, neurons)
    head = jnp.tile(jnp.array([[1.0], [1.0], [9.0]]), (1, 2))  # (neurons, out)
    params, x = {"up": {"kernel": up}, "classifier": {"kernel": head}}, jnp.ones((4, 2))
    by_default = jp.scores.magnitude(params)
    by_all = jp.scores.magnitude(params, prunable=lambda name, leaf: True)
    kept = {
        name: [*jp.shrink(fn, params, [x], scores, 2 / 3).report["kept"].values()]
        for name, scores in {"default": by_default, "all": by_all}.items()
    }
    # The columns of `up` sum to 6, 4, 2, and with the rows of the head to 8, 6, 20.
    assert kept == {"default": [[0, 1]], "all": [[0, 2]]}

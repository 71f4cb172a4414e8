"""The GPT: its leaves, numbers, errors, cache and sampling, against closed forms."""

import dataclasses
import doctest
import functools
import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import gpt
from experiments.gpt.config import (
    PRESETS,
    flops_per_token,
    matrix_sizes,
    preset,
)
from jaxprune.arrays import tree
from tests.support.gpt_model import TINY, make_model, make_tokens, run

INITIAL = preset("medium", vocab_size=512, layers=3, bias=True, tie_weights=False)


@pytest.fixture(scope="module", autouse=True)
def small_preset():
    """Takes the place of the folder's: the presets here are the published ones."""


@functools.partial(jax.jit, static_argnames="graphdef")
def _call_loss(graphdef, params, *batch, **options):
    return gpt.loss(nnx.merge(graphdef, params), *batch, **options)


def _loss(model, *batch, **options):
    return _call_loss(*nnx.split(model, nnx.Param), *batch, **options)


def _shapes(config):
    """Leaf name -> abstract leaf, without making an array."""
    abstract = nnx.eval_shape(lambda: gpt.GPT(config, rngs=nnx.Rngs(0)))
    _, params = nnx.split(abstract, nnx.Param)  # fails where there is more
    return _flat(params)


def _flat(params):
    return dict(zip(tree.names(params), jax.tree.leaves(params), strict=True))


# ---- shape


def test_leaves_have_the_documented_names_and_shapes():
    w = TINY.width
    block = {
        "norm_attention/scale": (w,),
        "norm_attention/bias": (w,),
        "attention/qkv/kernel": (w, 3 * w),
        "attention/qkv/bias": (3 * w,),
        "attention/out/kernel": (w, w),
        "attention/out/bias": (w,),
        "norm_mlp/scale": (w,),
        "norm_mlp/bias": (w,),
        "mlp/up/kernel": (w, 4 * w),
        "mlp/up/bias": (4 * w,),
        "mlp/down/kernel": (4 * w, w),
        "mlp/down/bias": (w,),
    }
    expected = {f"blocks/{i}/{n}": s for i in range(2) for n, s in block.items()}
    expected |= {"token_embedding/embedding": (11, w), "norm/scale": (w,)}
    expected |= {"position_embedding/embedding": (8, w), "norm/bias": (w,)}
    expected |= {"head/kernel": (w, 11)}
    config = dataclasses.replace(TINY, bias=True, tie_weights=False)
    assert {n: leaf.shape for n, leaf in _shapes(config).items()} == expected
    plain = {n: s for n, s in expected.items() if "bias" not in n and "head" not in n}
    assert {n: leaf.shape for n, leaf in _shapes(TINY).items()} == plain


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_variable_is_a_float32_parameter(dtype):
    config = dataclasses.replace(TINY, dropout=0.1, dtype=dtype)
    assert {leaf.dtype for leaf in _shapes(config).values()} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", [n for n in PRESETS if n != "gpt2"])
def test_presets_have_the_size_of_the_closed_form(name):
    config = preset(name, vocab_size=65)
    w = config.width
    closed = (65 + config.context) * w + config.layers * (12 * w * w + 2 * w) + w
    assert sum(leaf.size for leaf in _shapes(config).values()) == closed


def test_gpt2_has_124_439_808_parameters():
    assert sum(leaf.size for leaf in _shapes(preset("gpt2")).values()) == 124_439_808


def test_a_preset_takes_changes():
    assert preset("gpt2", vocab_size=65, layers=2).vocab_size == 65


@pytest.mark.full
def test_parameters_are_made_where_they_belong():
    mesh = jax.make_mesh((8,), ("data",))
    sharding = jax.NamedSharding(mesh, jax.P())
    made = jax.jit(
        lambda: nnx.state(gpt.GPT(TINY, rngs=nnx.Rngs(0)), nnx.Param),
        out_shardings=sharding,
    )
    leaves, plain = jax.tree.leaves(made()), jax.tree.leaves(nnx.state(make_model()))
    assert all(leaf.sharding == sharding for leaf in leaves)
    for leaf, expected in zip(leaves, plain, strict=True):
        np.testing.assert_allclose(leaf, expected, rtol=1e-6, atol=1e-8)


# ---- initial values


@pytest.mark.full
def test_initial_values_follow_nanogpt():
    config = INITIAL
    for name, leaf in _flat(nnx.state(make_model(config), nnx.Param)).items():
        values = np.asarray(leaf, np.float64)
        if name.endswith("scale"):
            assert (values == 1).all()
        elif name.endswith("bias"):
            assert (values == 0).all()
        else:
            residual = name.endswith(("out/kernel", "down/kernel"))
            std = 0.02 / math.sqrt(2 * config.layers) if residual else 0.02
            # Five standard errors of a mean and of a standard deviation.
            error = 5 * std / math.sqrt(values.size)
            assert abs(values.mean()) < error, name
            assert abs(values.std() - std) < error, name


@pytest.mark.full
def test_the_initial_loss_is_that_of_a_uniform_guess():
    tokens = make_tokens((2, 64), config=INITIAL)
    targets = make_tokens((2, 64), seed=1, config=INITIAL)
    # nanoGPT's small initial logits: within a few hundredths of log(512).
    loss = _loss(make_model(INITIAL), tokens, targets)
    assert abs(loss - math.log(512)) < 0.1


# ---- forward


def test_a_later_token_does_not_change_earlier_logits():
    model, tokens = make_model(), make_tokens()
    changed = tokens.copy()
    changed[:, 5] = (changed[:, 5] + 1) % TINY.vocab_size
    before, after = (np.asarray(run(model, x)) for x in (tokens, changed))
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(axis=-1).all()


def test_an_untied_head_that_copies_the_embedding_gives_the_tied_logits():
    tied = make_model()
    untied = make_model(dataclasses.replace(TINY, tie_weights=False))
    values = _flat(nnx.state(tied, nnx.Param))
    values["head/kernel"] = np.asarray(values["token_embedding/embedding"]).T
    graphdef, params = nnx.split(untied, nnx.Param)
    leaves = [values[name] for name in tree.names(params)]
    untied = nnx.merge(graphdef, jax.tree.structure(params).unflatten(leaves))
    np.testing.assert_allclose(
        run(untied, make_tokens()), run(tied, make_tokens()), rtol=0, atol=1e-6
    )


def test_logits_are_float32_and_bfloat16_products_stay_near():
    tokens = make_tokens()
    low = make_model(dataclasses.replace(TINY, dtype="bfloat16"))
    exact, rounded = (np.asarray(run(model, tokens)) for model in (make_model(), low))
    assert exact.dtype == rounded.dtype == jnp.float32
    # bfloat16 keeps 8 bits: a few thousandths of the largest logit, 10 % is ample.
    assert np.abs(exact - rounded).max() < 0.1 * np.abs(exact).max()
    assert not np.array_equal(exact, rounded)


def test_a_token_past_the_vocabulary_gives_nan():
    bad = make_tokens()
    bad[0, 3] = TINY.vocab_size
    assert np.isnan(np.asarray(run(make_model(), bad))[0, 3]).all()
    assert np.isnan(_loss(make_model(), make_tokens(), bad))


@pytest.mark.full
def test_dropout_needs_a_key_and_repeats_with_it():
    config = dataclasses.replace(TINY, dropout=0.5)
    model, tokens = make_model(config), make_tokens()
    one, two = jax.random.key(1), jax.random.key(2)
    none, first, second = (run(model, tokens, key=key) for key in (None, one, two))
    np.testing.assert_array_equal(none, run(make_model(), tokens))
    np.testing.assert_array_equal(first, run(model, tokens, key=one))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, none)
    np.testing.assert_array_equal(run(make_model(), tokens, key=one), none)


# ---- loss and gradient


def test_loss_is_the_float64_cross_entropy_and_weights_pick_tokens():
    model, tokens, targets = make_model(), make_tokens(), make_tokens(seed=1)
    logits = np.asarray(run(model, tokens), np.float64)
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    nats = -np.log(np.take_along_axis(shares, targets[..., None], -1))
    nats = nats[..., 0]
    np.testing.assert_allclose(_loss(model, tokens, targets), nats.mean(), rtol=1e-6)
    weights = np.zeros(tokens.shape, np.float32)
    weights[0], weights[1, 2] = 1, 3
    expected = (nats * weights).sum() / weights.sum()
    weighted = _loss(model, tokens, targets, weights=weights)
    np.testing.assert_allclose(weighted, expected, rtol=1e-6)


@pytest.mark.full
@pytest.mark.parametrize(
    "axis_type", ["Explicit", pytest.param("Auto", marks=pytest.mark.full)]
)
def test_gradients_on_eight_devices_are_those_on_one(axis_type):
    model = make_model(dataclasses.replace(TINY, layers=1))
    graphdef, params = nnx.split(model, nnx.Param)
    tokens = make_tokens((8, 8))

    @jax.jit
    def gradient(params, tokens):
        return jax.value_and_grad(
            lambda p: gpt.loss(nnx.merge(graphdef, p), tokens, tokens)
        )(params)

    expected = jax.tree.leaves(gradient(params, tokens))
    axis = getattr(jax.sharding.AxisType, axis_type)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis,))
    with jax.set_mesh(mesh):
        params = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
        tokens = jax.device_put(tokens, jax.NamedSharding(mesh, jax.P("data")))
        got = jax.tree.leaves(gradient(params, tokens))
    for a, b in zip(got, expected, strict=True):
        # Sums over eight parts round differently.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# ---- operations


@pytest.mark.full
@pytest.mark.parametrize("module", ["config", "model"])
def test_the_examples_of_the_docstrings_run(module):
    imported = importlib.import_module(f"experiments.gpt.{module}")
    tried = doctest.testmod(imported)
    assert tried.attempted > 0
    assert tried.failed == 0


def test_matrix_sizes_are_those_of_the_leaves():
    for tied in (True, False):
        config = dataclasses.replace(TINY, tie_weights=tied)
        shapes = _shapes(config)
        kernels = {n: leaf.size for n, leaf in shapes.items() if "kernel" in n}
        if tied:
            kernels["token_embedding/embedding"] = 11 * 8
        assert matrix_sizes(config) == kernels


def test_flops_follow_the_closed_form():
    w, t = TINY.width, TINY.context
    attention = 2 * 4 * w * t
    assert flops_per_token(TINY) == 2 * (2 * 12 * w * w + 11 * w) + attention
    name = "blocks/1/mlp/up/kernel"
    kept = flops_per_token(TINY, {name: 77 / (4 * w * w)})
    assert flops_per_token(TINY) - kept == 2 * 77
    everything = dict.fromkeys(matrix_sizes(TINY), 1.0)
    assert flops_per_token(TINY, everything) == attention

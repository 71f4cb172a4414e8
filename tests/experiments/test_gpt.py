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
    GPTConfig,
    flops_per_token,
    matrix_sizes,
    preset,
)
from experiments.gpt.linear import product
from jaxprune.arrays import tree
from jaxprune.models.generate import _draw, generate

TINY = GPTConfig(vocab_size=11, context=8, layers=2, heads=2, width=8)
INITIAL = preset("medium", vocab_size=512, layers=3, bias=True, tie_weights=False)


@pytest.fixture(scope="module", autouse=True)
def small_preset():
    """Takes the place of the folder's: the presets here are the published ones."""


@functools.cache
def _model(config=TINY, seed=0):
    return gpt.GPT(config, rngs=nnx.Rngs(seed))


def _times(factor):
    """The model with all weights larger: at initialisation each repeats itself."""
    graphdef, params = nnx.split(_model(), nnx.Param)
    return nnx.merge(graphdef, jax.tree.map(lambda x: factor * x, params))


@functools.partial(jax.jit, static_argnames="graphdef")
def _call(graphdef, params, tokens, **options):
    return nnx.merge(graphdef, params)(tokens, **options)


def _run(model, tokens, **options):
    """What the model gives; one program for each shape of one model."""
    return _call(*nnx.split(model, nnx.Param), tokens, **options)


@functools.partial(jax.jit, static_argnames="graphdef")
def _call_loss(graphdef, params, *batch, **options):
    return gpt.loss(nnx.merge(graphdef, params), *batch, **options)


def _loss(model, *batch, **options):
    return _call_loss(*nnx.split(model, nnx.Param), *batch, **options)


def _tokens(shape=(3, 8), seed=0, config=TINY):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(0, config.vocab_size, shape), jnp.int32)


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


def test_parameters_are_made_where_they_belong():
    mesh = jax.make_mesh((8,), ("data",))
    where = jax.NamedSharding(mesh, jax.P())
    made = jax.jit(
        lambda: nnx.state(gpt.GPT(TINY, rngs=nnx.Rngs(0)), nnx.Param),
        out_shardings=where,
    )
    leaves, eager = jax.tree.leaves(made()), jax.tree.leaves(nnx.state(_model()))
    assert all(leaf.sharding == where for leaf in leaves)
    for leaf, expected in zip(leaves, eager, strict=True):
        np.testing.assert_allclose(leaf, expected, rtol=1e-6, atol=1e-8)


# ---- initial values


def test_initial_values_follow_nanogpt():
    config = INITIAL
    for name, leaf in _flat(nnx.state(_model(config), nnx.Param)).items():
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


def test_the_initial_loss_is_that_of_a_uniform_guess():
    tokens = _tokens((2, 64), config=INITIAL)
    targets = _tokens((2, 64), seed=1, config=INITIAL)
    # nanoGPT's small initial logits: within a few hundredths of log(512).
    loss = _loss(_model(INITIAL), tokens, targets)
    assert abs(loss - math.log(512)) < 0.1


# ---- forward


def test_a_later_token_does_not_change_earlier_logits():
    model, tokens = _model(), _tokens()
    changed = tokens.at[:, 5].set((tokens[:, 5] + 1) % TINY.vocab_size)
    before, after = _run(model, tokens), _run(model, changed)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(axis=-1).all()


def test_an_untied_head_that_copies_the_embedding_gives_the_tied_logits():
    tied = _model()
    untied = _model(dataclasses.replace(TINY, tie_weights=False))
    values = _flat(nnx.state(tied, nnx.Param))
    values["head/kernel"] = values["token_embedding/embedding"].T
    graphdef, params = nnx.split(untied, nnx.Param)
    leaves = [values[name] for name in tree.names(params)]
    untied = nnx.merge(graphdef, jax.tree.structure(params).unflatten(leaves))
    np.testing.assert_allclose(
        _run(untied, _tokens()), _run(tied, _tokens()), rtol=0, atol=1e-6
    )


def test_logits_are_float32_and_bfloat16_products_stay_near():
    tokens = _tokens()
    exact = _run(_model(), tokens)
    rounded = _run(_model(dataclasses.replace(TINY, dtype="bfloat16")), tokens)
    assert exact.dtype == rounded.dtype == jnp.float32
    # bfloat16 keeps 8 bits: a few thousandths of the largest logit, 10 % is ample.
    assert np.abs(exact - rounded).max() < 0.1 * np.abs(exact).max()
    assert not np.array_equal(exact, rounded)


def test_a_token_past_the_vocabulary_gives_nan():
    bad = _tokens().at[0, 3].set(TINY.vocab_size)
    assert np.isnan(_run(_model(), bad)[0, 3]).all()
    assert np.isnan(_loss(_model(), _tokens(), bad))


def test_dropout_needs_a_key_and_repeats_with_it():
    config = dataclasses.replace(TINY, dropout=0.5)
    model, tokens = _model(config), _tokens()
    one, two = jax.random.key(1), jax.random.key(2)
    none, first, second = (_run(model, tokens, key=key) for key in (None, one, two))
    np.testing.assert_array_equal(none, _run(_model(), tokens))
    np.testing.assert_array_equal(first, _run(model, tokens, key=one))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, none)
    np.testing.assert_array_equal(_run(_model(), tokens, key=one), none)


# ---- loss and gradient


def test_loss_is_the_float64_cross_entropy_and_weights_pick_tokens():
    model, tokens, targets = _model(), _tokens(), _tokens(seed=1)
    logits = np.asarray(_run(model, tokens), np.float64)
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    nats = -np.log(np.take_along_axis(shares, np.asarray(targets)[..., None], -1))
    nats = nats[..., 0]
    np.testing.assert_allclose(_loss(model, tokens, targets), nats.mean(), rtol=1e-6)
    weights = jnp.zeros(tokens.shape).at[0].set(1).at[1, 2].set(3)
    expected = (nats * np.asarray(weights)).sum() / weights.sum()
    weighted = _loss(model, tokens, targets, weights=weights)
    np.testing.assert_allclose(weighted, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("result", [None, jnp.float32])
def test_product_has_the_gradient_of_the_plain_product(dtype, result):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, 3, 4), dtype)
    kernel = jax.random.normal(keys[1], (4, 5), dtype)
    g = jax.random.normal(keys[2], (2, 3, 5), result or dtype)
    y, pull = jax.vjp(lambda *a: product(*a, preferred_element_type=result), x, kernel)
    x64, kernel64, g64 = (np.asarray(a, np.float64) for a in (x, kernel, g))
    expected = (
        x64 @ kernel64,
        g64 @ kernel64.T,
        np.einsum("bti,bto->io", x64, g64),
    )
    # A gradient is rounded to 8 bits in bfloat16, once on its way in and once out.
    tolerance = 1e-6 if dtype == "float32" else 0.02
    for got, want in zip((y, *pull(g)), expected, strict=True):
        scale = np.abs(want).max()
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * scale)
    assert [a.dtype for a in pull(g)] == [x.dtype, kernel.dtype]


@pytest.mark.full
@pytest.mark.parametrize(
    "kind", ["Explicit", pytest.param("Auto", marks=pytest.mark.full)]
)
def test_gradients_on_eight_devices_are_those_on_one(kind):
    graphdef, params = nnx.split(_model(), nnx.Param)
    tokens = _tokens((8, 8))

    @jax.jit
    def gradient(params, tokens):
        return jax.value_and_grad(
            lambda p: gpt.loss(nnx.merge(graphdef, p), tokens, tokens)
        )(params)

    expected = jax.tree.leaves(gradient(params, tokens))
    axis = getattr(jax.sharding.AxisType, kind)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis,))
    with jax.set_mesh(mesh):
        params = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
        tokens = jax.device_put(tokens, jax.NamedSharding(mesh, jax.P("data")))
        got = jax.tree.leaves(gradient(params, tokens))
    for a, b in zip(got, expected, strict=True):
        # Sums over eight parts round differently.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# ---- cache and sampling


def test_cached_logits_are_the_full_logits():
    model, tokens = _model(), _tokens()
    full = _run(model, tokens)
    logits, cache = _run(model, tokens[:, :3], cache=model.init_cache(3))
    parts = [logits]
    for t in range(3, 8):
        logits, cache = _run(model, tokens[:, t : t + 1], cache=cache)
        parts.append(logits)
    assert int(cache.length) == 8
    np.testing.assert_allclose(jnp.concatenate(parts, 1), full, rtol=0, atol=1e-6)


def _greedy(model, tokens, steps):
    """The likeliest token again and again, each from a full pass: the oracle."""
    context = model.config.context
    for _ in range(steps):
        window = tokens[:, -context:]
        padding = ((0, 0), (0, context - window.shape[1]))  # not seen: causal
        logits = _run(model, np.pad(window, padding))[:, window.shape[1] - 1]
        tokens = np.concatenate([tokens, np.argmax(logits, -1)[:, None]], axis=1)
    return tokens


@pytest.mark.parametrize(("time", "steps"), [(3, 12), (8, 4), (11, 3), (7, 1)])
def test_temperature_zero_takes_the_likeliest_token(time, steps):
    model = _times(10)
    prompt = _tokens((2, time))
    options = {"steps": steps, "key": jax.random.key(0), "sliding": True}
    expected = _greedy(model, prompt, steps)
    np.testing.assert_array_equal(
        generate(model, prompt, temperature=0.0, **options), expected
    )
    np.testing.assert_array_equal(generate(model, prompt, top_k=1, **options), expected)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (2.0, 4)])
def test_draws_have_the_frequencies_of_the_softmax(temperature, top_k):
    model = _times(5)
    count = 4000
    prompt = jnp.tile(_tokens((1, 4)), (count, 1))
    drawn = generate(
        model,
        prompt,
        steps=1,
        key=jax.random.key(0),
        temperature=temperature,
        top_k=top_k,
    )
    logits = np.asarray(_run(model, prompt[:1])[0, -1], np.float64) / temperature
    if top_k is not None:
        logits[np.argsort(-logits, kind="stable")[top_k:]] = -np.inf
    shares = np.exp(logits) / np.exp(logits).sum()
    observed = np.bincount(drawn[:, -1], minlength=TINY.vocab_size) / count
    # Five standard errors of a share of 4000 draws; shares of zero stay zero.
    error = 5 * np.sqrt(shares * (1 - shares) / count)
    assert (np.abs(observed - shares) <= error).all()


def test_generation_keeps_the_prompt_and_repeats_with_its_key():
    model, prompt = _model(), _tokens((2, 3))
    options = {"steps": 5, "key": jax.random.key(7)}
    first, again = (generate(model, prompt, **options) for _ in range(2))
    assert first.shape == (2, 8)
    assert first.dtype == jnp.int32
    np.testing.assert_array_equal(first[:, :3], prompt)
    np.testing.assert_array_equal(first, again)
    none = generate(model, prompt, steps=0, key=jax.random.key(7))
    np.testing.assert_array_equal(none, prompt)


def test_other_parameters_and_temperatures_reuse_the_program():
    prompt, key = _tokens((2, 3)), jax.random.key(7)
    generate(_model(), prompt, steps=5, key=key)
    compiled = _draw._cache_size()
    graphdef, params = nnx.split(_model(seed=1), nnx.Param)
    other = nnx.merge(graphdef, jax.tree.map(jnp.zeros_like, params))
    generate(other, prompt, steps=5, key=key, temperature=0.3)
    assert _draw._cache_size() == compiled


def test_generation_runs_under_jit():
    model, prompt, key = _model(), _tokens((2, 3)), jax.random.key(7)
    inside = jax.jit(lambda p: generate(model, p, steps=5, key=key))(prompt)
    np.testing.assert_array_equal(inside, generate(model, prompt, steps=5, key=key))


# ---- operations


@pytest.mark.parametrize("module", ["config", "model"])
def test_the_examples_of_the_docstrings_run(module):
    found = importlib.import_module(f"experiments.gpt.{module}")
    tried = doctest.testmod(found)
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


# ---- errors


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 10, "heads": 4}, "divisible by heads.*take width=12"),
        ({"vocab_size": 0}, "vocab_size to be a positive integer, got 0"),
        ({"layers": 2.0}, "layers to be a positive integer, got 2.0"),
        ({"heads": True}, "heads to be a positive integer, got True"),
        ({"context": -1}, "context to be a positive integer"),
        ({"dropout": 1.0}, r"dropout in \[0, 1\), got 1.0"),
        ({"dropout": math.nan}, "dropout in"),
        ({"gelu": "relu"}, "gelu to be one of erf, tanh, got 'relu'"),
        ({"dtype": "float16"}, "dtype to be one of float32, bfloat16"),
    ],
)
def test_a_wrong_configuration_says_what_to_change(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(TINY, **changes)


def test_an_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match="cpu, medium, char, gpt2, got 'huge'"):
        preset("huge")


@pytest.mark.parametrize(
    ("tokens", "error", "words"),
    [
        (jnp.zeros((1, 9), jnp.int32), ValueError, "at most 8 tokens.*got 9"),
        (jnp.zeros(4, jnp.int32), ValueError, r"\(batch, time\), got \(4,\)"),
        (jnp.zeros((1, 4)), TypeError, "integer tokens, got float32"),
    ],
)
def test_wrong_tokens_are_refused_before_anything_runs(tokens, error, words):
    with pytest.raises(error, match=words):
        jax.eval_shape(_model(), tokens)


def test_more_tokens_than_a_cache_holds_are_refused():
    model = _model()
    with pytest.raises(ValueError, match="at most 2 tokens"):
        model(_tokens((1, 3)), cache=model.init_cache(1, 2))
    with pytest.raises(ValueError, match="size <= context, got 9 > 8"):
        model.init_cache(1, 9)


@pytest.mark.parametrize("name", ["targets", "weights"])
def test_loss_refuses_another_shape(name):
    arrays = {"targets": _tokens(), "weights": jnp.ones((3, 8))}
    arrays[name] = arrays[name][:, :1]
    with pytest.raises(ValueError, match=rf"{name} of the tokens' shape \(3, 8\)"):
        gpt.loss(_model(), _tokens(), **arrays)


@pytest.mark.parametrize(
    ("prompt", "options", "error", "words"),
    [
        ((2, 3), {"steps": 6}, ValueError, "3 . 6 > 8; sliding=True"),
        ((2, 0), {}, ValueError, "time >= 1"),
        ((3,), {}, ValueError, r"shape \(batch, time\)"),
        ((2, 3), {"steps": -1}, ValueError, "steps >= 0, got -1"),
        ((2, 3), {"temperature": -0.1}, ValueError, "temperature >= 0, got -0.1"),
        ((2, 3), {"temperature": math.nan}, ValueError, "finite temperature"),
        ((2, 3), {"top_k": 0}, ValueError, r"top_k in \[1, 11\], got 0"),
        ((2, 3), {"top_k": 12}, ValueError, r"top_k in \[1, 11\], got 12"),
    ],
)
def test_generate_says_the_way_out(prompt, options, error, words):
    options = {"steps": 1, "key": jax.random.key(0), **options}
    with pytest.raises(error, match=words):
        generate(_model(), jnp.zeros(prompt, jnp.int32), **options)


@pytest.mark.parametrize("token", [-1, 11])
def test_generate_refuses_tokens_of_another_vocabulary(token):
    prompt = jnp.array([[1, token]], jnp.int32)
    with pytest.raises(ValueError, match=rf"in \[0, 11\), got {token};"):
        generate(_model(), prompt, steps=1, key=jax.random.key(0))


def test_generate_refuses_a_floating_prompt():
    with pytest.raises(TypeError, match="integer prompt, got float32"):
        generate(_model(), jnp.zeros((1, 2)), steps=1, key=jax.random.key(0))


def test_flops_refuse_unknown_names_and_shares():
    with pytest.raises(ValueError, match="got blocks/9/mlp; matrix_sizes"):
        flops_per_token(TINY, {"blocks/9/mlp": 0.5})
    with pytest.raises(ValueError, match=r"share in \[0, 1\], got 1.5 at 'blocks/0"):
        flops_per_token(TINY, {"blocks/0/mlp/up/kernel": 1.5})

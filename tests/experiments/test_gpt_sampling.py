"""Cache and sampling of the GPT."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxprune.lm.models.generate import _draw, generate
from tests.support.gpt_model import TINY, larger, make_model, make_tokens, run

# ---- cache and sampling


def test_cached_logits_are_the_full_logits():
    model, tokens = make_model(), make_tokens()
    full = run(model, tokens)
    logits, cache = run(model, tokens[:, :3], cache=model.init_cache(3))
    parts = [logits]
    for t in range(3, 8):
        logits, cache = run(model, tokens[:, t : t + 1], cache=cache)
        parts.append(logits)
    assert int(cache.length) == 8
    np.testing.assert_allclose(np.concatenate(parts, 1), full, rtol=0, atol=1e-6)


def _greedy(model, tokens, steps):
    """The likeliest token again and again, each from a full pass: the oracle."""
    context = model.config.context
    for _ in range(steps):
        window = tokens[:, -context:]
        padding = ((0, 0), (0, context - window.shape[1]))  # not seen: causal
        logits = np.asarray(run(model, np.pad(window, padding)))
        logits = logits[:, window.shape[1] - 1]
        tokens = np.concatenate([tokens, np.argmax(logits, -1)[:, None]], axis=1)
    return tokens


@pytest.mark.parametrize(
    ("time", "steps"),
    [
        pytest.param(3, 12, marks=pytest.mark.full),
        pytest.param(8, 4, marks=pytest.mark.full),
        (11, 3),
        (7, 1),
    ],
)
def test_temperature_zero_takes_the_likeliest_token(time, steps):
    model = larger(10)
    prompt = make_tokens((2, time))
    options = {"steps": steps, "key": jax.random.key(0), "sliding": True}
    expected = _greedy(model, prompt, steps)
    np.testing.assert_array_equal(
        generate(model, prompt, temperature=0.0, **options), expected
    )
    np.testing.assert_array_equal(generate(model, prompt, top_k=1, **options), expected)


@pytest.mark.parametrize(
    ("temperature", "top_k"),
    [(1.0, None), (0.5, None), pytest.param(2.0, 4, marks=pytest.mark.full)],
)
def test_draws_have_the_frequencies_of_the_softmax(temperature, top_k):
    model = larger(5)
    count = 4000
    prompt = np.tile(make_tokens((1, 4)), (count, 1))
    drawn = generate(
        model,
        prompt,
        steps=1,
        key=jax.random.key(0),
        temperature=temperature,
        top_k=top_k,
    )
    logits = np.asarray(run(model, prompt[:1]), np.float64)[0, -1] / temperature
    if top_k is not None:
        logits[np.argsort(-logits, kind="stable")[top_k:]] = -np.inf
    shares = np.exp(logits) / np.exp(logits).sum()
    observed = np.bincount(np.asarray(drawn)[:, -1], minlength=TINY.vocab_size) / count
    # Five standard errors of a share of 4000 draws; shares of zero stay zero.
    error = 5 * np.sqrt(shares * (1 - shares) / count)
    assert (np.abs(observed - shares) <= error).all()


def test_generation_keeps_the_prompt_and_repeats_with_its_key():
    model, prompt = make_model(), make_tokens((2, 3))
    options = {"steps": 5, "key": jax.random.key(7)}
    first, again = (generate(model, prompt, **options) for _ in range(2))
    assert first.shape == (2, 8)
    assert first.dtype == jnp.int32
    np.testing.assert_array_equal(np.asarray(first)[:, :3], prompt)
    np.testing.assert_array_equal(first, again)
    none = generate(model, prompt, steps=0, key=jax.random.key(7))
    np.testing.assert_array_equal(none, prompt)


def test_other_parameters_and_temperatures_reuse_the_program():
    prompt, key = make_tokens((2, 3)), jax.random.key(7)
    generate(make_model(), prompt, steps=5, key=key)
    compiled = _draw._cache_size()
    graphdef, params = nnx.split(make_model(seed=1), nnx.Param)
    zeros = jax.tree.map(lambda x: jnp.asarray(np.zeros(x.shape, x.dtype)), params)
    other = nnx.merge(graphdef, zeros)
    generate(other, prompt, steps=5, key=key, temperature=0.3)
    assert _draw._cache_size() == compiled


@pytest.mark.full
def test_generation_runs_under_jit():
    model, prompt, key = make_model(), make_tokens((2, 3)), jax.random.key(7)
    inside = jax.jit(lambda p: generate(model, p, steps=5, key=key))(prompt)
    np.testing.assert_array_equal(inside, generate(model, prompt, steps=5, key=key))

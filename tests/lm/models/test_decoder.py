"""The decoder against a slow one in float64, and its shortcuts against full passes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxprune as jp
from jaxprune.arrays import tree
from jaxprune.lm.models import hf
from jaxprune.lm.models.decoder import rope
from jaxprune.lm.models.decoder.model import Decoder, loss_per_token
from jaxprune.lm.models.generate import generate
from jaxprune.lm.models.hf import decoder_config
from tests.support import tiny_hf
from tests.support.plain_decoder import PLAIN


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """Random models by their configuration and the layers kept, each made once."""

    @functools.cache
    def model(name, *layers):
        folder = tmp_path_factory.mktemp(name)
        tiny_hf.random_folder(name, folder)
        loaded = hf.load(folder)
        if not layers:
            return loaded.model
        params = nnx.state(loaded.model, nnx.Param)
        config, few = hf.keep_layers(loaded.config, params, layers)
        return nnx.merge(nnx.split(hf.abstract(config), nnx.Param)[0], few)

    return model


@functools.partial(jax.jit, static_argnames="graphdef")
def _call(graphdef, params, tokens, **options):
    return nnx.merge(graphdef, params)(tokens, **options)


def _run(model, tokens, **options):
    """What the model gives; one program for each shape of one model."""
    return _call(*nnx.split(model, nnx.Param), tokens, **options)


# ---- a slow decoder in float64, from the formulas


def _rms(x, scale, epsilon):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * scale


def _turned(x, positions, theta):
    """Pair (i, i + d / 2) as a complex number, turned by its angle."""
    half = x.shape[-1] // 2
    frequencies = float(theta) ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(
        1j * np.outer(positions, frequencies)
    )
    return np.concatenate([turned.real, turned.imag], axis=-1)


def _slow(config, tensors, tokens):
    """Logits of one sequence, for Llama, Mistral, Qwen 3 and Gemma 3."""
    t = {key.removeprefix("model."): v.astype(np.float64) for key, v in tensors.items()}
    gemma = config["model_type"] == "gemma3_text"
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    kinds = config.get("layer_types", ["full_attention"] * 9)
    table, width = t["embed_tokens.weight"], config["hidden_size"]
    x = table[tokens] * (math.sqrt(width) if gemma else 1)
    positions = np.arange(len(tokens))

    def norm(x, name):
        return _rms(x, t[name + ".weight"] + gemma, 1e-6)

    for i in range(config["num_hidden_layers"]):
        at = f"layers.{i}."
        h = norm(x, at + "input_layernorm")
        local = kinds[i] == "sliding_attention"
        theta = (1e4 if local else 1e6) if gemma else 1e4
        window = config.get("sliding_window") if local or not gemma else None
        out = []
        for head in range(heads):
            q, k, v = (
                (h @ t[f"{at}self_attn.{p}_proj.weight"].T).reshape(len(x), n, -1)
                for p, n in (("q", heads), ("k", kv), ("v", kv))
            )
            q, k, v = q[:, head], k[:, head * kv // heads], v[:, head * kv // heads]
            if at + "self_attn.q_norm.weight" in t:
                q = norm(q, at + "self_attn.q_norm")
                k = norm(k, at + "self_attn.k_norm")
            q, k = _turned(q, positions, theta), _turned(k, positions, theta)
            scores = (
                q @ k.T / math.sqrt(config.get("query_pre_attn_scalar", q.shape[-1]))
            )
            for row in positions:
                first = 0 if window is None else max(0, row - window + 1)
                seen = np.exp(scores[row, first : row + 1])
                out.append(seen @ v[first : row + 1] / seen.sum())
        out = np.array(out).reshape(heads, len(x), -1).transpose(1, 0, 2)
        y = out.reshape(len(x), -1) @ t[at + "self_attn.o_proj.weight"].T
        x = x + (norm(y, at + "post_attention_layernorm") if gemma else y)
        before = "pre_feedforward" if gemma else "post_attention"
        h = norm(x, f"{at}{before}_layernorm")
        gate = h @ t[at + "mlp.gate_proj.weight"].T
        inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
        gate *= (1 + np.tanh(inner)) / 2 if gemma else 1 / (1 + np.exp(-gate))
        y = gate * (h @ t[at + "mlp.up_proj.weight"].T)
        y = y @ t[at + "mlp.down_proj.weight"].T
        x = x + (norm(y, at + "post_feedforward_layernorm") if gemma else y)
    return norm(x, "norm") @ t.get("lm_head.weight", table).T


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma3"])
def test_logits_are_those_of_the_formulas(name, model_of):
    model, tokens = model_of(name), tiny_hf.tokens(time=24)
    got = _run(model, tokens)
    tensors, config = tiny_hf.random_tensors(name), tiny_hf.config_json(name)
    for row, ids in zip(got, tokens, strict=True):
        expected = _slow(config, tensors, ids)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(row, expected, rtol=0, atol=2e-5 * scale)


# ---- the tree, and what a trace of the program sees


@pytest.mark.parametrize("name", tiny_hf.CONFIGS)
def test_the_matrices_of_the_layers_may_be_pruned_and_nothing_else(name):
    config = decoder_config(tiny_hf.config_json(name))
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    leaves = tree.named_leaves(nnx.state(model, nnx.Param))
    prunable = [n for n, leaf in leaves.items() if jp.tree.prunable(n, leaf)]
    kernels = [n for n in leaves if n.startswith("layers/") and n.endswith("kernel")]
    assert prunable == kernels
    assert len(kernels) == config.layers * (
        (2 if config.fused else 4) + 2 + (config.gated and not config.fused)
    )


def test_leaves_have_these_names():
    model = nnx.eval_shape(lambda: Decoder(PLAIN, rngs=nnx.Rngs(0)))
    names = set(tree.names(nnx.state(model, nnx.Param)))
    assert {n for n in names if not n.startswith("layers/1")} == {
        "embedding/embedding",
        "norm/scale",
        "head/kernel",
        *(f"layers/0/attention/{n}/kernel" for n in ("q", "k", "v", "out")),
        *(f"layers/0/mlp/{n}/kernel" for n in ("gate", "up", "down")),
        *(f"layers/0/norm_{n}/scale" for n in ("attention", "mlp")),
    }


@pytest.mark.parametrize(
    "name", ["gpt2", "phi3-long", "gemma3", "qwen2", "olmo2", "cohere-norms", "falcon"]
)
def test_each_matrix_meets_its_input_in_one_product(name):
    config = decoder_config(tiny_hf.config_json(name))
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(model, nnx.Param)
    with jax.disable_jit():
        jaxpr = jax.make_jaxpr(lambda p, t: nnx.merge(graphdef, p)(t))(
            params, jnp.zeros((2, 12), jnp.int32)
        ).jaxpr
    names = dict(zip(jaxpr.invars, tree.names(params), strict=False))
    # Those with a kernel have a gradient of their own (`models.product`).
    products = [
        eqn.invars
        for eqn in jaxpr.eqns
        if eqn.primitive.name.startswith(("dot_general", "custom_vjp_call"))
    ]
    met = [names[v] for pair in products for v in pair if v in names]
    head = "embedding/embedding" if config.tie_weights else "head/kernel"
    kernels = [n for n in names.values() if n.endswith("kernel") and n != head]
    assert sorted(met) == sorted([*kernels, head])
    assert len(products) == len(met) + 2 * config.layers  # and the attention's two


def test_the_model_is_its_parameters(model_of):
    model, tokens = model_of("llama"), tiny_hf.tokens(time=24)
    again = nnx.merge(*nnx.split(model, nnx.Param))
    np.testing.assert_array_equal(_run(again, tokens), _run(model, tokens))


# ---- caches


def _cached(model, tokens, size, steps):
    """Logits with a cache, the tokens in pieces of these lengths."""
    # Where the parameters lie: else the second call is another program.
    cache = jax.device_put(model.init_cache(len(tokens), size), jax.devices()[0])
    parts, done = [], 0
    for count in steps:
        logits, cache = _run(model, tokens[:, done : done + count], cache=cache)
        parts.append(logits)
        done += count
    assert int(cache.length) == done
    return np.concatenate(parts, axis=1)


# Pieces longer and shorter than the window, in a cache with room to spare or without.
PIECES = [9, 4] + [1] * 11
# Two pieces of one length, which are one program.
EQUAL = [8, 8] + [1] * 8


@pytest.mark.parametrize(
    ("name", "layers", "size", "pieces"),
    [
        ("mistral", (), 30, PIECES),
        pytest.param("gemma3", (1, 2), 24, PIECES, marks=pytest.mark.full),
        # A layer of each kind that the family has.
        *(
            pytest.param(name, layers, 24, EQUAL, marks=pytest.mark.full)
            for name, layers in {
                "gpt2": (0,),
                "llama-3": (0,),
                "qwen2": (0, 1),
                "phi3-long": (0,),
                "gemma2": (0, 1),
                "smollm3-sliding": (0, 1),
                "cohere2": (0,),
                "gpt-neox": (0,),
                "opt": (0,),
            }.items()
        ),
    ],
)
def test_cached_logits_are_the_full_logits(name, layers, size, pieces, model_of):
    model, tokens = model_of(name, *layers), tiny_hf.tokens(time=24)
    got = _cached(model, tokens, size, pieces)
    expected = np.asarray(_run(model, tokens))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.full
def test_the_size_of_a_cache_decides_between_short_and_long(model_of):
    model, tokens = model_of("phi3-long", 0), tiny_hf.tokens(time=17)
    short = np.asarray(_run(model, tokens[:, :16]))
    cached = _cached(model, tokens[:, :16], 16, [8] + [1] * 8)
    np.testing.assert_allclose(cached, short, rtol=0, atol=1e-4)
    long = np.asarray(_run(model, tokens))
    assert np.abs(long[:, :16] - short).max() > 0.1  # nobody saw token 17


def test_positions_turn_the_keys_and_a_common_shift_changes_nothing(model_of):
    model, tokens = model_of("llama"), tiny_hf.tokens(time=24)
    places = np.arange(24, dtype=np.int32)
    plain = _run(model, tokens)
    moved = _run(model, tokens, positions=places + 40)
    apart = _run(model, tokens, positions=2 * places)
    np.testing.assert_allclose(moved, plain, rtol=0, atol=1e-4)
    assert np.abs(apart - np.asarray(plain)).max() > 0.1


def test_positions_say_how_long_a_sequence_is(model_of):
    model, tokens = model_of("phi3-long", 0), tiny_hf.tokens(time=16)
    places = np.arange(16, dtype=np.int32)
    short = np.asarray(_run(model, tokens, positions=places))
    np.testing.assert_allclose(_run(model, tokens), short, atol=1e-5)
    # The same tokens at the same distances, but past the switch at 16.
    long = np.asarray(_run(model, tokens, positions=places + 10))
    assert np.abs(long - short).max() > 0.1
    # The first token sees itself alone, at any place.
    np.testing.assert_allclose(long[:, 0], short[:, 0], atol=1e-4)


# ---- sampling


def _greedy(model, tokens, steps):
    """The likeliest token again and again, each from a full pass: the oracle."""
    for _ in range(steps):
        window = tokens[:, -64:]
        last = window.shape[1] - 1
        whole = next(time for time in (16, 24, 64) if last < time)
        padding = whole - last - 1  # not seen: causal
        logits = _run(model, np.pad(window, ((0, 0), (0, padding))))[:, last]
        tokens = np.concatenate([tokens, np.argmax(logits, -1)[:, None]], axis=1)
    return tokens


@pytest.mark.parametrize(
    ("name", "layers", "time", "steps", "sliding"),
    [
        # 16 is the switch
        pytest.param("phi3-long", (0,), 10, 12, False, marks=pytest.mark.full),
        pytest.param("phi3-long", (0,), 16, 2, False, marks=pytest.mark.full),
        ("phi3-long", (0,), 17, 3, False),
        # 64 is the context
        pytest.param("gemma3", (1, 2), 60, 7, True, marks=pytest.mark.full),
    ],
)
def test_sampling_takes_the_likeliest_token_of_full_passes(
    name, layers, time, steps, sliding, model_of
):
    model, prompt = model_of(name, *layers), tiny_hf.tokens(time=time)
    got = generate(
        model,
        prompt,
        steps=steps,
        key=jax.random.key(0),
        temperature=0.0,
        sliding=sliding,
    )
    np.testing.assert_array_equal(got, _greedy(model, prompt, steps))


# ---- the loss


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        pytest.param("gemma3-linear", 7, marks=pytest.mark.full),
        ("llama-3", None),
        ("llama-3", 1),
        ("llama-3", 1000),
    ],
)
def test_the_loss_is_the_cross_entropy_of_the_logits(name, rows, model_of):
    model = model_of(name, 0)
    tokens, targets = tiny_hf.tokens(time=13), tiny_hf.tokens(time=13, seed=1)
    graphdef, params = nnx.split(model, nnx.Param)
    got = jax.jit(
        lambda p: loss_per_token(nnx.merge(graphdef, p), tokens, targets, rows=rows)
    )(params)
    logits = np.asarray(_run(model, tokens), np.float64)
    chosen = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    expected = np.log(np.exp(logits).sum(-1)) - chosen
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.full
def test_the_loss_in_pieces_has_the_same_gradient_and_small_logits(model_of):
    model = model_of("llama-3", 0)
    tokens, targets = tiny_hf.tokens(time=13), tiny_hf.tokens(time=13, seed=1)
    graphdef, params = nnx.split(model, nnx.Param)

    def gradient(rows):
        def loss(params):
            pieces = loss_per_token(
                nnx.merge(graphdef, params), tokens, targets, rows=rows
            )
            return jnp.mean(pieces)

        return jax.jit(jax.grad(loss))

    in_pieces = gradient(4).lower(params)
    whole, pieces = gradient(26)(params), in_pieces.compile()(params)
    for a, b in zip(*map(jax.tree.leaves, (whole, pieces)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    text = in_pieces.as_text()
    assert "x97xf32" in text
    assert "26x97xf32" not in text
    assert "2x13x97xf32" not in text


# ---- numbers


def test_logits_are_float32_and_parameters_keep_their_dtype(tmp_path):
    tiny_hf.random_folder("gemma3", tmp_path, "bfloat16")
    model = hf.load(tmp_path).model
    x = model.embed(tiny_hf.tokens())
    assert x.dtype == jnp.bfloat16
    assert jax.eval_shape(model, tiny_hf.tokens()).dtype == jnp.float32


def test_the_embeddings_scale_is_rounded_to_the_products_dtype(tmp_path):
    tiny_hf.random_folder("gemma3", tmp_path, "bfloat16")
    tokens = tiny_hf.tokens()
    for dtype in ("float32", "bfloat16"):
        model = hf.load(tmp_path, dtype=dtype).model
        table = np.asarray(model.embedding.embedding[...])
        scale = table.dtype.type(math.sqrt(32))  # 5.65625 in bfloat16
        np.testing.assert_array_equal(model.embed(tokens), table[tokens] * scale)


def test_frequencies_follow_the_closed_forms():
    plain = np.array(rope.linear(1e4, 8).frequencies)
    np.testing.assert_allclose(plain, [1, 0.1, 0.01, 0.001], rtol=1e-12)
    np.testing.assert_allclose(rope.linear(1e4, 8, 4.0).frequencies, plain / 4)
    # 2 pi turns in 100 positions at 0.1 * 2 pi: 10 turns; 0.5 and 0.05 below it.
    scheme = {"factor": 8.0, "low": 1.0, "high": 4.0, "original": 100}
    got = rope.llama3(1e4, 8, **scheme).frequencies
    turns = 100 * plain / (2 * math.pi)  # 15.9, 1.59, 0.159, 0.0159
    left = (turns[1] - 1) / 3
    expected = [1, left * 0.1 + (1 - left) * 0.1 / 8, 0.01 / 8, 0.001 / 8]
    np.testing.assert_allclose(got, expected, rtol=1e-12)

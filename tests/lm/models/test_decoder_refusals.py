"""What the decoder refuses, and what it says."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxprune.lm.models.decoder import rope
from jaxprune.lm.models.decoder.model import loss_per_token
from tests.support.plain_decoder import PLAIN, plain

# ---- errors


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heads": 3}, "divisible by kv_heads, got heads=3 and kv_heads=2"),
        ({"vocab_size": 0}, "vocab_size to be a positive integer, got 0"),
        ({"mlp_width": 2.0}, "mlp_width to be a positive integer, got 2.0"),
        ({"norm": "batch"}, "norm to be one of layer, .*, rms_plus_one, got 'batch'"),
        ({"qk_norm": True}, "qk_norm to be one of head, heads, whole, None, got True"),
        ({"block": "serial"}, "block to be one of pre, post, sandwich, parallel,"),
        ({"activation": "tan"}, "activation to be one of silu, gelu, gelu_tanh, relu"),
        ({"dtype": "float16"}, "dtype to be one of float32, bfloat16"),
        ({"windows": (3,)}, "windows to have one entry for each of the 2 layers"),
        ({"windows": (3, 0)}, "windows of at least 1 token, got 0"),
        ({"experts": 4, "experts_per_token": 2, "gated": False}, "gated experts only"),
        ({"swiglu_limit": 7.0}, "clips experts only"),
    ],
)
def test_a_wrong_configuration_says_what_to_change(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(PLAIN, **changes)


@pytest.mark.parametrize(
    ("tokens", "error", "words"),
    [
        (jnp.zeros((1, 65), jnp.int32), ValueError, "at most 64 tokens here.*got 65"),
        (jnp.zeros(4, jnp.int32), ValueError, r"\(batch, time\), got \(4,\)"),
        (jnp.zeros((1, 4)), TypeError, "integer tokens, got float32"),
    ],
)
def test_wrong_tokens_are_refused_before_anything_runs(tokens, error, words):
    with pytest.raises(error, match=words):
        jax.eval_shape(plain(), tokens)


def test_caches_and_losses_refuse_what_does_not_fit():
    model, tokens = plain(), jnp.zeros((1, 3), jnp.int32)
    with pytest.raises(ValueError, match=r"at most 2 tokens here.*got 3"):
        jax.eval_shape(lambda: model(tokens, cache=model.init_cache(1, 2)))
    _, cache = model(tokens, cache=model.init_cache(1, 4))
    with pytest.raises(ValueError, match=r"at most 4 tokens here.*got 6"):
        model(tokens, cache=cache)
    with pytest.raises(ValueError, match="size <= context, got 65 > 64"):
        model.init_cache(1, 65)
    with pytest.raises(ValueError, match=r"targets of the tokens' shape \(1, 3\)"):
        loss_per_token(model, tokens, tokens[:, 1:])
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        jax.eval_shape(lambda: loss_per_token(model, tokens, tokens, rows=0))
    with pytest.raises(ValueError, match="short_factor to have 2 numbers"):
        rope.longrope(1e4, 4, short=[1], long=[1, 1], original=8, scale=1.0)

"""What the GPT refuses."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from experiments import gpt
from experiments.gpt.config import (
    flops_per_token,
    preset,
)
from jaxprune.lm.models.generate import generate
from tests.support.gpt_model import TINY, make_model, make_tokens

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
        jax.eval_shape(make_model(), tokens)


def test_more_tokens_than_a_cache_holds_are_refused():
    model = make_model()
    with pytest.raises(ValueError, match="at most 2 tokens"):
        model(make_tokens((1, 3)), cache=model.init_cache(1, 2))
    with pytest.raises(ValueError, match="size <= context, got 9 > 8"):
        model.init_cache(1, 9)


@pytest.mark.parametrize("name", ["targets", "weights"])
def test_loss_refuses_another_shape(name):
    arrays = {"targets": make_tokens(), "weights": jnp.ones((3, 8))}
    arrays[name] = arrays[name][:, :1]
    with pytest.raises(ValueError, match=rf"{name} of the tokens' shape \(3, 8\)"):
        gpt.loss(make_model(), make_tokens(), **arrays)


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
        generate(make_model(), jnp.zeros(prompt, jnp.int32), **options)


@pytest.mark.parametrize("token", [-1, 11])
def test_generate_refuses_tokens_of_another_vocabulary(token):
    prompt = jnp.array([[1, token]], jnp.int32)
    with pytest.raises(ValueError, match=rf"in \[0, 11\), got {token};"):
        generate(make_model(), prompt, steps=1, key=jax.random.key(0))


def test_generate_refuses_a_floating_prompt():
    with pytest.raises(TypeError, match="integer prompt, got float32"):
        generate(make_model(), jnp.zeros((1, 2)), steps=1, key=jax.random.key(0))


def test_flops_refuse_unknown_names_and_shares():
    with pytest.raises(ValueError, match="got blocks/9/mlp; matrix_sizes"):
        flops_per_token(TINY, {"blocks/9/mlp": 0.5})
    with pytest.raises(ValueError, match=r"share in \[0, 1\], got 1.5 at 'blocks/0"):
        flops_per_token(TINY, {"blocks/0/mlp/up/kernel": 1.5})

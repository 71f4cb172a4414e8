"""What a model writes to be calibrated on: first tokens, draws, and its directory."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from jaxprune.lm.corpora import self_calibration as written
from jaxprune.lm.corpora.self_calibration import (
    first_tokens,
    self_calibration,
    sequences_at_once,
)
from jaxprune.lm.models.decoder.model import DecoderConfig
from tests.support.plain_decoder import initial

VOCABULARY, SPECIAL = 23, {0, 1, 22}
CONFIG = DecoderConfig(
    vocab_size=VOCABULARY,
    context=16,
    layers=1,
    width=16,
    heads=2,
    kv_heads=1,
    head_dim=8,
    mlp_width=16,
)


@pytest.fixture(scope="module")
def model():
    return initial(CONFIG)


def write(model, **options):
    options = {
        "sequences": 5,
        "length": 8,
        "batch": 2,
        "never_first": SPECIAL,
    } | options
    return self_calibration(model, **options)


@pytest.fixture(scope="module")
def whole(model):
    return write(model, bos=1)


def test_first_tokens_are_uniform_over_the_vocabulary_without_special_ones():
    count = 20_000
    found = np.bincount(
        first_tokens(count, VOCABULARY, SPECIAL, 0), minlength=VOCABULARY
    )
    assert not found[sorted(SPECIAL)].any()
    share = 1 / (VOCABULARY - len(SPECIAL))
    spread = np.sqrt(count * share * (1 - share))
    others = np.delete(found, sorted(SPECIAL))
    assert np.abs(others - count * share).max() < 5 * spread


def test_another_seed_draws_other_first_tokens():
    one, again, other = (first_tokens(50, VOCABULARY, (), seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


def test_sequences_begin_with_bos_and_their_first_token(whole):
    assert whole.shape == (5, 8)
    assert whole.dtype == np.int32
    np.testing.assert_array_equal(whole[:, 0], 1)
    np.testing.assert_array_equal(whole[:, 1], first_tokens(5, VOCABULARY, SPECIAL, 0))


def test_at_temperature_zero_each_token_is_the_likeliest_after_those_before(model):
    found = write(model, temperature=0.0)
    # By so little no logit is divided, which would make them infinite.
    np.testing.assert_array_equal(write(model, temperature=1e-39), found)
    expected = np.argmax(jax.jit(model)(found), axis=-1)[:, :-1]
    np.testing.assert_array_equal(found[:, 1:], expected)


def test_a_run_that_was_stopped_writes_only_what_is_left(
    model, whole, tmp_path, monkeypatch
):
    def stop(count):
        raise KeyboardInterrupt

    numpys = {"bos": np.int64(1), "never_first": set(np.array([*SPECIAL]))}
    with pytest.raises(KeyboardInterrupt):
        write(model, **numpys, directory=tmp_path, progress=stop)
    calls, generate = [], written.generate

    def counted(*args, **options):
        calls.append(1)
        return generate(*args, **options)

    monkeypatch.setattr(written, "generate", counted)
    for expected in (2, 2):  # of three batches; none the second time
        found = write(model, bos=1, directory=tmp_path)
        np.testing.assert_array_equal(found, whole)
        assert len(calls) == expected


def test_another_jobs_directory_is_refused(model, tmp_path):
    def stop(count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(model, bos=1, directory=tmp_path, progress=stop)
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        write(model, bos=1, directory=tmp_path, seed=1)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"sequences": 0}, "sequences=0"),
        ({"batch": 0}, "batch=0"),
        ({"length": 17}, "1 to 16 tokens"),
        ({"length": 1, "bos": 1}, "2 to 16 tokens"),
        ({"never_first": range(VOCABULARY)}, "must begin with some token"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_what_cannot_be_written_is_refused(model, wrong, told):
    with pytest.raises(ValueError, match=told):
        write(model, **wrong)


def test_as_many_are_written_at_once_as_a_quarter_of_the_parameters_holds(model):
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    for length in (8, 16):
        cache = jax.tree.leaves(model.init_cache(1, length))
        most = parameters // 4 // sum(leaf.nbytes for leaf in cache)
        assert 1 < most < 16
        settings = {"sequences": 1000 * most, "length": length}
        assert sequences_at_once(model, **settings, least=1) == most
        assert sequences_at_once(model, **settings, least=most + 3) == most + 3
    many = initial(dataclasses.replace(CONFIG, vocab_size=4096))
    settings = {"length": 8, "least": 1}
    # Even batches, since the last is filled up.
    for sequences, batch in ((64, 16), (18, 9), (17, 9), (3, 3)):
        assert sequences_at_once(many, sequences=sequences, **settings) == batch

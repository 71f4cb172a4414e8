"""What a model expects along its texts says which tokens these do not have."""

import json

import jax
import numpy as np
import pytest

from jaxprune.lm.models import hf
from jaxprune.lm.vocabulary import expected_counts, token_choice, trim
from tests.support import tiny_hf, tiny_tokenizers
from tests.support.tiny_cli import logits


@pytest.mark.parametrize("places", [1, 5, 100])  # of each sequence at once
def test_counts_are_the_sum_of_all_predictions(places, tmp_path, monkeypatch):
    tiny_hf.random_folder("llama", tmp_path)
    loaded, tokens, done = hf.load(tmp_path), tiny_hf.tokens(5, 8), []
    at_once = places * 2 * loaded.config.vocab_size
    monkeypatch.setattr(expected_counts, "LOGITS", at_once)
    counts = expected_counts.expected_counts(
        loaded.model, tokens, batch=2, progress=done.append
    )
    predicted = jax.nn.softmax(logits(tmp_path, tokens), axis=-1)
    np.testing.assert_allclose(counts, np.asarray(predicted).sum((0, 1)), rtol=1e-4)
    assert done == [2, 2, 1]


def test_expected_tokens_stay_beside_those_of_the_texts(tmp_path):
    tiny_tokenizers.model_folder(tmp_path / "model", "byte-level")
    line = tiny_tokenizers.text(20)

    def trimmed(name, **options):
        out = tmp_path / name
        return trim.trim_vocabulary(tmp_path / "model", out, [line], 320, **options)

    by_counts = trimmed("counts")
    rows = hf.load(tmp_path / "model", lazy=True).config.vocab_size
    gone = max({*range(400)} - {*by_counts.kept.tolist()})
    by_both = trimmed("both", expected=np.eye(rows)[gone])
    assert gone in by_both.kept
    assert by_both.covered <= by_counts.covered  # of what the text has


@pytest.mark.parametrize("expected", [np.ones(9), np.full(448, -1.0)])
def test_expectations_of_another_model_are_refused(expected, tmp_path):
    tiny_tokenizers.model_folder(tmp_path / "model", "byte-level")
    out = tmp_path / "small"
    with pytest.raises(ValueError, match=r"expected must have .* each of the 448 ids"):
        trim.trim_vocabulary(
            tmp_path / "model", out, ["a word"], 320, expected=expected
        )
    assert not out.exists()


@pytest.mark.parametrize("decoder", [True, False])
def test_characters_that_bytes_can_write_may_go(decoder):
    content = json.loads(tiny_tokenizers.trained("byte-fallback").to_str())
    if not decoder:  # else bytes would be read back as their names
        content["decoder"] = None
    ids = token_choice.token_ids(content)
    counts = np.zeros(len(ids))
    counts[[i for token, i in ids.items() if token.isascii()]] = 1.0
    kept = {*token_choice.choose_tokens(content, counts, 384).tolist()}
    single = {token: i in kept for token, i in ids.items() if len(token) == 1}
    assert all(stays for token, stays in single.items() if token.isascii())
    assert single["▁"]  # a space
    assert single["日"] is not decoder

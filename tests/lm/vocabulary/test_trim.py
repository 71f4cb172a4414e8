"""A model with fewer tokens is the model before on texts whose tokens all stay."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from jaxprune.lm.checkpoints import rewrite
from jaxprune.lm.checkpoints.checkpoint_dir import open_directory
from jaxprune.lm.corpora import text_files
from jaxprune.lm.measure import perplexity
from jaxprune.lm.models import hf
from jaxprune.lm.vocabulary import token_choice, tokenizer_files, trim
from tests.support import tiny_tokenizers
from tests.support.tiny_cli import logits
from tests.support.tiny_tokenizers import KINDS, model_folder, text

SIZES = {"byte-level": 320, "byte-fallback": 384, "unigram": 192, "wordpiece": 192}
# The texts that the tokens are chosen by: a tenth of those that it was trained on.
SEEN = text(200)
_FAMILIES = ("gpt2", "gemma3", "phi")


_RARER = ("unigram", "wordpiece")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(kind, marks=pytest.mark.full if kind in _RARER else ())
        for kind in KINDS
    ],
)
def pair(request, tmp_path_factory):
    """A directory, the trimmed one, and what was said of it."""
    root, kind = tmp_path_factory.mktemp("vocabulary"), request.param
    model_folder(root / "model", kind)
    result = trim.trim_vocabulary(
        root / "model", root / "small", SEEN.splitlines(), SIZES[kind]
    )
    return root, result


def texts_that_stay(root, kept):
    """Pairs of words all of whose tokens stay, of texts that nothing was chosen by."""
    tokens, kept = hf.load_tokenizer(root / "model"), {*kept.tolist()}
    words = text(900, 7).split()
    pairs = {" ".join(words[i : i + 2]) for i in range(0, len(words), 2)}
    return sorted(pair for pair in pairs if {*tokens.encode(pair)} <= kept)


@pytest.mark.full
def test_a_text_whose_tokens_stay_is_split_as_before(pair):
    root, result = pair
    texts = texts_that_stay(root, result.kept)
    assert len(texts) > 10
    before, after = (
        hf.load_tokenizer(root / name).tokens for name in ("model", "small")
    )
    for words in texts:
        expected = before.encode(words, add_special_tokens=False).tokens
        assert after.encode(words, add_special_tokens=False).tokens == expected


@pytest.mark.full
def test_its_logits_are_those_of_the_same_tokens(pair):
    root, result = pair
    before, after = (hf.load_tokenizer(root / name) for name in ("model", "small"))
    for words in texts_that_stay(root, result.kept)[:3]:
        ids = np.array([before.encode(words)])
        new = np.array([after.encode(words)])
        np.testing.assert_array_equal(result.kept[new], ids)
        # A head of another width may add up in another order.
        expected = logits(root / "model", ids)[..., result.kept]
        np.testing.assert_allclose(
            logits(root / "small", new), expected, rtol=1e-5, atol=1e-6
        )


def test_what_any_text_or_prompt_needs_has_stayed(pair):
    root, result = pair
    content = json.loads((root / "model" / "tokenizer.json").read_text())
    small = json.loads((root / "small" / "tokenizer.json").read_text())
    ids = token_choice.token_ids(small)
    for token in content["added_tokens"]:
        assert result.kept[ids[token["content"]]] == token["id"]
    model = hf.load_tokenizer(root / "model").tokens
    for name in ("config.json", "generation_config.json"):
        old, new = (
            json.loads((root / place / name).read_text())
            for place in ("model", "small")
        )
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            np.testing.assert_array_equal(result.kept[new[key]], old[key])
    settings = json.loads((root / "small" / "tokenizer_config.json").read_text())
    for number, token in settings["added_tokens_decoder"].items():
        assert model.token_to_id(token["content"]) == result.kept[int(number)]


def test_the_record_says_what_went_and_twins_are_left_out(pair):
    root, result = pair
    record = rewrite.read_provenance(root / "small", verify=True)
    assert record["vocabulary"]["after"] == len(result.kept)
    assert record["vocabulary"]["left_out"] == ["vocab.json"]
    assert not (root / "small" / "vocab.json").exists()
    assert 0.5 < result.covered <= 1
    tensors = open_directory(root / "small").tensors
    assert tensors["model.embed_tokens.weight"].shape[0] == len(result.kept)


# What is of no use to a tokenizer with an unknown token has none here.
LETTERS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=40)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
def test_every_text_comes_back_from_bytes(kind, tmp_path):
    model_folder(tmp_path / "model", kind)
    size = SIZES[kind]
    trim.trim_vocabulary(tmp_path / "model", tmp_path / "small", [SEEN], size)
    tokenizer = hf.load_tokenizer(tmp_path / "small")

    @given(LETTERS)
    def comes_back(words):
        tokens = tokenizer.encode(words, bos=False)
        assert max(tokens, default=0) < size
        assert tokenizer.decode(tokens, special=True) == words.replace("▁", " ")

    comes_back()


@pytest.mark.full
@pytest.mark.parametrize(
    ("size", "match"),
    [
        (100, "positive multiple of 64, got 100"),
        (0, "positive multiple of 64, got 0"),
        (64, r"\d+ tokens must stay: added tokens, bytes"),
        (6400, "fewer tokens must stay than the"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_anything_is_written(
    tmp_path, size, match
):
    model_folder(tmp_path / "model", "byte-level")
    with pytest.raises(ValueError, match=match):
        trim.trim_vocabulary(tmp_path / "model", tmp_path / "small", [SEEN], size)
    assert not (tmp_path / "small").exists()


@pytest.mark.full
@pytest.mark.parametrize("name", ["llama-3", *_FAMILIES])
def test_tied_heads_and_biases_lose_the_same_rows(tmp_path, name):
    model_folder(tmp_path / "model", "byte-level", name)
    result = trim.trim_vocabulary(tmp_path / "model", tmp_path / "small", [SEEN], 320)
    tokens = np.array([np.arange(5, 25)])
    expected = logits(tmp_path / "model", result.kept[tokens])[..., result.kept]
    small = logits(tmp_path / "small", tokens)
    np.testing.assert_allclose(small, expected, rtol=1e-5, atol=1e-6)
    before, after = (
        load_file(tmp_path / place / "model.safetensors")
        for place in ("model", "small")
    )
    same = [k for k in before if before[k].shape == after[k].shape]
    assert len(same) < len(before)
    for name_of_tensor in same:
        np.testing.assert_array_equal(before[name_of_tensor], after[name_of_tensor])


@pytest.mark.full
@pytest.mark.parametrize("content", [None, "no tokenizer"])
def test_a_directory_without_a_tokenizer_is_refused_in_a_sentence(tmp_path, content):
    model_folder(tmp_path / "model", "byte-level")
    (tmp_path / "model" / "tokenizer.json").unlink()
    if content is not None:
        (tmp_path / "model" / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        trim.trim_vocabulary(tmp_path / "model", tmp_path / "small", [SEEN], 320)
    assert not (tmp_path / "small").exists()


def test_a_merge_stays_with_its_parts_and_its_product():
    content = json.loads(tiny_tokenizers.trained("byte-level").to_str())
    counts = np.zeros(512, np.int64)
    ids = token_choice.token_ids(content)
    longest = max(ids, key=len)
    counts[ids[longest]] = 1
    kept = {*token_choice.choose_tokens(content, counts, 320).tolist()}
    assert ids[longest] in kept
    made_by = {a + b: (a, b) for a, b in token_choice.merge_pairs(content["model"])}
    pending = [longest]
    while pending:
        for part in made_by.get(pending.pop(), ()):
            assert ids[part] in kept
            pending.append(part)


def test_tokens_that_no_text_has_come_by_the_characters_of_the_texts():
    vocabulary = {"<unk>": 0, "жж": 1, "ab": 2, "ba": 3, "bb": 4}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
    content = {"added_tokens": [], "model": model}
    counts = np.array([0, 0, 3, 0, 0])
    kept = token_choice.choose_tokens(content, counts, 3)
    assert kept.tolist() == [0, 2, 3]  # "ba" has the letters of "ab", "жж" has not


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
def test_transformers_loads_it_with_nothing_missing(tmp_path, kind):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model_folder(tmp_path / "model", kind)
    trim.trim_vocabulary(tmp_path / "model", tmp_path / "small", [SEEN], SIZES[kind])
    model, about = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "small", output_loading_info=True
    )
    assert not any(about[key] for key in ("missing_keys", "unexpected_keys"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "small")
    line = SEEN.splitlines()[0]
    tokens = tokenizer(line, add_special_tokens=False).input_ids
    ours = hf.load_tokenizer(tmp_path / "small").encode(line, bos=False)
    assert tokens == ours
    with torch.no_grad():
        found = model(torch.tensor([tokens])).logits.numpy()
    np.testing.assert_allclose(
        found, logits(tmp_path / "small", np.array([tokens])), atol=1e-4
    )


def test_a_token_that_the_template_names_stays_though_it_is_not_special(tmp_path):
    model_folder(tmp_path / "model", "byte-level")
    path = tmp_path / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    rarest = max(vocabulary, key=lambda token: (len(token), vocabulary[token]))
    part = {"id": rarest, "ids": [vocabulary[rarest]], "tokens": [rarest]}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": rarest, "type_id": 0}},
        ],
        "pair": [],
        "special_tokens": {rarest: part},
    }
    path.write_text(json.dumps(content))
    trim.trim_vocabulary(tmp_path / "model", tmp_path / "small", ["a"], 320)
    small = json.loads((tmp_path / "small" / "tokenizer.json").read_text())
    (number,) = small["post_processor"]["special_tokens"][rarest]["ids"]
    assert small["model"]["vocab"][rarest] == number


def test_ids_beside_places_and_biases_are_new_ones_too():
    content = {
        "forced_decoder_ids": [[1, 50], [2, None]],
        "sequence_bias": [[[50, 51], -1.0]],
        "eos_token_id": [52],
    }
    assert tokenizer_files.named_ids(content) == {50, 51, 52}
    changed = tokenizer_files.reindexed_settings(content, lambda number: number - 50)
    assert changed == {
        "forced_decoder_ids": [[1, 0], [2, None]],
        "sequence_bias": [[[0, 1], -1.0]],
        "eos_token_id": [2],
    }


def test_bytes_of_a_text_are_its_own_where_words_are_unknown(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<unk>", "<s>", "seen", "also", "rare", "rarer"]

    def loaded(name, count):
        path = tmp_path / name
        model_folder(path, "wordpiece")
        vocabulary = {word: i for i, word in enumerate(words[:count])}
        made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<unk>"))
        made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        made.save(str(path / "tokenizer.json"))
        return hf.load_tokenizer(path)

    before, after = loaded("before", 6), loaded("after", 4)
    text_path = tmp_path / "text.txt"
    text_path.write_text("seen also rare seen rarer also seen")
    read = text_files.read_text(text_path, before, 6)
    windows = perplexity.windows_of_text(
        read, context=4, bos=1, longest=8, tokenizer=before
    )
    again = perplexity.retokenize_windows(windows, after)
    assert again.text == "seen also <unk> seen <unk> also seen"
    assert again.bytes == windows.bytes
